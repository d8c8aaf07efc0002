"""What a call must be before anything is computed or written: one door for each public function.

A door raises what is wrong in the words of the caller, and returns what is needed next: inputs in
one dtype, the scale of the logits, the namespace of the operator (None: the reference computes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msrnn_ops import backend, errors
from msrnn_ops.dtensor import is_distributed
from msrnn_ops.operators.scan import LINEAR, LOG, Recurrence, borders, sequences_of
from msrnn_ops.reference import accumulation_dtype
from msrnn_ops.state import DTYPES, MultiState, Policy, check_head_dim

_ACTIVATIONS = ("g", "identity")
_COMPLEX = (torch.complex64, torch.complex128)


def placed(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an operator that are DTensors, their placements checked."""
    from msrnn_ops.operators import sharding  # DTensor takes long to import

    return sharding.arguments(name, args)


# Scans.


def scan(
    op: Recurrence,
    inputs: tuple[Tensor, ...],
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    resets: Tensor | None,
    reverse: bool,
    return_state: bool,
    activation: str | None,
    caller: str = "",
    state: str = "",
    *,
    whole: bool = True,
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None, tuple[bool, ...], torch.Size | None]:
    """The door of the scans: inputs (B, T, D) in one shape and dtype, h0 in the accumulation dtype,
    resets, the flags, and what the dimensions before T were if they are not B.

    Where the time axis is not ``whole``, other ranks have to be asked before the borders are. The
    caller and the name of its state are those of the op, or of the function that it is called by.
    """
    caller = caller or op.name
    autocast = isinstance(inputs[0], Tensor) and autocast_enabled(inputs[0].device.type)
    if autocast:
        inputs = _promote(inputs)
    leading = None
    if not _check_inputs(caller, op, inputs):
        inputs, h0, resets, leading = _laid_out(caller, op, inputs, h0, cu_seqlens, resets, state)
    first = inputs[0]
    if not (isinstance(reverse, bool) and isinstance(return_state, bool)):
        wrong = return_state if isinstance(reverse, bool) else reverse
        raise errors.kind(caller, "reverse and return_state", "bools", wrong)
    if cu_seqlens is not None:
        _check_cu_seqlens(caller, op, first, cu_seqlens)
        if whole:
            borders(caller, cu_seqlens, first.shape[1])
    if resets is not None:
        _check_resets(caller, op, first, resets)
    if h0 is not None:
        h0 = _checked_state(caller, op, first, h0, cu_seqlens, autocast, state)
    if not op.flags:
        return inputs, h0, resets, (), leading
    if activation not in _ACTIVATIONS:
        raise errors.value(caller, "activation 'g' or 'identity'", repr(activation))
    return inputs, h0, resets, (activation == "identity",), leading


def scan_step(
    caller: str, op: Recurrence, inputs: tuple[Tensor, ...], h: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The door of one token: as a scan of one step, inputs (B, 1, D) and the state (B, D)."""
    shape, regular = getattr(inputs[0], "shape", None), True
    for argument, x in zip((*op.inputs, "h"), (*inputs, h), strict=True):
        if not isinstance(x, Tensor):
            raise errors.kind(caller, argument, "a tensor", x)
        regular = regular and x.shape == shape
    if not regular or h.dim() != 2:
        inputs, h = _step_laid_out(caller, op, inputs, h)
    return tuple(x.unsqueeze(1) for x in inputs), h


def row_step(
    op: Recurrence, inputs: tuple[Tensor, ...], h: Tensor, rows: Tensor, activation: str
) -> tuple[tuple[Tensor, ...], Tensor, bool, str | None]:
    """The door of one token in place on rows of a larger state: inputs (B, D) of one dtype, rows,
    the flag and the namespace.
    """
    caller = f"{op.name}_step"
    if isinstance(inputs[0], Tensor) and autocast_enabled(inputs[0].device.type):
        inputs = _promote(inputs)
    first, name = inputs[0], op.inputs[0]
    for argument, x in zip(op.inputs, inputs, strict=True):
        if not isinstance(x, Tensor):
            raise errors.kind(caller, argument, "a tensor", x)
        if x.dim() != 2 or x.shape != first.shape:
            expected = "(B, D) with rows" if x is first else f"that of {name}, {tuple(first.shape)}"
            raise errors.shape(caller, argument, expected, x)
        if x.dtype not in DTYPES:
            expected = "float32, float64, bfloat16 or float16"
            raise errors.dtype(caller, argument, expected, x.dtype)
        if x.dtype != first.dtype:
            raise errors.dtype(caller, argument, f"the dtype of {name}, {first.dtype}", x.dtype)
        if x.device != first.device:
            raise errors.device(caller, argument, name, first.device, x.device)
    if not isinstance(h, Tensor):
        raise errors.kind(caller, "h", "a tensor", h)
    if is_distributed(first) or is_distributed(h):
        raise errors.value(caller, "rows=None with DTensors", "rows")
    batch, channels = first.shape
    if h.dim() != 2 or h.shape[1] != channels:
        raise errors.shape(caller, "h", f"(rows of the state, {channels})", h)
    wide = accumulation_dtype(first.dtype)
    if h.dtype != wide:
        raise errors.dtype(caller, "h", f"{wide}, in which it is kept with rows,", h.dtype)
    if h.device != first.device:
        raise errors.device(caller, "h", name, first.device, h.device)
    if (channels > 1 and h.stride(1) != 1) or (h.shape[0] > 1 and h.stride(0) < channels):
        expected = "h with its channels side by side and rows that do not overlap"
        raise errors.value(caller, expected, f"strides {h.stride()}")
    errors.check_rows(caller, rows, batch, h.shape[0], first.device, name)
    if activation not in _ACTIVATIONS:
        raise errors.value(caller, "activation 'g' or 'identity'", repr(activation))
    return inputs, rows.contiguous(), activation == "identity", backend.namespace(caller, h.device)


def _step_laid_out(
    caller: str, op: Recurrence, inputs: tuple[Tensor, ...], h: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs of other shapes and the state as (B, D)."""
    for argument, x in zip((*op.inputs, "h"), (*inputs, h), strict=True):
        if x.dim() == 0:
            raise errors.shape(caller, argument, "(B, D)", x)
    inputs = _broadcast(caller, op, inputs)
    shape = inputs[0].shape
    if h.shape != shape:
        raise errors.shape(caller, "h", f"{tuple(shape)}, that of the inputs", h)
    rows = (math.prod(shape[:-1]), shape[-1])
    return tuple(x.reshape(rows) for x in inputs), h.reshape(rows)


def autocast_enabled(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


def _promote(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Under autocast inputs may come in several floating dtypes: the widest is used."""
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in inputs):
        return inputs  # the checks say what is wrong
    dtype = inputs[0].dtype
    for x in inputs[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) for x in inputs)


def _check_inputs(caller: str, op: Recurrence, inputs: tuple[Tensor, ...]) -> bool:
    """Whether they are (B, T, D) of one shape."""
    for argument, x in zip(op.inputs, inputs, strict=True):
        if not isinstance(x, Tensor):
            raise errors.kind(caller, argument, "a tensor", x)
    first, name = inputs[0], op.inputs[0]
    if first.is_nested:
        expected = (
            f"{name} as plain values, {name}.values()[None], with cu_seqlens={name}.offsets()"
        )
        raise errors.value(caller, expected, "a nested tensor")
    shape, dtype, device = first.shape, first.dtype, first.device
    regular = len(shape) == 3
    if dtype not in DTYPES and (op is not LINEAR or dtype not in _COMPLEX):
        expected = "float32, float64, bfloat16 or float16"
        if op is LINEAR:
            expected = "complex64, complex128, " + expected
        raise errors.dtype(caller, name, expected, dtype)
    for argument, x in zip(op.inputs[1:], inputs[1:], strict=True):
        regular = regular and x.shape == shape
        if x.dtype != dtype:
            raise errors.dtype(caller, argument, f"the dtype of {name}, {dtype}", x.dtype)
        if x.device != device:
            raise errors.device(caller, argument, name, device, x.device)
    if op.parts > 1 and len(shape) and shape[-1] % op.parts:
        raise errors.value(caller, f"{name} with a last size divisible by {op.parts}", shape[-1])
    return regular


def _broadcast(caller: str, op: Recurrence, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """In one shape, without a copy."""
    shape, name = inputs[0].shape, op.inputs[0]
    for argument, x in zip(op.inputs[1:], inputs[1:], strict=True):
        try:
            shape = torch.broadcast_shapes(shape, x.shape)
        except RuntimeError:
            expected = f"{argument} in a shape that broadcasts with that of {name}, {tuple(shape)}"
            raise errors.value(caller, expected, tuple(x.shape)) from None
    return tuple(x.expand(shape) for x in inputs)


def _laid_out(
    caller: str,
    op: Recurrence,
    inputs: tuple[Tensor, ...],
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    resets: Tensor | None,
    state: str,
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None, torch.Size]:
    """Inputs of other shapes as (B, T, D), with h0 and resets; and their own leading dimensions."""
    for argument, x in zip(op.inputs, inputs, strict=True):
        if x.dim() < 2:
            got = f"{tuple(x.shape)} with {x.dim()} dimensions"
            raise errors.value(caller, f"{argument} of shape (B, T, D), (..., T, D) or (T, D)", got)
        if is_distributed(x):
            expected = f"DTensors with three dimensions, (B, T, D), in the shape of {op.inputs[0]}"
            raise errors.value(caller, expected, tuple(x.shape))
    inputs = _broadcast(caller, op, inputs)
    *leading, time, channels = inputs[0].shape
    if isinstance(h0, Tensor) and cu_seqlens is None:
        states = (*leading, channels // op.parts)
        if h0.shape != states:
            state = state or _state_of(op)
            raise errors.shape(caller, state, states, h0, _one_for_all(state, h0, leading))
        h0 = h0.reshape((math.prod(leading), states[-1]))
    if isinstance(resets, Tensor):
        if resets.shape != (*leading, time):
            raise errors.shape(caller, "resets", (*leading, time), resets)
        resets = resets.flatten(0, -2) if leading else resets.unsqueeze(0)
    if leading:
        rows = math.prod(leading)
        inputs = tuple(x.reshape((rows, time, channels)) for x in inputs)
    else:
        inputs = tuple(x.unsqueeze(0) for x in inputs)
    return inputs, h0, resets, torch.Size(leading)


def _state_of(op: Recurrence) -> str:
    return "log_h0" if op is LOG else "h0"


def _one_for_all(name: str, h0: Tensor, leading: Sequence[int]) -> str:
    """How a caller says that every row starts from one state: (D,) alone may be a mistake."""
    if h0.dim() != 1:
        return ""
    sizes = ", ".join(map(str, (*leading, -1)))
    return f"; {name}.expand({sizes}) starts every row from this one"


def _check_ends(caller: str, cu_seqlens: Tensor) -> None:
    """A tensor (N + 1,) of whole numbers, whatever they are."""
    if not isinstance(cu_seqlens, Tensor):
        raise errors.kind(caller, "cu_seqlens", "a tensor", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise errors.dtype(caller, "cu_seqlens", "int32 or int64", cu_seqlens.dtype)
    if torch._C._functorch.is_batchedtensor(cu_seqlens):
        expected = "the same cu_seqlens for the whole batch of torch.vmap"
        raise errors.value(caller, expected, "others for each element")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise errors.shape(caller, "cu_seqlens", "(N + 1,)", cu_seqlens)


def _check_cu_seqlens(caller: str, op: Recurrence, x: Tensor, cu_seqlens: Tensor) -> None:
    _check_ends(caller, cu_seqlens)
    if cu_seqlens.device != x.device:
        raise errors.device(caller, "cu_seqlens", op.inputs[0], x.device, cu_seqlens.device)
    if x.shape[0] != 1:
        expected = "B = 1 with cu_seqlens (sequences packed along time)"
        raise errors.value(caller, expected, f"B = {x.shape[0]}")


def _check_resets(caller: str, op: Recurrence, x: Tensor, resets: Tensor) -> None:
    if not isinstance(resets, Tensor):
        raise errors.kind(caller, "resets", "a tensor", resets)
    if resets.dtype != torch.bool:
        raise errors.dtype(caller, "resets", "torch.bool", resets.dtype)
    if resets.shape != x.shape[:2]:
        raise errors.shape(caller, "resets", f"(B, T) = {tuple(x.shape[:2])}", resets)
    if resets.device != x.device:
        raise errors.device(caller, "resets", op.inputs[0], x.device, resets.device)


def _checked_state(
    caller: str,
    op: Recurrence,
    x: Tensor,
    h0: Tensor,
    cu_seqlens: Tensor | None,
    any_float: bool,
    name: str,
) -> Tensor:
    """h0 in the accumulation dtype."""
    name = name or _state_of(op)
    if not isinstance(h0, Tensor):
        raise errors.kind(caller, name, "a tensor", h0)
    expected = (sequences_of(x, cu_seqlens), x.shape[2] // op.parts)
    if h0.shape != expected:
        raise errors.shape(caller, name, expected, h0, _one_for_all(name, h0, expected[:1]))
    wide = accumulation_dtype(x.dtype)
    if h0.dtype not in (DTYPES if any_float else (x.dtype, wide)):
        either = f"{wide}" if wide == x.dtype else f"{x.dtype} or {wide}"
        raise errors.dtype(caller, name, either, h0.dtype)
    if h0.device != x.device:
        raise errors.device(caller, name, op.inputs[0], x.device, h0.device)
    return h0.to(wide)


# Multi-state attention.

_LARGEST = torch.finfo(torch.float32).max


def token(
    caller: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: MultiState,
    rows: Tensor | None,
    scale: float | None,
) -> tuple[Tensor | None, float, str | None]:
    """The door of attend_evict and attend_scores: rows, the scale and the namespace."""
    _check_tokens(caller, q, k, v, 3, "(B, H, Dh)")
    check_state(caller, state)
    _check_fit(caller, k, state)
    rows = _checked_rows(caller, rows, q, k.shape[0], state)
    return rows, _scale_of(caller, scale, q), _namespace(caller, q)


def prompt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: MultiState,
    valid: Tensor | None,
    rows: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
) -> tuple[Tensor | None, float, str | None]:
    """The door of attend_prompt: rows, the scale and the namespace."""
    caller = "attend_prompt"
    if cu_seqlens is None:
        _check_tokens(caller, q, k, v, 4, "(B, H, T, Dh)")
    else:
        _check_tokens(caller, q, k, v, 3, "(total, H, Dh)")
    check_state(caller, state)
    _check_fit(caller, k, state)
    if cu_seqlens is None:
        batch = k.shape[0]
        if valid is not None:
            _check_valid(caller, valid, q)
    else:
        batch = _check_packed(caller, q, cu_seqlens, valid)
    rows = _checked_rows(caller, rows, q, batch, state)
    return rows, _scale_of(caller, scale, q), _namespace(caller, q)


def _check_packed(caller: str, q: Tensor, cu_seqlens: Tensor, valid: Tensor | None) -> int:
    """How many prompts are packed into q (total, Hq, Dh)."""
    if valid is not None:
        expected = "valid or cu_seqlens (packed prompts have no padding)"
        raise errors.value(caller, expected, "both")
    _check_ends(caller, cu_seqlens)
    if is_distributed(q):
        raise errors.value(caller, "cu_seqlens=None with DTensors", "cu_seqlens")
    if cu_seqlens.device not in (q.device, torch.device("cpu")):
        raise errors.device(caller, "cu_seqlens", "q, or on the CPU", q.device, cu_seqlens.device)
    borders(caller, cu_seqlens, q.shape[0])
    return cu_seqlens.shape[0] - 1


def _checked_rows(
    caller: str, rows: Tensor | None, q: Tensor, batch: int, state: MultiState
) -> Tensor | None:
    """Rows that lie as operators want them; without any, as many rows in the batch as the state."""
    count = state.keys.shape[0]
    if rows is None:
        if batch != count:
            raise errors.value(caller, f"a batch of {count} as in the state", batch)
        return None
    if is_distributed(q):
        raise errors.value(caller, "rows=None with DTensors", "rows")
    errors.check_rows(caller, rows, batch, count, state.device, "the state")
    return rows.contiguous()


def sequence(
    q: Tensor, k: Tensor, v: Tensor, policy: Policy, valid: Tensor | None, scale: float | None
) -> tuple[tuple[Tensor, ...], Tensor | None, float, str | None]:
    """The door of attend_sequence: q, k and v in one dtype, valid, contiguous, the scale and the
    namespace.
    """
    caller = "attend_sequence"
    if isinstance(q, Tensor) and autocast_enabled(q.device.type):
        q, k, v = _promote((q, k, v))
    _check_tokens(caller, q, k, v, 4, "(B, H, T, Dh)")
    if not isinstance(policy, Policy):
        raise errors.kind(caller, "policy", "a Policy", policy)
    if valid is not None:
        _check_valid(caller, valid, q)
        valid = valid.contiguous()
    return (q, k, v), valid, _scale_of(caller, scale, q), _namespace(caller, q)


def scores(
    state: MultiState, scores: Tensor, rows: Tensor | None
) -> tuple[Tensor | None, str | None]:
    """The door of evict: rows and the namespace."""
    check_state("evict", state)
    wanted = accumulation_dtype(state.dtype)
    if not isinstance(scores, Tensor) or scores.dtype != wanted:
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"evict: expected scores to be a {wanted} tensor, got {got}")
    batch = scores.shape[0] if rows is not None and scores.dim() > 0 else state.position.shape[0]
    expected = (batch, *state.position.shape[1:])
    if scores.shape != expected:
        raise errors.shape("evict", "scores", expected, scores)
    if scores.device != state.device:
        raise errors.value("evict", f"scores on {state.device}", scores.device)
    return _checked_rows("evict", rows, scores, batch, state), _namespace("evict", scores)


def check_state(caller: str, state: MultiState) -> None:
    """Raises unless it is a state whose tensors lie as the operators need them."""
    if not isinstance(state, MultiState):
        raise errors.kind(caller, "state", "a MultiState", state)
    device = state.keys.device
    for x in state.tensors():
        if not x.is_contiguous() or x.device != device:
            break
    else:
        return
    for name, x in zip(state.TENSORS, state.tensors(), strict=True):
        if not x.is_contiguous():
            raise errors.value(caller, f"state.{name} to be contiguous", f"strides {x.stride()}")
        if x.device != device:
            raise errors.device(caller, f"state.{name}", "its keys", device, x.device)


def _check_tokens(
    caller: str, q: Tensor, k: Tensor, v: Tensor, dimensions: int, layout: str
) -> None:
    """q (B, Hq, [T,] Dh), k and v (B, Hkv, [T,] Dh) of one dtype on one device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise errors.kind(caller, name, "a tensor", x)
        if x.dim() != dimensions:
            raise errors.shape(caller, name, layout, x)
        if x.dtype not in DTYPES:
            raise errors.dtype(caller, name, "float32, bfloat16 or float16", x.dtype)
        if x.dtype != q.dtype:
            raise errors.dtype(caller, name, f"the dtype of q, {q.dtype}", x.dtype)
        if x.device != q.device:
            raise errors.device(caller, name, "q", q.device, x.device)
    if v.shape != k.shape:
        expected = f"v in the shape of k, {tuple(k.shape)}"
        raise errors.value(caller, expected, tuple(v.shape))
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        expected = f"k {layout} like q but for its heads, {tuple(q.shape)}"
        raise errors.value(caller, expected, tuple(k.shape))
    if k.shape[1] < 1 or q.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise errors.value(
            caller,
            "as many query heads, those of q, as key-value heads, those of k, or a multiple",
            f"{q.shape[1]} and {k.shape[1]}",
        )
    check_head_dim(caller, q.shape[-1])


def _check_fit(caller: str, k: Tensor, state: MultiState) -> None:
    """Whether the tokens are those of a state's heads."""
    keys = state.keys
    _, heads, _, head_dim = keys.shape
    if k.shape[1] != heads:
        raise errors.value(caller, f"key-value heads of {heads} as in the state", k.shape[1])
    if k.shape[-1] != head_dim:
        raise errors.value(caller, f"a head_dim of {head_dim} as in the state", k.shape[-1])
    if k.dtype != keys.dtype:
        raise errors.dtype(caller, "q, k and v", f"the dtype of the state, {keys.dtype}", k.dtype)
    if k.device != keys.device:
        raise errors.device(caller, "q, k and v", "the state", keys.device, k.device)


def _check_valid(caller: str, valid: Tensor, q: Tensor) -> None:
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        got = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(f"{caller}: expected valid to be a bool tensor, got {got}")
    if valid.shape != (q.shape[0], q.shape[2]):
        raise errors.shape(caller, "valid", f"(B, T) = {(q.shape[0], q.shape[2])}", valid)
    if valid.device != q.device:
        raise errors.device(caller, "valid", "q", q.device, valid.device)


def is_usual_scale(scale: float) -> bool:
    """Whether a scale of logits needs no further look."""
    return type(scale) is float and 0 < scale <= 1


def _scale_of(caller: str, scale: float | None, q: Tensor) -> float:
    if scale is None:
        return float(q.shape[-1]) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"{caller}: expected scale to be a number, got {scale!r}")
    if not abs(scale) <= _LARGEST:  # also a NaN
        raise errors.value(caller, "scale to be a finite float32 number", repr(scale))
    return float(scale)


def _namespace(caller: str, x: Tensor) -> str | None:
    """Of the operator that computes this call; None: the reference does."""
    namespace = backend.namespace(caller, x.device)
    if namespace is None:
        if is_distributed(x):
            expected = "plain tensors for the reference backend"
            raise errors.value(caller, expected, "a DTensor")
    elif x.dtype == torch.float64:
        raise TypeError(
            f"{caller}: expected float32, bfloat16 or float16, got {x.dtype}; "
            "msrnn_ops.use_backend('reference') computes in float64"
        )
    return namespace
