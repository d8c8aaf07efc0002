"""Layers: minGRU and minLSTM behind the interfaces of torch.nn.GRU and torch.nn.LSTM; a block."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, cast, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import Unpack

from msrnn_ops import backend, convolution, errors
from msrnn_ops.checks import autocast_enabled
from msrnn_ops.dtensor import is_distributed
from msrnn_ops.operators.in_place import is_as_it_lies, is_plain
from msrnn_ops.operators.layer import LAYERS, idle
from msrnn_ops.operators.scan import (
    MIN_GRU_JOINT,
    MIN_LSTM_JOINT,
    OPERATORS,
    Recurrence,
    borders,
    sequences_of,
)
from msrnn_ops.reference import accumulation_dtype
from msrnn_ops.scan import min_gru_joint, min_lstm_joint
from msrnn_ops.state import DTYPES

__all__ = ["BlockState", "MinGRU", "MinLSTM", "MinRNNBlock", "load_mingru_pytorch"]

_Pair: TypeAlias = tuple[Tensor, Tensor]


class Steps(TypedDict, total=False):
    """Which steps are real, and which borders no state crosses; for the overloads."""

    cu_seqlens: Tensor | None
    resets: Tensor | None
    valid: Tensor | None


def packing(batch_sizes: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For the batch sizes of a PackedSequence, whose rows lie time by time: cu_seqlens, the rows
    sequence by sequence, and the way back."""
    sizes = np.array(batch_sizes.tolist())
    sequence = np.arange(sizes[0])[:, None]
    there = sequence < sizes
    rows = (sizes.cumsum() - sizes + sequence)[there]
    ends = np.concatenate([[0], there.sum(1).cumsum()])
    cu_seqlens, forth, back = (torch.from_numpy(x) for x in (ends, rows, rows.argsort()))
    return cu_seqlens.to(device), forth.to(device), back.to(device)


class WholeTime:
    """How a layer meets the time axis of its inputs: here all of it is in this process.

    msrnn_ops.distributed.shard_time puts a class in its place that knows the other ranks.
    """

    whole = True

    def joint(self, op: Callable[..., Any]) -> Callable[..., Any]:
        """The op that scans the time axis, for the joint op of a layer."""
        return op

    def local(self, cu_seqlens: Tensor, steps: int) -> Tensor:
        """Borders of packed sequences, counted from the first of the steps that are here."""
        return cu_seqlens

    def real_before(self, valid: Tensor) -> Tensor:
        """Of each row, whether it has a real step before those that are here, (B, 1)."""
        return torch.zeros_like(valid[:, :1])

    def convolve(
        self,
        conv: nn.Conv1d,
        first: Tensor,
        y: Tensor,
        cu_seqlens: Tensor | None,
        resets: Tensor | None,
        valid: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """A causal convolution of K steps over y (B, T, D), and the last K - 1 inputs.

        ``first`` (B or N, K - 1, D) comes before the whole of each sequence.
        """
        before = conv.kernel_size[0] - 1
        if cu_seqlens is not None:
            return convolution.packed(conv, F.pad(y, (0, 0, before, 0)), first, cu_seqlens)
        rows = torch.cat([first, y], 1)
        real = None if valid is None else F.pad(valid, (before, 0), value=True)
        last, _ = convolution.last_rows(rows, before, real, resets)
        return convolution.causal(conv, rows, valid, resets), last


def real_steps(
    x: Tensor, cu_seqlens: Tensor | None, valid: Tensor | None, time_axis: WholeTime
) -> Tensor | None:
    """Which steps of x (B, T, F) are no padding, (B, T, 1); None where all are known to be real."""
    if cu_seqlens is None:
        return None if valid is None else valid.unsqueeze(-1)
    cu_seqlens = time_axis.local(cu_seqlens, x.shape[1])
    visible = cu_seqlens.is_cpu and type(cu_seqlens) is Tensor and not torch.compiler.is_compiling()
    if visible and cu_seqlens[0] <= 0 and cu_seqlens[-1] >= x.shape[1]:
        return None
    step = torch.arange(x.shape[1], device=x.device)
    return ((cu_seqlens[0] <= step) & (step < cu_seqlens[-1]))[None, :, None]


def check_steps(
    caller: str,
    x: Tensor,
    cu_seqlens: Tensor | None,
    resets: Tensor | None,
    valid: Tensor | None,
    time: int,
) -> None:
    """resets and valid: bool, in the layout of the input; valid not with cu_seqlens.

    ``time`` is the dimension of x that is it.
    """
    for argument, mask in (("resets", resets), ("valid", valid)):
        if mask is None:
            continue
        if not isinstance(mask, Tensor):
            raise errors.kind(caller, argument, "a tensor", mask)
        if mask.dtype != torch.bool:
            raise errors.dtype(caller, argument, "torch.bool", mask.dtype)
        if mask.layout != torch.strided:
            raise errors.layout(caller, argument, mask)
        if mask.shape != x.shape[:-1]:
            layout = "(T,)" if x.dim() == 2 else "(B, T)" if time else "(T, B)"
            raise errors.shape(caller, argument, f"{layout} = {tuple(x.shape[:-1])}", mask)
        if mask.device != x.device:
            raise errors.device(caller, argument, "input", x.device, mask.device)
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or not len(cu_seqlens):
        kind = isinstance(cu_seqlens, Tensor)
        got = tuple(cu_seqlens.shape) if kind else type(cu_seqlens).__name__
        raise errors.value(caller, "cu_seqlens of shape (N + 1,)", got)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise errors.dtype(caller, "cu_seqlens", "int32 or int64", cu_seqlens.dtype)
    if cu_seqlens.layout != torch.strided:
        raise errors.layout(caller, "cu_seqlens", cu_seqlens)
    if cu_seqlens.device != x.device:
        raise errors.device(caller, "cu_seqlens", "input", x.device, cu_seqlens.device)
    if x.dim() == 3 and x.shape[1 - time] != 1:
        expected = "B = 1 with cu_seqlens (sequences packed along time)"
        raise errors.value(caller, expected, f"B = {x.shape[1 - time]}")
    if valid is not None:
        raise ValueError(
            f"{caller}: expected valid or cu_seqlens, got both; steps that cu_seqlens do not cover "
            "are padding"
        )


def blame_steps(
    caller: str,
    x: Tensor,
    cu_seqlens: Tensor | None,
    resets: Tensor | None,
    valid: Tensor | None,
    time_axis: WholeTime,
) -> None:
    """After a run over x (B, T, F) failed: raises if the reason lies in its steps.

    The operators check that, too, in their own names; to ask before would cost every call.
    """
    for argument, mask in (("resets", resets), ("valid", valid)):
        if mask is not None and is_distributed(mask) != is_distributed(x):
            kinds = ("a plain tensor", "a DTensor")
            expected, got = kinds[is_distributed(x)], kinds[is_distributed(mask)]
            raise errors.value(caller, f"{argument} to be {expected} like the input", got)
    if cu_seqlens is not None and time_axis.whole:
        borders(caller, cu_seqlens, x.shape[1])


def check_alone(
    caller: str,
    kind: str,
    time_axis: WholeTime,
    cu_seqlens: Tensor | None,
    resets: Tensor | None,
    valid: Tensor | None,
) -> None:
    """An input that knows its sequences comes without other borders, and in one process."""
    if not time_axis.whole:
        raise TypeError(f"{caller}: expected a tensor, as its time is sharded, got {kind}")
    for argument, x in (("cu_seqlens", cu_seqlens), ("resets", resets), ("valid", valid)):
        if x is not None:
            raise ValueError(f"{caller}: expected no {argument} with {kind}, got one")


def jagged(caller: str, x: Any) -> tuple[Tensor, Tensor]:
    """The values (rows, F) of a nested tensor and its borders."""
    whole = x.layout == torch.jagged and x.dim() == 3 and x.shape[2] == x.values().shape[-1]
    if not whole or x.lengths() is not None:
        raise ValueError(
            f"{caller}: expected a nested tensor (B, *, F) with layout=torch.jagged, contiguous, "
            f"got one with layout={x.layout}"
        )
    return x.values(), x.offsets()


def _check_whole(module: MinRNNBase | MinRNNBlock) -> None:
    if not module.time_axis.whole:
        raise ValueError(
            f"{type(module).__name__}: expected time not to be sharded for step, call "
            "shard_time(module, None) first"
        )


_CAST = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts


def _castable(x: Tensor, weight: Tensor) -> bool:
    """Whether a linear layer takes x in another dtype than its weight's."""
    return autocast_enabled(x.device.type) and x.dtype in _CAST and weight.dtype in _CAST


def _check_options(
    caller: str, dropout: float, activation: str, forget_bias: float, dtype: torch.dtype | None
) -> None:
    """What layers and blocks have in common."""
    errors.check_number(caller, "dropout", dropout, 0, 1)
    errors.check_number(caller, "forget_bias", forget_bias)
    if activation not in ("g", "identity"):
        raise errors.value(caller, "activation 'g' or 'identity'", repr(activation))
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(
            f"{caller}: expected dtype to be float32, float64, bfloat16 or float16, got {dtype!r}"
        )


class MinRNNBase(nn.Module):
    """A stack of recurrences, each a linear layer and its scan in one or two directions."""

    _parts: int  # pre-activations of one channel in the projection; the first holds the gate
    _keeps: int  # +1: a large gate keeps the state; -1: it replaces it
    _op: Recurrence  # of what follows the projection
    _joint: Callable[..., Any]
    time_axis = WholeTime()
    learnable_h0 = False  # of layers that were pickled without one
    # Likewise; not annotated, as TorchScript would read that and stop before it says why.
    _chunk = cast("int | None", None)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "g",
        forget_bias: float = 0.0,
        learnable_h0: bool = False,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        errors.check_int(name, "input_size", input_size, 1)
        errors.check_int(name, "hidden_size", hidden_size, 1)
        errors.check_int(name, "num_layers", num_layers, 1)
        switches = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
        for argument, switch in {**switches, "learnable_h0": learnable_h0}.items():
            if not isinstance(switch, bool):
                raise errors.kind(name, argument, "a bool", switch)
        if proj_size:
            raise errors.value(name, "proj_size=0, its state is not projected", proj_size)
        _check_options(name, dropout, activation, forget_bias, dtype)
        if forget_bias and not bias:
            raise ValueError(f"{name}: expected bias=True with forget_bias={forget_bias}")
        if dropout and num_layers == 1:
            warnings.warn(
                f"{name}: dropout={dropout} acts between layers and num_layers=1", stacklevel=2
            )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.bidirectional = bias, batch_first, bidirectional
        self.dropout, self.proj_size = float(dropout), proj_size
        self.activation, self.forget_bias = activation, forget_bias
        self.learnable_h0 = learnable_h0
        self.chunk = chunk
        for i, suffix in enumerate(self._suffixes()):
            directions = 1 + self.bidirectional
            features = input_size if i < directions else directions * hidden_size
            weight = torch.empty(self._parts * hidden_size, features, device=device, dtype=dtype)
            self.register_parameter(f"weight_ih_{suffix}", nn.Parameter(weight))
            if bias:
                offset = nn.Parameter(torch.empty_like(weight[:, 0]))
                self.register_parameter(f"bias_ih_{suffix}", offset)
            if learnable_h0:
                start = nn.Parameter(weight.new_empty(hidden_size))
                self.register_parameter(f"h0_{suffix}", start)
        self.reset_parameters()

    @property
    def chunk(self) -> int | None:
        """Steps that are projected and scanned at a time; None: all of them. It may be set."""
        return self._chunk

    @chunk.setter
    def chunk(self, chunk: int | None) -> None:
        if chunk is not None:
            errors.check_int(type(self).__name__, "chunk", chunk, 1)
        self._chunk = chunk

    def _suffixes(self) -> list[str]:
        """Of the parameters' names, as in torch.nn.GRU: layer by layer, forward, then reverse."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{i}{direction}" for i in range(self.num_layers) for direction in directions]

    def reset_parameters(self) -> None:
        """As nn.Linear, ``forget_bias`` on top of the bias of what keeps the state, states of 0."""
        for suffix in self._suffixes():
            weight, bias = self._parameters_of(suffix)
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)
                with torch.no_grad():
                    bias[: self.hidden_size] += self._keeps * self.forget_bias
            if self.learnable_h0:
                nn.init.zeros_(getattr(self, f"h0_{suffix}"))

    def flatten_parameters(self) -> None:
        """Nothing to do: there for scripts that call it on an nn.GRU."""

    @property
    def mode(self) -> str:
        """The name of the recurrence, as torch.nn.GRU has one."""
        return type(self).__name__

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """Of each layer and direction: weight and bias."""
        kinds = ["weight_ih", *(["bias_ih"] if self.bias else [])]
        return [
            [getattr(self, f"{kind}_{suffix}") for kind in kinds] for suffix in self._suffixes()
        ]

    def _parameters_of(self, suffix: str) -> tuple[Tensor, Tensor | None]:
        bias = getattr(self, f"bias_ih_{suffix}") if self.bias else None
        return getattr(self, f"weight_ih_{suffix}"), bias

    def extra_repr(self) -> str:
        defaults: dict[str, object] = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
        }
        defaults |= {"bidirectional": False, "activation": "g", "forget_bias": 0.0}
        defaults |= {"learnable_h0": False, "chunk": None}
        changed = [
            f"{k}={getattr(self, k)!r}" for k, v in defaults.items() if getattr(self, k) != v
        ]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *changed])

    def check_input(self, input: Tensor, batch_sizes: Tensor | None = None) -> None:
        """Raises what ``forward`` does for an input of the wrong shape, dtype or device."""
        shape = "(B, T, F) or (T, F)" if self.batch_first else "(T, B, F) or (T, F)"
        dims = (2, 3) if batch_sizes is None else (2,)
        self._check(input, shape if batch_sizes is None else "(rows, F)", *dims)

    def get_expected_hidden_size(
        self, input: Tensor, batch_sizes: Tensor | None = None
    ) -> tuple[int, int, int]:
        """The shape of ``hx`` for an input with a batch: (layers x directions, B, H)."""
        if batch_sizes is not None:
            batch = int(batch_sizes[0])
        else:
            batch = input.shape[0 if self.batch_first else 1]
        return self.num_layers * (1 + self.bidirectional), batch, self.hidden_size

    def check_hidden_size(
        self, hx: Tensor, expected_hidden_size: tuple[int, ...], msg: str = ""
    ) -> None:
        """Raises for a state of another shape; ``msg`` is there for its place."""
        if hx.shape != expected_hidden_size:
            raise self._wrong_size(errors.shape(self.mode, "hx", expected_hidden_size, hx))

    def check_forward_args(
        self, input: Tensor, hidden: Any, batch_sizes: Tensor | None = None
    ) -> None:
        """Raises what ``forward`` does for a wrong input or state."""
        self.check_input(input, batch_sizes)
        expected = self.get_expected_hidden_size(input, batch_sizes)
        for hx in hidden if isinstance(hidden, tuple) else (hidden,):
            self.check_hidden_size(hx, expected)

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """States in another order of the batch."""
        if permutation is None:
            return hx
        if isinstance(hx, tuple):
            return tuple(x.index_select(1, permutation) for x in hx)
        return hx.index_select(1, permutation)

    @staticmethod
    def _wrong_size(error: ValueError) -> RuntimeError:
        """torch.nn.GRU raises RuntimeError where sizes do not match, which some callers catch."""
        return RuntimeError(*error.args)

    def _check(self, x: Tensor, shape: str, *dims: int) -> None:
        if not isinstance(x, Tensor):
            raise errors.kind(self.mode, "input", "a tensor", x)
        if x.layout != torch.strided:
            raise errors.layout(self.mode, "input", x)
        if x.dim() not in dims:
            expected = f"{shape} with {self.input_size} features"
            raise errors.shape(self.mode, "input", expected, x)
        if x.shape[-1] != self.input_size:
            expected = f"{shape} with {self.input_size} features"
            raise self._wrong_size(errors.shape(self.mode, "input", expected, x))

    def _checked_weights(self, x: Tensor, suffix: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of one recurrence, which x can be multiplied with."""
        weight, bias = self._parameters_of(suffix)
        if x.dtype != weight.dtype and not _castable(x, weight):
            expected = f"input in {weight.dtype}, the dtype of its weights"
            raise errors.value(self.mode, expected, x.dtype)
        if x.device != weight.device:
            raise errors.device(self.mode, "input", "its weights", weight.device, x.device)
        return weight, bias

    def _project(self, x: Tensor, suffix: str) -> Tensor:
        """The linear layer of one recurrence."""
        return F.linear(x, *self._checked_weights(x, suffix))

    def _check_state(self, x: Tensor, h: Tensor, *batch: int) -> None:
        if not isinstance(h, Tensor):
            raise errors.kind(self.mode, "hx", "a tensor", h)
        if h.layout != torch.strided:
            raise errors.layout(self.mode, "hx", h)
        expected = (self.num_layers * (1 + self.bidirectional), *batch, self.hidden_size)
        self.check_hidden_size(h, expected)
        wide = torch.promote_types(x.dtype, torch.float32)
        if h.dtype not in (x.dtype, wide) and not (
            autocast_enabled(x.device.type) and h.dtype in DTYPES
        ):
            either = f"{wide}" if wide == x.dtype else f"{x.dtype} or {wide}"
            raise errors.dtype(self.mode, "hx", either, h.dtype)
        if h.device != x.device:
            raise errors.device(self.mode, "hx", "input", x.device, h.device)

    def _start(self, batch: int) -> Tensor | None:
        """The learnt initial states, (layers x directions, B, H)."""
        if not self.learnable_h0:
            return None
        start = torch.stack([getattr(self, f"h0_{suffix}") for suffix in self._suffixes()])
        return start.unsqueeze(1).expand(-1, batch, -1)

    def _run(
        self,
        x: Tensor,
        h0: Tensor | None,
        cu_seqlens: Tensor | None = None,
        resets: Tensor | None = None,
        valid: Tensor | None = None,
        real: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All layers over x (B, T, features), of which some steps are ``real``: their output and
        last states."""
        suffixes, last = self._suffixes(), []
        directions = 1 + self.bidirectional
        dtype = x.dtype if h0 is None else h0.dtype
        if h0 is None:
            h0 = self._start(sequences_of(x, cu_seqlens))
        behind = resets
        if resets is not None and valid is not None:  # a step that is not there resets nothing
            resets = resets & valid
            behind = resets
            if directions == 2:  # nor is there a border before the first one that is
                earlier = (valid.long().cumsum(1) > 1) | self.time_axis.real_before(valid)
                behind = resets & earlier
        if real is not None:  # whatever lies there, times a gradient of 0, must be 0
            x = torch.where(real, x, 0.0)
        in_chunks = self._takes_chunks(x)
        for i in range(self.num_layers):
            if i:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for k in range(directions * i, directions * (i + 1)):
                reverse = k % directions == 1
                masks = (cu_seqlens, behind if reverse else resets, real)
                start = None if h0 is None else h0[k]
                h, state = self._scan(x, suffixes[k], start, *masks, reverse, in_chunks)
                outputs.append(h)
                last.append(state)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
        if real is not None:
            x = torch.where(real, x, 0.0)
        return x, torch.stack(last).to(dtype)

    def _takes_chunks(self, x: Tensor) -> bool:
        """Whether time goes in chunks: not where others than autograd look into a layer."""
        if self._chunk is None or not self.time_axis.whole or is_distributed(x):
            return False
        if x.dtype not in DTYPES or backend.namespace(self.mode, x.device) is None:
            return False
        if torch.compiler.is_compiling():
            return not torch.compiler.is_exporting()
        if torch._C._are_functorch_transforms_active() or torch._C._is_tracing():
            return False
        return forward_ad._current_level < 0 and x.shape[1] > self._chunk

    def _scan(
        self,
        x: Tensor,
        suffix: str,
        h0: Tensor | None,
        cu_seqlens: Tensor | None,
        resets: Tensor | None,
        real: Tensor | None,
        reverse: bool,
        in_chunks: bool,
    ) -> tuple[Tensor, Tensor]:
        """One recurrence with its linear layer: its states and the last ones."""
        weight, bias = self._checked_weights(x, suffix)
        if in_chunks and type(weight) in (Tensor, nn.Parameter):
            if autocast_enabled(x.device.type) and x.dtype in _CAST and weight.dtype in _CAST:
                dtype = torch.get_autocast_dtype(x.device.type)
                x, weight = x.to(dtype), weight.to(dtype)
                bias = None if bias is None else bias.to(dtype)
            h0 = None if h0 is None else h0.to(accumulation_dtype(x.dtype))
            layer = LAYERS[str(backend.namespace(self.mode, x.device)), self._op.name]
            options = (reverse, self.activation == "identity", self._chunk)
            return layer(x, weight, bias, h0, cu_seqlens, resets, real, *options)
        projection = F.linear(x, weight, bias)
        if real is not None and cu_seqlens is None:  # the op knows what cu_seqlens leave out
            projection = idle(self._op, projection, real)
        h, last = self.time_axis.joint(self._joint)(
            projection,
            h0,
            activation=self.activation,
            reverse=reverse,
            cu_seqlens=cu_seqlens,
            resets=resets,
            return_state=True,
        )
        return h, last

    def _forward(
        self,
        x: Tensor | PackedSequence,
        h0: Tensor | None,
        cu_seqlens: Tensor | None,
        resets: Tensor | None,
        valid: Tensor | None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        if (
            not torch.compiler.is_compiling()
            and torch._C._is_tracing()
            and torch.onnx.is_in_onnx_export()
        ):
            raise RuntimeError(
                f"{self.mode}: expected torch.onnx.export with dynamo=True, of a program that "
                "msrnn_ops.onnx.decompositions has been applied to, got the exporter by traces"
            )
        if isinstance(x, PackedSequence) or (isinstance(x, Tensor) and x.is_nested):
            kind = "a nested tensor" if isinstance(x, Tensor) else "a PackedSequence"
            check_alone(self.mode, kind, self.time_axis, cu_seqlens, resets, valid)
            if isinstance(x, Tensor):
                return self._forward_nested(x, h0)
            return self._forward_packed(x, h0)
        self.check_input(x)
        batched = x.dim() == 3
        time_major = batched and not self.batch_first
        time = 1 if batched and self.batch_first else 0
        check_steps(self.mode, x, cu_seqlens, resets, valid, time)
        if not batched:
            x = x.unsqueeze(0)
            resets = None if resets is None else resets.unsqueeze(0)
            valid = None if valid is None else valid.unsqueeze(0)
        if time_major:  # one copy here and one there: the linear layers would make more
            x = x.transpose(0, 1).contiguous()
            resets = None if resets is None else resets.t()
            valid = None if valid is None else valid.t()
        one = not batched and cu_seqlens is None  # a sequence whose state has no batch
        if h0 is not None:
            self._check_state(x, h0, *(() if one else (sequences_of(x, cu_seqlens),)))
            h0 = h0.unsqueeze(1) if one else h0
        real = real_steps(x, cu_seqlens, valid, self.time_axis)
        try:
            output, last = self._run(x, h0, cu_seqlens, resets, valid, real)
        except Exception:
            blame_steps(self.mode, x, cu_seqlens, resets, valid, self.time_axis)
            raise
        if not batched:
            return output.squeeze(0), last.squeeze(1) if one else last
        return output.transpose(0, 1).contiguous() if time_major else output, last

    def _forward_packed(
        self, packed: PackedSequence, h0: Tensor | None
    ) -> tuple[PackedSequence, Tensor]:
        data, sizes, order, original = packed
        self.check_input(data, sizes)
        if h0 is not None:
            self._check_state(data, h0, int(sizes[0]))
            h0 = h0 if order is None else h0.index_select(1, order)
        cu_seqlens, rows, back = packing(sizes, data.device)
        output, last = self._run(data.index_select(0, rows).unsqueeze(0), h0, cu_seqlens)
        output = output.squeeze(0).index_select(0, back)
        last = last if original is None else last.index_select(1, original)
        return PackedSequence(output, sizes, order, original), last

    def _forward_nested(self, x: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor]:
        """A jagged (B, *, F), whose values lie sequence by sequence: nothing is copied."""
        values, offsets = jagged(self.mode, x)
        self._check(values, "(B, *, F), jagged,", 2)
        if h0 is not None:
            self._check_state(values, h0, x.shape[0])
        output, last = self._run(values.unsqueeze(0), h0, offsets)
        return torch.nested.nested_tensor_from_jagged(output.squeeze(0), offsets), last

    def _step_unchecked(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """A step on a CPU whose operators see what could be wrong with it, in half of the time.

        None: they do not, or something is wrong, which the checks have the words for.
        """
        if torch.is_grad_enabled() or not is_plain() or torch._C._is_tracing():
            return None
        if not isinstance(x, Tensor) or not isinstance(h, Tensor) or not (x.is_cpu and h.is_cpu):
            return None
        if x.dim() != 2 or h.dim() != 3 or len(h) != self.num_layers:
            return None
        if h.dtype != accumulation_dtype(x.dtype) or not is_as_it_lies(h):
            return None
        if x.layout != torch.strided or h.layout != torch.strided:
            return None
        if self.bidirectional or not self.time_axis.whole or (self.training and self.dropout):
            return None
        if torch.is_autocast_enabled("cpu") or self.activation not in ("g", "identity"):
            return None
        if not backend.is_compiled(self._op.name, x):
            return None
        kernel = OPERATORS[backend.COMPILED, self._op.name].forward
        identity, parameters, after = self.activation == "identity", self._parameters, []
        try:
            for i in range(self.num_layers):
                weight = cast(Tensor, parameters[f"weight_ih_l{i}"])
                projection = F.linear(x, weight, parameters[f"bias_ih_l{i}"] if self.bias else None)
                # PyTorch multiplies by weights that are nowhere, too.
                if not weight.is_cpu or type(projection) is not Tensor:
                    return None
                args = (projection.unsqueeze(1), h[i], None, None, False, identity)
                _, state = backend.of_device(kernel, args, on_cpu=True)
                x = state.to(projection.dtype)
                after.append(state)
        except (KeyError, TypeError, AttributeError, RuntimeError):
            return None
        return x, torch.stack(after)

    def _step(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        found = self._step_unchecked(x, h)
        if found is not None:
            return found
        if self.bidirectional:
            raise ValueError(f"{type(self).__name__}: expected one direction for step, got two")
        _check_whole(self)
        self._check(x, "(B, F) or (F,)", 1, 2)
        batched, after = x.dim() == 2, []
        if h is not None:
            self._check_state(x, h, *x.shape[:-1])
            h = h if batched else h.unsqueeze(1)
        x = x if batched else x.unsqueeze(0)
        if h is None:
            h = self._start(x.shape[0])
        if h is None:
            h = x.new_zeros(self.num_layers, x.shape[0], self.hidden_size)
        for i, suffix in enumerate(self._suffixes()):
            if i:
                x = F.dropout(x, self.dropout, self.training)
            projection = self._project(x, suffix)
            _, state = self._joint(
                projection.unsqueeze(1), h[i], activation=self.activation, return_state=True
            )
            x = state.to(projection.dtype)
            after.append(state)
        last = torch.stack(after).to(h.dtype)  # in memory of its own, and no view
        return (x, last) if batched else (x.squeeze(0), last.squeeze(1))


class MinGRU(MinRNNBase):
    r"""minGRU layers with the constructor and the ``forward`` of :class:`torch.nn.GRU`.

    .. math:: h_t = (1 - z_t) h_{t-1} + z_t \phi(c_t), \quad
        z_t = \sigma(W_z x_t + b_z), \; c_t = W_c x_t + b_c

    Gate and candidate come from one linear layer and are fused with the scan over time.

    Args:
        input_size: features of the input.
        hidden_size: channels H of the state.
        num_layers: layers on top of each other.
        bias: whether the linear layers add one.
        batch_first: input and output are (B, T, F) instead of (T, B, F).
        dropout: probability in [0, 1], on the output of each layer but the last.
        bidirectional: a second direction from the end to the start; outputs side by side.
        proj_size: 0; there for its place.
        device, dtype: of the parameters: float32, float64, bfloat16 or float16.
        activation: ``"g"``, the paper's log-space form, phi(x) = x + 1/2 for x >= 0 and sigma(x)
            otherwise; or ``"identity"``, its vanilla form.
        forget_bias: how much smaller b_z starts, so that states are kept longer.
        learnable_h0: whether initial states are parameters, which start at 0.
        chunk: steps that are projected and scanned at a time, for training on long sequences: then
            only input, output and their gradients have the length of time, and backward computes
            projections again. 512 to 1,024 steps over the batch stay in cache. None: all at once,
            as in any case for shards of time, DTensors, weights of a type of their own, the
            reference backend, export and traces, torch.func, forward mode, second derivatives.

    Parameters: ``weight_ih_l{k}`` (2 H, features), ``bias_ih_l{k}`` (2 H,), W_z and b_z first, and
    with ``learnable_h0`` ``h0_l{k}`` (H,); ``..._reverse`` of the second direction. They start as
    those of nn.Linear.

    Raises:
        TypeError, ValueError, RuntimeError: as :class:`torch.nn.GRU`: RuntimeError for an input or
            a state of the wrong size.

    Source: Feng et al. 2024, "Were RNNs All We Needed?", section 3.1 and its appendix.

    >>> import torch, msrnn_ops as ms
    >>> rnn = ms.nn.MinGRU(10, 20, num_layers=2, batch_first=True)
    >>> output, h_n = rnn(torch.randn(3, 5, 10))
    >>> output.shape, h_n.shape
    (torch.Size([3, 5, 20]), torch.Size([2, 3, 20]))
    """

    _parts, _keeps, _op = 2, -1, MIN_GRU_JOINT
    _joint = staticmethod(min_gru_joint)

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, **steps: Unpack[Steps]
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]: ...
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        resets: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Runs over a sequence.

        Args:
            input: (T, B, F), with ``batch_first`` (B, T, F), without a batch (T, F); or a
                PackedSequence, or a nested tensor (B, ``*``, F) with layout torch.jagged.
            hx: initial states, (layers x directions, B, H), without a batch (layers x directions,
                H); in linear space. None: 0, or what was learnt with ``learnable_h0``.
            cu_seqlens: (N+1,), the borders of sequences packed along time (B = 1), as in
                :func:`msrnn_ops.linear_scan`; states are (layers x directions, N, H).
            resets: bool, (T, B), with ``batch_first`` (B, T), without a batch (T,): where it is
                set, no state crosses the border before that step, and the step starts from 0.
            valid: bool, likewise: which steps are real. The state passes by the others as if they
                were not there, and their outputs and gradients are 0.

        Returns:
            The last layer's states, (T, B, directions x H), in the layout of the input; and h_n,
            every layer's last state, in the shape and dtype of ``hx``. In 16 bit a float32 ``hx``
            carries a sequence on without rounding.
        """
        return self._forward(input, hx, cu_seqlens, resets, valid)

    def step(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One token, as ``forward`` of a sequence of one.

        Args:
            input: (B, F) or (F,).
            hx: what ``forward`` or ``step`` returned. None: 0.

        >>> import torch, msrnn_ops as ms
        >>> rnn = ms.nn.MinGRU(10, 20)
        >>> output, h = rnn.step(torch.randn(3, 10))
        >>> output, h = rnn.step(torch.randn(3, 10), h)
        """
        return self._step(input, hx)


class MinLSTM(MinRNNBase):
    r"""minLSTM layers with the constructor and the ``forward`` of :class:`torch.nn.LSTM`.

    .. math:: h_t = \frac{f_t}{f_t + i_t} h_{t-1} + \frac{i_t}{f_t + i_t} \phi(c_t), \quad
        f_t, i_t = \sigma(W_f x_t + b_f), \sigma(W_i x_t + b_i), \; c_t = W_c x_t + b_c

    It has one state: where nn.LSTM returns (h, c) it returns that state twice; given a pair, it
    reads the first, and no gradient flows to the second.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first: as :class:`MinGRU`.
        dropout, bidirectional, proj_size, device, dtype, activation: as :class:`MinGRU`.
        forget_bias: how much larger b_f starts, so that states are kept longer.
        learnable_h0, chunk: as :class:`MinGRU`.

    Parameters: ``weight_ih_l{k}`` (3 H, features), ``bias_ih_l{k}`` (3 H,): W_f, W_i, W_c; and with
    ``learnable_h0`` ``h0_l{k}`` (H,).

    Raises:
        TypeError, ValueError: as :class:`MinGRU`.

    Source: Feng et al. 2024, "Were RNNs All We Needed?", section 3.2 and its appendix.

    >>> import torch, msrnn_ops as ms
    >>> rnn = ms.nn.MinLSTM(10, 20, bidirectional=True)
    >>> output, (h_n, c_n) = rnn(torch.randn(5, 3, 10))
    >>> output.shape, h_n.shape
    (torch.Size([5, 3, 40]), torch.Size([2, 3, 20]))
    """

    _parts, _keeps, _op = 3, 1, MIN_LSTM_JOINT
    _joint = staticmethod(min_lstm_joint)

    def _state(self, hx: Tensor | _Pair | None) -> Tensor | None:
        if not isinstance(hx, tuple | list):
            return hx
        if len(hx) != 2 or not all(isinstance(x, Tensor) for x in hx):
            got = ", ".join(type(x).__name__ for x in hx) or "nothing"
            raise TypeError(
                f"{type(self).__name__}: expected hx to be a tensor or a pair of tensors, got a "
                f"{type(hx).__name__} of {got}"
            )
        if hx[0].shape != hx[1].shape:
            raise ValueError(
                f"{type(self).__name__}: expected both tensors of hx in one shape, got "
                f"{tuple(hx[0].shape)} and {tuple(hx[1].shape)}"
            )
        return hx[0]

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | _Pair | None = None, **steps: Unpack[Steps]
    ) -> tuple[Tensor, _Pair]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | _Pair | None = None
    ) -> tuple[PackedSequence, _Pair]: ...
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | _Pair | None = None,
        cu_seqlens: Tensor | None = None,
        resets: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, _Pair]:
        """Runs over a sequence: as :meth:`MinGRU.forward`, but for the form of the state.

        Args:
            input, cu_seqlens, resets, valid: as there.
            hx: (h_0, c_0), of which h_0 is used, or h_0. None: 0, or what was learnt.

        Returns:
            The output and (h_n, h_n).
        """
        output, last = self._forward(input, self._state(hx), cu_seqlens, resets, valid)
        return output, (last, last.clone())

    def step(self, input: Tensor, hx: Tensor | _Pair | None = None) -> tuple[Tensor, _Pair]:
        """One token, as ``forward`` of a sequence of one: (output, (h, h))."""
        output, last = self._step(input, self._state(hx))
        return output, (last, last.clone())


class BlockState(NamedTuple):
    """What a :class:`MinRNNBlock` remembers."""

    h: Tensor  # (B, inner width), of the recurrence
    inputs: Tensor  # (B, conv - 1, width), the last ones of the convolution


_WithState: TypeAlias = tuple[Tensor, BlockState]
_Sequence: TypeAlias = Tensor | PackedSequence


class MinRNNBlock(nn.Module):
    """A residual block: norm, causal convolution, minGRU or minLSTM, then norm and MLP.

    ``x = x + out(rnn(conv(norm(x))))``, then ``x = x + mlp(norm(x))``; layers of the paper's
    language models.

    Args:
        width: features D of input and output.
        cell: ``"gru"`` or ``"lstm"``.
        expansion: the recurrence has round(expansion x width) channels.
        conv: steps that the depthwise causal convolution sees; 0: none.
        mlp: the MLP has round(mlp x width) hidden units; 0: none.
        dropout: probability, on what is added to the residual stream.
        device, dtype, activation, forget_bias, chunk: as :class:`MinGRU`.

    Raises:
        TypeError, ValueError: an argument out of range, a wrong shape.

    Source: Feng et al. 2024, "Were RNNs All We Needed?", its appendix on architectures.

    >>> import torch, msrnn_ops as ms
    >>> block = ms.nn.MinRNNBlock(16)
    >>> x = torch.randn(2, 7, 16)
    >>> y, state = block(x[:, :6], return_state=True)
    >>> last, state = block.step(x[:, 6], state)
    >>> torch.allclose(last, block(x)[:, 6], atol=1e-5)
    True
    """

    time_axis = WholeTime()

    def __init__(
        self,
        width: int,
        *,
        cell: str = "gru",
        expansion: float = 1.0,
        conv: int = 4,
        mlp: float = 4.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation: str = "g",
        forget_bias: float = 0.0,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        name = "MinRNNBlock"
        if cell not in tuple(_CELLS):
            raise errors.value(name, "cell 'gru' or 'lstm'", repr(cell))
        errors.check_int(name, "width", width, 1)
        errors.check_int(name, "conv", conv, 0)
        errors.check_number(name, "expansion", expansion, 0)
        errors.check_number(name, "mlp", mlp, 0)
        _check_options(name, dropout, activation, forget_bias, dtype)
        inner, hidden = round(expansion * width), round(mlp * width)
        if inner < 1:
            expected = f"expansion that leaves a channel, round(expansion x {width}) >= 1"
            raise errors.value(name, expected, expansion)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.width = width
        self.norm = nn.RMSNorm(width, **made)
        self.conv = nn.Conv1d(width, width, conv, groups=width, **made) if conv else None
        self.rnn = _CELLS[cell](
            width, inner, batch_first=True, activation=activation, forget_bias=forget_bias,
            chunk=chunk, **made,
        )  # fmt: skip
        self.out = nn.Linear(inner, width, **made)
        self.dropout = nn.Dropout(dropout)
        self.mlp: nn.Module | None = None
        if hidden:
            self.mlp = nn.Sequential(
                nn.RMSNorm(width, **made),
                nn.Linear(width, hidden, **made),
                nn.GELU(),
                nn.Linear(hidden, width, **made),
            )

    # fmt: off
    @overload
    def forward(self, x: Tensor, state: BlockState | None = ...,
            return_state: Literal[False] = ..., **steps: Unpack[Steps]) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, state: BlockState | None = ..., *,
            return_state: Literal[True], **steps: Unpack[Steps]) -> _WithState: ...
    @overload
    def forward(self, x: Tensor, state: BlockState | None,
            return_state: Literal[True], **steps: Unpack[Steps]) -> _WithState: ...
    @overload
    def forward(self, x: Tensor, state: BlockState | None = ...,
            return_state: bool = ..., **steps: Unpack[Steps]) -> Tensor | _WithState: ...
    @overload
    def forward(self, x: PackedSequence, state: BlockState | None = ...,
            return_state: Literal[False] = ...) -> PackedSequence: ...
    @overload
    def forward(self, x: PackedSequence, state: BlockState | None = ..., *,
            return_state: Literal[True]) -> tuple[PackedSequence, BlockState]: ...
    # fmt: on
    def forward(
        self,
        x: Tensor | PackedSequence,
        state: BlockState | None = None,
        return_state: bool = False,
        *,
        cu_seqlens: Tensor | None = None,
        resets: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> _Sequence | tuple[_Sequence, BlockState | None]:
        """Runs over a sequence.

        Args:
            x: (B, T, D); or a PackedSequence, or a nested tensor (B, ``*``, D) with layout
                torch.jagged.
            state: what an earlier call returned; its h is float32 in 16-bit models. None: 0.
            return_state: also return the state after the last real step.
            cu_seqlens: (N+1,), the borders of sequences packed along time (B = 1), as in
                :func:`msrnn_ops.linear_scan`; the state has N rows.
            resets: (B, T) bool: where it is set, neither the recurrence nor the convolution sees
                what lies before that step. Not with cu_seqlens.
            valid: (B, T) bool: which steps are real. The others are as if they were not there, and
                their outputs and gradients are 0. Not with cu_seqlens.
        """
        name = "MinRNNBlock"
        if not isinstance(return_state, bool):
            raise errors.kind(name, "return_state", "a bool", return_state)
        if isinstance(x, PackedSequence):
            check_alone(name, "a PackedSequence", self.time_axis, cu_seqlens, resets, valid)
            return self._forward_packed(x, state, return_state)
        if isinstance(x, Tensor) and x.is_nested:
            check_alone(name, "a nested tensor", self.time_axis, cu_seqlens, resets, valid)
            values, offsets = jagged(name, x)
            self._check_rows(values)
            y, after = self._attempt(values.unsqueeze(0), state, return_state, offsets)
            y = torch.nested.nested_tensor_from_jagged(y.squeeze(0), offsets)
            return (y, after) if return_state else y
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != self.width:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected x of shape (B, T, {self.width}), got {got}")
        check_steps(name, x, cu_seqlens, resets, valid, 1)
        if cu_seqlens is not None and resets is not None:
            raise ValueError(f"{name}: expected resets or cu_seqlens, got both")
        real = real_steps(x, cu_seqlens, valid, self.time_axis)
        y, after = self._attempt(x, state, return_state, cu_seqlens, resets, valid, real)
        return (y, after) if return_state else y

    def _forward_packed(
        self, packed: PackedSequence, state: BlockState | None, return_state: bool
    ) -> PackedSequence | tuple[PackedSequence, BlockState | None]:
        data, sizes, order, original = packed
        self._check_rows(data)
        cu_seqlens, rows, back = packing(sizes, data.device)
        if state is not None and order is not None:
            self._check_state(state, int(sizes[0]))
            state = BlockState(*(part.index_select(0, order) for part in state))
        y, after = self._attempt(
            data.index_select(0, rows).unsqueeze(0), state, return_state, cu_seqlens
        )
        packed = PackedSequence(y.squeeze(0).index_select(0, back), sizes, order, original)
        if after is not None and original is not None:
            after = BlockState(*(part.index_select(0, original) for part in after))
        return (packed, after) if return_state else packed

    def _check_rows(self, rows: Tensor) -> None:
        if rows.dim() != 2 or rows.shape[1] != self.width:
            raise errors.shape("MinRNNBlock", "x", f"(rows, {self.width})", rows)

    def _attempt(
        self,
        x: Tensor,
        state: BlockState | None,
        return_state: bool,
        *steps: Tensor | None,
    ) -> tuple[Tensor, BlockState | None]:
        """What ``_run`` of the same arguments returns, or an error in the block's own words.

        What is wrong is looked for afterwards: until a part of the block is called, its weights may
        be elsewhere or in another dtype, as with offloading or ``fully_shard``.
        """
        try:
            return self._run(x, state, return_state, *steps)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            self._blame(x, state)
            cu_seqlens, resets, valid = (*steps, None, None, None)[:3]
            blame_steps("MinRNNBlock", x, cu_seqlens, resets, valid, self.time_axis)
            raise

    def _blame(self, x: Tensor, state: BlockState | None) -> None:
        """After a run failed: raises if the reason lies in x or the state."""
        name, weight = "MinRNNBlock", self.out.weight
        if x.layout != torch.strided:
            raise errors.layout(name, "x", x)
        if x.device != weight.device:
            raise errors.device(name, "x", "its weights", weight.device, x.device)
        if x.dtype != weight.dtype and not _castable(x, weight):
            expected = f"x in {weight.dtype}, the dtype of its weights"
            raise errors.value(name, expected, x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        of_h, of_inputs = {x.dtype, wide}, {x.dtype}
        if autocast_enabled(x.device.type):
            of_h, of_inputs = {*of_h, *DTYPES}, {*of_inputs, *_CAST}
        for part, dtypes in (("h", of_h), ("inputs", of_inputs)):
            value = getattr(state, part, None)
            if not isinstance(value, Tensor):
                continue
            argument = f"state.{part}"
            if value.layout != torch.strided:
                raise errors.layout(name, argument, value)
            if value.device != x.device:
                raise errors.device(name, argument, "x", x.device, value.device)
            if value.dtype not in dtypes:
                either = " or ".join(sorted(map(str, dtypes)))
                raise errors.dtype(name, argument, either, value.dtype)

    def _run(
        self,
        x: Tensor,
        state: BlockState | None,
        return_state: bool,
        cu_seqlens: Tensor | None = None,
        resets: Tensor | None = None,
        valid: Tensor | None = None,
        real: Tensor | None = None,
    ) -> tuple[Tensor, BlockState | None]:
        """The block over x (B, T, D), of which some steps are ``real``; the state if wanted."""
        rows = sequences_of(x, cu_seqlens)
        if state is not None:
            self._check_state(state, rows)
        if real is not None:  # whatever lies there, times a gradient of 0, must be 0
            x = torch.where(real, x, 0.0)
        if resets is not None and valid is not None:  # a step that is not there resets nothing
            resets = resets & valid
        y = self.norm(x)
        inputs = y.new_zeros(rows, 0, self.width)
        if self.conv is not None:
            before = self.conv.kernel_size[0] - 1
            first = y.new_zeros(rows, before, self.width) if state is None else state.inputs
            y, inputs = self.time_axis.convolve(self.conv, first, y, cu_seqlens, resets, valid)
        h0 = None if state is None else state.h.unsqueeze(0)
        if h0 is None and return_state:
            wide = torch.promote_types(y.dtype, torch.float32)
            h0 = y.new_zeros(1, rows, self.rnn.hidden_size, dtype=wide)
        y, last = self.rnn(y, h0, cu_seqlens=cu_seqlens, resets=resets, valid=valid)
        x = x + self.dropout(self.out(y))
        if self.mlp is not None:
            x = x + self.dropout(self.mlp(x))
        if real is not None:
            x = torch.where(real, x, 0.0)
        if not return_state:
            return x, None
        last = last[0] if isinstance(last, tuple) else last
        return x, BlockState(last.squeeze(0), inputs.clone())  # not a view of all inputs

    def _check_state(self, state: BlockState, batch: int) -> None:
        steps = 0 if self.conv is None else self.conv.kernel_size[0] - 1
        if not isinstance(state, BlockState):
            raise errors.kind("MinRNNBlock", "state", "a BlockState", state)
        if not isinstance(state.h, Tensor):
            raise errors.kind("MinRNNBlock", "state.h", "a tensor", state.h)
        if not isinstance(state.inputs, Tensor):
            raise errors.kind("MinRNNBlock", "state.inputs", "a tensor", state.inputs)
        expected = ((batch, self.rnn.hidden_size), (batch, steps, self.width))
        got = tuple(tuple(x.shape) for x in state)
        if got != expected:
            raise ValueError(
                f"MinRNNBlock: expected a state of shapes {expected[0]} and {expected[1]}, got "
                f"{got[0]} and {got[1]}"
            )

    def step(self, x: Tensor, state: BlockState | None = None) -> tuple[Tensor, BlockState]:
        """One token x (B, D): y (B, D) and the state after it."""
        if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[-1] != self.width:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"MinRNNBlock: expected x of shape (B, {self.width}), got {got}")
        _check_whole(self)
        y, after = self._attempt(x.unsqueeze(1), state, True)
        assert after is not None
        return y.squeeze(1), after


_CELLS: dict[str, type[MinGRU] | type[MinLSTM]] = {"gru": MinGRU, "lstm": MinLSTM}


def load_mingru_pytorch(
    state_dict: Mapping[str, Tensor], prefix: str = ""
) -> tuple[MinGRU | MinLSTM, nn.Linear | nn.Identity]:
    """A layer with the weights of a minGRU or minLSTM of the package minGRU-pytorch.

    That package keeps ``to_hidden_and_gate`` or ``to_hidden_and_f_i_gate``, candidate first, and,
    where it widens its state, a projection ``to_out``.

    Args:
        state_dict: of that module, or of a model that holds it.
        prefix: of the module's names in it, such as ``"layers.0.2."``.

    Returns:
        The layer, ``batch_first``, and what follows its output. ``out(layer(x)[0])`` equals their
        module's output. (Their minLSTM starts from g(h) in parallel and from h in a step; ours
        always from h.)

    Raises:
        ValueError: the names or shapes are not those of such a module.

    >>> import torch, msrnn_ops as ms
    >>> theirs = {"to_hidden_and_gate.weight": torch.randn(2 * 24, 16),
    ...           "to_out.weight": torch.randn(16, 24)}
    >>> layer, out = ms.nn.load_mingru_pytorch(theirs)
    >>> out(layer(torch.randn(1, 5, 16))[0]).shape
    torch.Size([1, 5, 16])
    """
    kinds: dict[str, type[MinGRU] | type[MinLSTM]] = {
        "to_hidden_and_gate.weight": MinGRU,
        "to_hidden_and_f_i_gate.weight": MinLSTM,
    }
    found = [name for name in kinds if prefix + name in state_dict]
    if len(found) != 1:
        raise ValueError(
            f"load_mingru_pytorch: expected one of {', '.join(prefix + name for name in kinds)}, "
            f"got {', '.join(state_dict) or 'nothing'}"
        )
    kind, weight = kinds[found[0]], state_dict[prefix + found[0]]
    if weight.dim() != 2 or weight.shape[0] % kind._parts:
        raise ValueError(
            f"load_mingru_pytorch: expected {prefix + found[0]} of shape ({kind._parts} H, D), got "
            f"{tuple(weight.shape)}"
        )
    biases = {found[0].replace(".weight", ".bias"), "to_out.bias"}
    if more := [prefix + name for name in sorted(biases) if prefix + name in state_dict]:
        raise ValueError(f"load_mingru_pytorch: expected no biases, got {', '.join(more)}")
    hidden = weight.shape[0] // kind._parts
    made: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    layer = kind(weight.shape[1], hidden, bias=False, batch_first=True, **made)
    candidate, *gates = weight.chunk(kind._parts)
    layer.load_state_dict({"weight_ih_l0": torch.cat([*gates, candidate])})
    if f"{prefix}to_out.weight" not in state_dict:
        return layer, nn.Identity()
    back = state_dict[f"{prefix}to_out.weight"]
    if back.dim() != 2 or back.shape[1] != hidden:
        raise ValueError(
            f"load_mingru_pytorch: expected {prefix}to_out.weight of shape (D, {hidden}), got "
            f"{tuple(back.shape)}"
        )
    out = nn.Linear(hidden, back.shape[0], bias=False, **made)
    out.load_state_dict({"weight": back})
    return layer, out
