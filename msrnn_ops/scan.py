"""The scans: public function, checks, fake, autograd and transforms of each op.

``_Op`` describes an operator of csrc/ops.cpp; ``_define`` registers the rest of it. The derivative
of every recurrence h_t = a_t h_{t-1} + b_t has one shape. With the adjoint

    s_t = grad_t + a_{t+1} s_{t+1}

(itself a scan, backwards) input i has the gradient s_t * factor_i, where factor_i is the derivative
of h_t in input i with h_{t-1} held fixed; and a tangent runs forward as

    dh_t = a_t dh_{t-1} + sum_i factor_i dx_i.

The kernels compute the first in one fused pass. ``derivatives`` of an op returns a and the factors
as plain PyTorch, which gives second derivatives, forward mode and torch.func.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from msrnn_ops import backend, reference

_libraries = backend.load_libraries()

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ACTIVATIONS = ("g", "identity")


@dataclass(frozen=True)
class _Op:
    name: str
    inputs: tuple[str, ...]
    # (inputs, h_{t-1}, *flags) -> (a_t, factors), differentiable.
    derivatives: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    step: Callable[..., Tensor]  # of reference.py
    parts: int = 1  # of a joint op: inputs side by side in one tensor
    flags: int = 0  # arguments after `reverse`
    saved: int | None = None  # leading inputs that backward reads; None: all
    start: float = 0.0  # the state where h0 is None


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# Derivatives, in the accumulation dtype.


def _linear_derivatives(x: Sequence[Tensor], before: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return x[0], (before, torch.ones_like(before))


def _decay_derivatives(x: Sequence[Tensor], before: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    a = x[0].exp()
    return a, (a * before, torch.ones_like(before))


def _log_derivatives(x: Sequence[Tensor], before: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    from_state = x[0] + before
    dead = (from_state == -torch.inf) & (x[1] == -torch.inf)
    distance = torch.where(dead, 0.0, from_state) - torch.where(dead, 0.0, x[1])
    p = torch.where(dead, 0.0, torch.sigmoid(distance))
    q = torch.where(dead, 0.0, torch.sigmoid(-distance))
    return p, (p, q)


def _activation(x: Tensor, identity: bool) -> tuple[Tensor, Tensor]:
    if identity:
        return x, torch.ones_like(x)
    s = torch.sigmoid(x)
    return torch.where(x >= 0, x + 0.5, s), torch.where(x >= 0, 1.0, s * torch.sigmoid(-x))


def _gru_derivatives(
    x: Sequence[Tensor], before: Tensor, identity: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    a, z = torch.sigmoid(-x[0]), torch.sigmoid(x[0])
    value, slope = _activation(x[1], identity)
    return a, (a * z * (value - before), z * slope)


def _lstm_derivatives(
    x: Sequence[Tensor], before: Tensor, identity: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    forget, input, candidate = x
    distance = torch.nn.functional.softplus(-forget) - torch.nn.functional.softplus(-input)
    a, z = torch.sigmoid(-distance), torch.sigmoid(distance)
    value, slope = _activation(candidate, identity)
    common = a * z * (before - value)
    return a, (common * torch.sigmoid(-forget), -common * torch.sigmoid(-input), z * slope)


def _sequences(time: int, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    if cu_seqlens is None:
        return [(0, time)]
    ends = cu_seqlens.tolist()
    return list(itertools.pairwise(ends))


def _per_sequence(state: Tensor, cu_seqlens: Tensor | None) -> Sequence[Tensor]:
    """A state (B, D), or (N, D) with cu_seqlens, as one (rows, 1, D) tensor a sequence."""
    return [state.unsqueeze(1)] if cu_seqlens is None else state.unsqueeze(1).split(1)


def _shift(
    x: Tensor, entering: Sequence[Tensor], sequences: list[tuple[int, int]], reverse: bool
) -> Tensor:
    """The value of the step before, within each sequence; `entering` before its first step."""
    pieces = []
    for (start, end), edge in zip(sequences, entering, strict=True):
        if end > start:
            pieces += [x[:, start + 1 : end], edge] if reverse else [edge, x[:, start : end - 1]]
    return torch.cat(pieces, 1) if pieces else x


def _wide(x: Tensor) -> Tensor:
    return x.to(_accumulation_dtype(x.dtype))


@dataclass
class _Call:
    """The arguments of an op that are not differentiated."""

    op: _Op
    namespace: str
    cu_seqlens: Tensor | None
    reverse: bool
    flags: tuple[bool, ...]

    def local(
        self, inputs: Sequence[Tensor], h: Tensor, h0: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """a and the factors of every step (see the head of this file)."""
        if self.op.parts > 1:
            inputs = inputs[0].chunk(self.op.parts, -1)
        h = _wide(h)
        if h0 is None:
            count = h.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
            h0 = h.new_full((count, h.shape[2]), self.op.start)
        sequences = _sequences(h.shape[1], self.cu_seqlens)
        before = _shift(h, _per_sequence(h0, self.cu_seqlens), sequences, self.reverse)
        return self.op.derivatives([_wide(x) for x in inputs], before, *self.flags)

    def backward(
        self,
        grad_h: Tensor | None,
        grad_last: Tensor | None,
        inputs: Sequence[Tensor],
        h: Tensor,
        h0: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """What the backward kernel computes, from operations that are differentiable again."""
        a, factors = self.local(inputs, h, h0)
        sequences = _sequences(h.shape[1], self.cu_seqlens)
        grad = torch.zeros_like(a) if grad_h is None else _wide(grad_h)
        if grad_last is None:
            count = h.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
            grad_last = a.new_zeros(count, h.shape[2])
        entering = _per_sequence(torch.ones_like(grad_last), self.cu_seqlens)
        later = _shift(a, entering, sequences, not self.reverse)
        scan = _calls[self.namespace]["linear_scan"]
        s, _ = scan(later, grad, grad_last, self.cu_seqlens, not self.reverse)
        carried = a * s
        last = _per_sequence(grad_last, self.cu_seqlens)
        grad_h0 = [
            carried[:, end - 1 if self.reverse else start] if end > start else last[n][:, 0]
            for n, (start, end) in enumerate(sequences)
        ]
        grads = tuple((s * factor).to(h.dtype) for factor in factors)
        if self.op.parts > 1:
            grads = (torch.cat(grads, -1),)
        return *grads, torch.cat(grad_h0)

    def tangent(
        self,
        tangents: Sequence[Tensor | None],
        tangent_h0: Tensor | None,
        inputs: Sequence[Tensor],
        h: Tensor,
        h0: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        a, factors = self.local(inputs, h, h0)
        if self.op.parts > 1 and tangents[0] is not None:
            tangents = tangents[0].chunk(self.op.parts, -1)
        b = torch.zeros_like(a)
        for factor, tangent in zip(factors, tangents, strict=False):
            if tangent is not None:
                b = b + factor * tangent
        scan = _calls[self.namespace]["linear_scan"]
        dh, last = scan(a, b, tangent_h0, self.cu_seqlens, self.reverse)
        return dh.to(h.dtype), last


def _define(op: _Op, namespace: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Registers fake and autograd of an op; returns what the public functions call.

    The returned function takes the op's own arguments: inputs, h0, cu_seqlens, reverse, flags.
    """
    forward_op = getattr(getattr(torch.ops, namespace), op.name).default
    backward_op = getattr(getattr(torch.ops, namespace), f"{op.name}_backward").default
    n = len(op.inputs)
    kept = n if op.saved is None else op.saved

    def fake(*args: Any) -> tuple[Tensor, Tensor]:
        x, cu_seqlens = args[0], args[n + 1]
        batch, time, channels = x.shape[0], x.shape[1], x.shape[2] // op.parts
        count = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        last = x.new_empty((count, channels), dtype=_accumulation_dtype(x.dtype))
        return x.new_empty((batch, time, channels)), last

    def fake_backward(grad_h: Tensor | None, grad_last: Tensor | None, *args: Any) -> Any:
        h, cu_seqlens = args[kept], args[kept + 2]
        count = h.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        grad_h0 = h.new_empty((count, h.shape[2]), dtype=_accumulation_dtype(h.dtype))
        return *(args[0].new_empty(args[0].shape) for _ in range(n)), grad_h0

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        h0, cu_seqlens, reverse, *flags = inputs[n:]
        tensors = (*inputs[:kept], output[0], h0, cu_seqlens)
        ctx.save_for_backward(*tensors)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*tensors)
        ctx.call = (reverse, tuple(flags))
        ctx.set_materialize_grads(False)

    def saved(ctx: Any) -> tuple[_Call, Sequence[Tensor], Tensor, Tensor | None]:
        *inputs, h, h0, cu_seqlens = ctx.saved_tensors
        reverse, flags = ctx.call
        return _Call(op, namespace, cu_seqlens, reverse, flags), inputs, h, h0

    def backward(ctx: Any, grad_h: Tensor | None, grad_last: Tensor | None) -> Any:
        call, inputs, h, h0 = saved(ctx)
        none = (None,) * (2 + op.flags)
        if grad_h is None and grad_last is None:
            return (None,) * (n + 1) + none
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = call.backward(grad_h, grad_last, inputs, h, h0)
        else:
            grads = backward_op(
                grad_h, grad_last, *inputs, h, h0, call.cu_seqlens, call.reverse, *call.flags
            )
        return (*grads[:-1], grads[-1] if h0 is not None else None, *none)

    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        call, inputs, h, h0 = saved(ctx)
        return call.tangent(tangents[:n], tangents[n], inputs, h, h0)

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        if args[n + 1] is not None:
            raise ValueError(f"{op.name}: torch.vmap with cu_seqlens is not supported")
        size = info.batch_size

        def fold(x: Tensor | None, dim: int | None) -> Tensor | None:
            if x is None:
                return None
            x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1)

        folded = [fold(x, dim) for x, dim in zip(args[: n + 1], in_dims, strict=False)]
        h, last = scan_function.apply(*folded, *args[n + 1 :])
        return (h.unflatten(0, (size, -1)), last.unflatten(0, (size, -1))), (0, 0)

    methods = (forward, setup_context, backward, jvp, vmap)
    members = {method.__name__: staticmethod(method) for method in methods}
    scan_function = cast(Any, type(f"{op.name}_function", (torch.autograd.Function,), members))

    def autograd_kernel(*args: Any) -> tuple[Tensor, Tensor]:
        needed = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        run = scan_function.apply if needed or forward_ad._current_level >= 0 else forward
        return run(*args)

    torch.library.register_fake(f"{namespace}::{op.name}", fake)
    torch.library.register_fake(f"{namespace}::{op.name}_backward", fake_backward)
    _libraries[namespace].impl(op.name, autograd_kernel, "Autograd")

    def call(*args: Any) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return forward_op(*args)
        if torch._C._are_functorch_transforms_active():
            return scan_function.apply(*args)
        return autograd_kernel(*args)

    return call


_LINEAR = _Op("linear_scan", ("a", "b"), _linear_derivatives, reference.linear_step, saved=1)
_DECAY = _Op("decay_scan", ("log_a", "b"), _decay_derivatives, reference.decay_step, saved=1)
_LOG = _Op("log_scan", ("log_a", "log_b"), _log_derivatives, reference.log_step, start=-torch.inf)
_GRU = _Op("min_gru", ("gate", "candidate"), _gru_derivatives, reference.min_gru_step, flags=1)
_GRU_JOINT = _Op(
    "min_gru_joint", ("projection",), _gru_derivatives, reference.min_gru_step, parts=2, flags=1
)
_LSTM = _Op(
    "min_lstm",
    ("forget", "input", "candidate"),
    _lstm_derivatives,
    reference.min_lstm_step,
    flags=1,
)
_LSTM_JOINT = _Op(
    "min_lstm_joint", ("projection",), _lstm_derivatives, reference.min_lstm_step, parts=3, flags=1
)
_OPS = (_LINEAR, _DECAY, _LOG, _GRU, _GRU_JOINT, _LSTM, _LSTM_JOINT)
backend.implement_by_triton(
    _libraries, "scan", [name for op in _OPS for name in (op.name, f"{op.name}_backward")]
)
_calls = {space: {op.name: _define(op, space) for op in _OPS} for space in _libraries}


def _check_inputs(op: _Op, inputs: tuple[Tensor, ...]) -> None:
    for name, x in zip(op.inputs, inputs, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op.name}: expected {name} to be a tensor, got {type(x).__name__}")
    first, name = inputs[0], op.inputs[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    if len(shape) != 3:
        raise ValueError(
            f"{op.name}: expected {name} of shape (B, T, D), got {tuple(shape)} with "
            f"{len(shape)} dimensions"
        )
    if dtype not in _DTYPES:
        raise TypeError(
            f"{op.name}: expected {name} in float32, float64, bfloat16 or float16, got {dtype}"
        )
    for other, x in zip(op.inputs[1:], inputs[1:], strict=True):
        if x.shape != shape:
            raise ValueError(
                f"{op.name}: expected {other} in the shape of {name}, {tuple(shape)}, "
                f"got {tuple(x.shape)}"
            )
        if x.dtype != dtype:
            raise TypeError(
                f"{op.name}: expected {other} in the dtype of {name}, {dtype}, got {x.dtype}"
            )
        if x.device != device:
            raise ValueError(
                f"{op.name}: expected {other} on the device of {name}, {device}, got {x.device}"
            )
    if op.parts > 1 and shape[2] % op.parts:
        raise ValueError(
            f"{op.name}: expected {name} with a last size divisible by {op.parts}, got {shape[2]}"
        )


def _check_cu_seqlens(op: _Op, x: Tensor, cu_seqlens: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(
            f"{op.name}: expected cu_seqlens to be a tensor, got {type(cu_seqlens).__name__}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op.name}: expected cu_seqlens in int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{op.name}: expected cu_seqlens of shape (N + 1,), got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(
            f"{op.name}: expected cu_seqlens on the device of {op.inputs[0]}, {x.device}, "
            f"got {cu_seqlens.device}"
        )
    if x.shape[0] != 1:
        raise ValueError(
            f"{op.name}: expected B = 1 with cu_seqlens (sequences packed along time), "
            f"got B = {x.shape[0]}"
        )


def _check_cu_values(op: _Op, cu_seqlens: Tensor, time: int) -> None:
    """For plain CPU tensors, whose values are known; elsewhere kernels stay in bounds for any."""
    if torch.compiler.is_compiling() or type(cu_seqlens) is not Tensor or not cu_seqlens.is_cpu:
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"{op.name}: expected cu_seqlens to start at 0, got {ends[0]}")
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        if end < start:
            raise ValueError(
                f"{op.name}: expected cu_seqlens not to decrease, got {start} and then {end} "
                f"at index {i + 1}"
            )
    if ends[-1] != time:
        raise ValueError(f"{op.name}: expected cu_seqlens to end at T = {time}, got {ends[-1]}")


def _check_state(
    op: _Op, x: Tensor, h0: Tensor, count: int, channels: int, any_float: bool
) -> None:
    name = "log_h0" if op is _LOG else "h0"
    if not isinstance(h0, Tensor):
        raise TypeError(f"{op.name}: expected {name} to be a tensor, got {type(h0).__name__}")
    if h0.dim() != 2 or h0.shape[0] != count or h0.shape[1] != channels:
        raise ValueError(
            f"{op.name}: expected {name} of shape ({count}, {channels}), got {tuple(h0.shape)}"
        )
    wide = _accumulation_dtype(x.dtype)
    if h0.dtype not in (_DTYPES if any_float else (x.dtype, wide)):
        either = f"{wide}" if wide == x.dtype else f"{x.dtype} or {wide}"
        raise TypeError(f"{op.name}: expected {name} in {either}, got {h0.dtype}")
    if h0.device != x.device:
        raise ValueError(
            f"{op.name}: expected {name} on the device of {op.inputs[0]}, {x.device}, "
            f"got {h0.device}"
        )


def _identity(op: _Op, activation: str) -> bool:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{op.name}: expected activation 'g' or 'identity', got {activation!r}")
    return activation == "identity"


def _autocast_enabled(x: Tensor) -> bool:
    if not isinstance(x, Tensor):
        return False
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _is_distributed(x: Tensor) -> bool:
    """Whether it is a DTensor, whose module takes long to import."""
    return type(x) not in (Tensor, torch.nn.Parameter) and hasattr(x, "device_mesh")


def _promote(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Under autocast inputs may come in several floating dtypes: the widest is used."""
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in inputs):
        return inputs  # the checks say what is wrong
    dtype = inputs[0].dtype
    for x in inputs[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) for x in inputs)


def _checked(
    op: _Op, inputs: tuple[Tensor, ...], h0: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The inputs in one dtype and h0 in the accumulation dtype."""
    autocast = _autocast_enabled(inputs[0])
    if autocast:
        inputs = _promote(inputs)
    _check_inputs(op, inputs)
    x = inputs[0]
    if cu_seqlens is not None:
        _check_cu_seqlens(op, x, cu_seqlens)
    if h0 is not None:
        count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _check_state(op, x, h0, count, x.shape[2] // op.parts, autocast)
        h0 = h0.to(_accumulation_dtype(x.dtype))
    return inputs, h0


def _run(
    op: _Op,
    inputs: tuple[Tensor, ...],
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    return_state: bool,
    activation: str | None = None,
) -> Any:
    """Checks the arguments, chooses the backend and runs."""
    flags = () if activation is None else (_identity(op, activation),)
    inputs, h0 = _checked(op, inputs, h0, cu_seqlens)
    x = inputs[0]
    if cu_seqlens is not None:
        _check_cu_values(op, cu_seqlens, x.shape[1])
    args: tuple[Any, ...] = (*inputs, h0, cu_seqlens, reverse, *flags)
    if _is_distributed(x):
        from msrnn_ops.distributed import sharding

        args = sharding.arguments(op.name, args)
    namespace = backend.namespace(op.name, x.device)
    if namespace is None:
        step = op.step if activation is None else partial(op.step, activation=activation)
        parts = inputs if op.parts == 1 else x.chunk(op.parts, -1)
        h, last = reference.scan(
            step, parts, h0, start=op.start, reverse=reverse, cu_seqlens=cu_seqlens
        )
    else:
        h, last = _calls[namespace][op.name](*args)
    return (h, last) if return_state else h


def linear_scan(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
) -> Any:
    """First-order linear recurrence over time, elementwise over channels.

    .. math:: h_t = a_t h_{t-1} + b_t

    Args:
        a: decay, (B, T, D), any strides; float32, float64, bfloat16 or float16. Any value; where
            |a| > 1 long products may leave the range of floats.
        b: input, in the shape and dtype of ``a``.
        h0: initial state, (B, D), or (N, D) with ``cu_seqlens``; in the dtype of ``a`` or the
            accumulation dtype (float32; float64 for float64). None: 0.
        reverse: run from t = T-1 to 0; ``h0`` enters at T-1 and the last state is that at 0.
        cu_seqlens: (N+1,) int32 or int64, from 0 to T, not decreasing; B = 1. Sequence n is
            ``[cu_seqlens[n], cu_seqlens[n+1])``; sequences may be empty.
        return_state: also return the last state.

    Returns:
        h, (B, T, D) in the dtype of ``a``; with ``return_state`` also the last state, (B, D) or
        (N, D), in the accumulation dtype, a copy of ``h0`` for an empty sequence.

    Raises:
        TypeError: not a tensor, or a wrong dtype. ValueError: a wrong shape, device or cu_seqlens.

    Differentiable in a, b and h0, through h and the last state.

    Source: Martin and Cundy 2018, "Parallelizing Linear Recurrent Neural Nets Over Sequence
    Length", the linear surrogate recurrence.

    >>> import torch, msrnn_ops as ms
    >>> ms.linear_scan(torch.full((1, 4, 1), 0.5), torch.ones(1, 4, 1)).flatten()
    tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    return _run(_LINEAR, (a, b), h0, cu_seqlens, reverse, return_state)


def decay_scan(
    log_a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
) -> Any:
    r"""Linear recurrence with its decay given as a logarithm, its input signed.

    .. math:: h_t = e^{\mathrm{log\_a}_t} h_{t-1} + b_t

    Slow decays keep their precision: 1 - exp(log_a) is formed without cancellation.

    Args:
        log_a: natural logarithm of the decay, (B, T, D), usually <= 0; -inf forgets everything.
        b: input, in the shape and dtype of ``log_a``.
        h0, reverse, cu_seqlens, return_state: as in :func:`linear_scan`.

    Returns:
        As :func:`linear_scan`.

    Raises:
        TypeError, ValueError: as :func:`linear_scan`.

    Source: the gate of HGRN, Qin et al. 2023, "Hierarchically Gated Recurrent Neural Network for
    Sequence Modeling", its recurrence with the decay in log-space.

    >>> import torch, msrnn_ops as ms
    >>> log_a = torch.full((1, 3, 1), 0.5).log()
    >>> ms.decay_scan(log_a, torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1)).flatten()
    tensor([ 1.0000, -0.5000, -0.2500])
    """
    return _run(_DECAY, (log_a, b), h0, cu_seqlens, reverse, return_state)


def log_scan(
    log_a: Tensor,
    log_b: Tensor,
    log_h0: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
) -> Any:
    r"""The linear recurrence of positive numbers, entirely in log-space.

    .. math:: \log h_t = \log(e^{\mathrm{log\_a}_t + \log h_{t-1}} + e^{\mathrm{log\_b}_t})

    Exact far beyond the range of exp. Where log 0 meets log 0 the result is log 0 and no gradient
    flows.

    Args:
        log_a: logarithm of the decay, (B, T, D); -inf is a decay of 0.
        log_b: logarithm of the input, in the shape and dtype of ``log_a``; -inf is 0.
        log_h0: logarithm of the initial state, (B, D) or (N, D). None: log 0 = -inf.
        reverse, cu_seqlens, return_state: as in :func:`linear_scan`.

    Returns:
        log h, and with ``return_state`` the logarithm of the last state, as :func:`linear_scan`.

    Raises:
        TypeError, ValueError: as :func:`linear_scan`.

    Source: Heinsen 2023, "Efficient Parallelization of a Ubiquitous Sequential Computation";
    computed here by a compensated recurrence instead of two cumulative sums.

    >>> import torch, msrnn_ops as ms
    >>> log_h = ms.log_scan(torch.zeros(1, 4, 1), torch.full((1, 4, 1), 0.25).log())
    >>> log_h[0, -1].exp()
    tensor([1.])
    """
    return _run(_LOG, (log_a, log_b), log_h0, cu_seqlens, reverse, return_state)


def min_gru(
    gate: Tensor,
    candidate: Tensor,
    h0: Tensor | None = None,
    *,
    activation: str = "g",
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
) -> Any:
    r"""minGRU, its gates fused with the scan over time.

    .. math:: h_t = (1 - z_t) h_{t-1} + z_t \phi(c_t), \quad z_t = \sigma(k_t)

    Args:
        gate: pre-activation k of the update gate, (B, T, D), any strides (a chunk of a projection
            is not copied); float32, float64, bfloat16 or float16; any value, +-1e4 is exact.
        candidate: pre-activation c, in the shape and dtype of ``gate``.
        h0: the initial *state*, in linear space, any sign, never a pre-activation; (B, D), or
            (N, D) with ``cu_seqlens``. None: 0.
        activation: ``"g"``, the log-space form's phi(x) = x + 1/2 for x >= 0 and sigma(x)
            otherwise; or ``"identity"``, the vanilla form.
        reverse, cu_seqlens, return_state: as in :func:`linear_scan`.

    Returns:
        h, and with ``return_state`` the last state, as :func:`linear_scan`.

    Raises:
        TypeError, ValueError: as :func:`linear_scan`; ValueError for an unknown activation.

    16-bit inputs are widened; gates and carry are float32. Under autocast it runs in the dtype of
    its inputs, the widest if they differ.

    Source: Feng et al. 2024, "Were RNNs All We Needed?", section 3.1; the log-space form is in
    its appendix.

    >>> import torch, msrnn_ops as ms
    >>> h, last = ms.min_gru(torch.zeros(1, 3, 1), torch.ones(1, 3, 1), return_state=True)
    >>> h.flatten(), last
    (tensor([0.7500, 1.1250, 1.3125]), tensor([[1.3125]]))
    """
    return _run(_GRU, (gate, candidate), h0, cu_seqlens, reverse, return_state, activation)


def min_gru_joint(
    projection: Tensor,
    h0: Tensor | None = None,
    *,
    activation: str = "g",
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
) -> Any:
    """:func:`min_gru` of one projection that holds gate and candidate side by side.

    Equal to ``min_gru(*projection.chunk(2, -1), ...)``; its backward fills one gradient buffer,
    where autograd would concatenate the gradients of two chunks.

    Args:
        projection: (B, T, 2 D), gate first.
        h0, activation, reverse, cu_seqlens, return_state: as in :func:`min_gru`.

    Returns, raises, source: as :func:`min_gru`.

    >>> import torch, msrnn_ops as ms
    >>> ms.min_gru_joint(torch.zeros(1, 2, 6)).shape
    torch.Size([1, 2, 3])
    """
    return _run(_GRU_JOINT, (projection,), h0, cu_seqlens, reverse, return_state, activation)


def min_lstm(
    forget: Tensor,
    input: Tensor,
    candidate: Tensor,
    h0: Tensor | None = None,
    *,
    activation: str = "g",
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
) -> Any:
    r"""minLSTM with its two gates normalised to sum to 1, fused with the scan over time.

    .. math::
        h_t = \frac{f_t}{f_t + i_t} h_{t-1} + \frac{i_t}{f_t + i_t} \phi(c_t),
        \quad f_t = \sigma(\mathrm{forget}_t), \; i_t = \sigma(\mathrm{input}_t)

    Args:
        forget: pre-activation of the forget gate, (B, T, D), as ``gate`` of :func:`min_gru`.
        input: pre-activation of the input gate, in the shape and dtype of ``forget``.
        candidate: pre-activation c, likewise.
        h0, activation, reverse, cu_seqlens, return_state: as in :func:`min_gru`.

    Returns:
        h, and with ``return_state`` the last state, as :func:`linear_scan`.

    Raises:
        TypeError, ValueError: as :func:`min_gru`.

    Source: Feng et al. 2024, "Were RNNs All We Needed?", section 3.2; the log-space form is in
    its appendix.

    >>> import torch, msrnn_ops as ms
    >>> zero, one = torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
    >>> ms.min_lstm(zero, zero, one).flatten()
    tensor([0.7500, 1.1250])
    """
    inputs = (forget, input, candidate)
    return _run(_LSTM, inputs, h0, cu_seqlens, reverse, return_state, activation)


def min_lstm_joint(
    projection: Tensor,
    h0: Tensor | None = None,
    *,
    activation: str = "g",
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
) -> Any:
    """:func:`min_lstm` of one projection that holds forget, input and candidate side by side.

    Equal to ``min_lstm(*projection.chunk(3, -1), ...)``, with one gradient buffer.

    Args:
        projection: (B, T, 3 D), in that order.
        h0, activation, reverse, cu_seqlens, return_state: as in :func:`min_gru`.

    Returns, raises, source: as :func:`min_lstm`.

    >>> import torch, msrnn_ops as ms
    >>> ms.min_lstm_joint(torch.zeros(1, 2, 6)).shape
    torch.Size([1, 2, 2])
    """
    return _run(_LSTM_JOINT, (projection,), h0, cu_seqlens, reverse, return_state, activation)


def _step(op: _Op, inputs: tuple[Tensor, ...], h: Tensor, activation: str) -> Tensor:
    name = f"{op.name}_step"
    for label, x in zip((*op.inputs, "h"), (*inputs, h), strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected {label} to be a tensor, got {type(x).__name__}")
        if x.dim() != 2:
            raise ValueError(f"{name}: expected {label} of shape (B, D), got {tuple(x.shape)}")
    _, last = _run(op, tuple(x.unsqueeze(1) for x in inputs), h, None, False, True, activation)
    return last.to(h.dtype)


def min_gru_step(gate: Tensor, candidate: Tensor, h: Tensor, *, activation: str = "g") -> Tensor:
    """One token of :func:`min_gru`: the state after it, in the dtype of ``h``.

    Args:
        gate, candidate: pre-activations, (B, D), of one dtype.
        h: state before the token, (B, D), in that dtype or the accumulation dtype.
        activation: as in :func:`min_gru`.

    Raises:
        TypeError, ValueError: as :func:`min_gru`.

    Source: Feng et al. 2024, section 3.1, the sequential form.

    >>> import torch, msrnn_ops as ms
    >>> ms.min_gru_step(torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1))
    tensor([[0.7500]])
    """
    return _step(_GRU, (gate, candidate), h, activation)


def min_lstm_step(
    forget: Tensor, input: Tensor, candidate: Tensor, h: Tensor, *, activation: str = "g"
) -> Tensor:
    """One token of :func:`min_lstm`: the state after it, in the dtype of ``h``.

    Args:
        forget, input, candidate: pre-activations, (B, D), of one dtype.
        h: state before the token, (B, D), in that dtype or the accumulation dtype.
        activation: as in :func:`min_gru`.

    Raises:
        TypeError, ValueError: as :func:`min_gru`.

    Source: Feng et al. 2024, section 3.2, the sequential form.

    >>> import torch, msrnn_ops as ms
    >>> zero = torch.zeros(1, 1)
    >>> ms.min_lstm_step(zero, zero, zero + 1, zero)
    tensor([[0.7500]])
    """
    return _step(_LSTM, (forget, input, candidate), h, activation)
