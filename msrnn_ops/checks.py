"""What a call must be before anything is computed or written: one door for each public function.

A door raises what is wrong in the words of the caller, and returns what is needed next: inputs in
one dtype, the scale of the logits, the namespace of the operator (None: the reference computes).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from msrnn_ops import backend, errors
from msrnn_ops.dtensor import is_distributed
from msrnn_ops.operators.scan import LOG, Recurrence, sequences_of
from msrnn_ops.reference import accumulation_dtype
from msrnn_ops.state import DTYPES, MultiState, Policy, check_head_dim

_ACTIVATIONS = ("g", "identity")


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
    activation: str | None,
    *,
    whole: bool = True,
) -> tuple[tuple[Tensor, ...], Tensor | None, tuple[bool, ...]]:
    """The door of the scans: inputs in one dtype, h0 in the accumulation dtype, and the flags.

    Where the time axis is not ``whole``, other ranks have to be asked before :func:`borders`.
    """
    first = inputs[0]
    autocast = isinstance(first, Tensor) and _autocast_enabled(first.device.type)
    if autocast:
        inputs = _promote(inputs)
        first = inputs[0]
    _check_inputs(op, inputs)
    if cu_seqlens is not None:
        _check_cu_seqlens(op, first, cu_seqlens)
        if whole:
            borders(op, cu_seqlens, first.shape[1])
    if h0 is not None:
        h0 = _checked_state(op, first, h0, cu_seqlens, autocast)
    if activation is None:
        return inputs, h0, ()
    if activation not in _ACTIVATIONS:
        raise errors.value(op.name, "activation 'g' or 'identity'", repr(activation))
    return inputs, h0, (activation == "identity",)


def scan_step(op: Recurrence, inputs: tuple[Tensor, ...], h: Tensor) -> None:
    """The door of one token, before it becomes a scan of one step."""
    caller = f"{op.name}_step"
    for argument, x in zip((*op.inputs, "h"), (*inputs, h), strict=True):
        if not isinstance(x, Tensor):
            raise errors.kind(caller, argument, "a tensor", x)
        if x.dim() != 2:
            raise errors.shape(caller, argument, "(B, D)", x)


def borders(op: Recurrence, cu_seqlens: Tensor, time: int) -> None:
    """For plain CPU tensors, whose values are known; elsewhere kernels stay in bounds for any."""
    if torch.compiler.is_compiling() or type(cu_seqlens) is not Tensor or not cu_seqlens.is_cpu:
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise errors.value(op.name, "cu_seqlens to start at 0", ends[0])
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        if end < start:
            got = f"{start} and then {end} at index {i + 1}"
            raise errors.value(op.name, "cu_seqlens not to decrease", got)
    if ends[-1] != time:
        raise errors.value(op.name, f"cu_seqlens to end at T = {time}", ends[-1])


def _autocast_enabled(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


def _promote(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Under autocast inputs may come in several floating dtypes: the widest is used."""
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in inputs):
        return inputs  # the checks say what is wrong
    dtype = inputs[0].dtype
    for x in inputs[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) for x in inputs)


def _check_inputs(op: Recurrence, inputs: tuple[Tensor, ...]) -> None:
    for argument, x in zip(op.inputs, inputs, strict=True):
        if not isinstance(x, Tensor):
            raise errors.kind(op.name, argument, "a tensor", x)
    first, name = inputs[0], op.inputs[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    if len(shape) != 3:
        got = f"{tuple(shape)} with {len(shape)} dimensions"
        raise errors.value(op.name, f"{name} of shape (B, T, D)", got)
    if dtype not in DTYPES:
        raise errors.dtype(op.name, name, "float32, float64, bfloat16 or float16", dtype)
    for argument, x in zip(op.inputs[1:], inputs[1:], strict=True):
        if x.shape != shape:
            expected = f"{argument} in the shape of {name}, {tuple(shape)}"
            raise errors.value(op.name, expected, tuple(x.shape))
        if x.dtype != dtype:
            raise errors.dtype(op.name, argument, f"the dtype of {name}, {dtype}", x.dtype)
        if x.device != device:
            raise errors.device(op.name, argument, name, device, x.device)
    if op.parts > 1 and shape[2] % op.parts:
        raise errors.value(op.name, f"{name} with a last size divisible by {op.parts}", shape[2])


def _check_cu_seqlens(op: Recurrence, x: Tensor, cu_seqlens: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise errors.kind(op.name, "cu_seqlens", "a tensor", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise errors.dtype(op.name, "cu_seqlens", "int32 or int64", cu_seqlens.dtype)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise errors.shape(op.name, "cu_seqlens", "(N + 1,)", cu_seqlens)
    if cu_seqlens.device != x.device:
        raise errors.device(op.name, "cu_seqlens", op.inputs[0], x.device, cu_seqlens.device)
    if x.shape[0] != 1:
        expected = "B = 1 with cu_seqlens (sequences packed along time)"
        raise errors.value(op.name, expected, f"B = {x.shape[0]}")


def _checked_state(
    op: Recurrence, x: Tensor, h0: Tensor, cu_seqlens: Tensor | None, any_float: bool
) -> Tensor:
    """h0 in the accumulation dtype."""
    name = "log_h0" if op is LOG else "h0"
    if not isinstance(h0, Tensor):
        raise errors.kind(op.name, name, "a tensor", h0)
    expected = (sequences_of(x, cu_seqlens), x.shape[2] // op.parts)
    if h0.shape != expected:
        raise errors.shape(op.name, name, expected, h0)
    wide = accumulation_dtype(x.dtype)
    if h0.dtype not in (DTYPES if any_float else (x.dtype, wide)):
        either = f"{wide}" if wide == x.dtype else f"{x.dtype} or {wide}"
        raise errors.dtype(op.name, name, either, h0.dtype)
    if h0.device != x.device:
        raise errors.device(op.name, name, op.inputs[0], x.device, h0.device)
    return h0.to(wide)


# Multi-state attention.

_LARGEST = torch.finfo(torch.float32).max


def token(
    caller: str, q: Tensor, k: Tensor, v: Tensor, state: MultiState, scale: float | None
) -> tuple[float, str | None]:
    """The door of attend_evict and attend_scores: the scale and the namespace."""
    _check_tokens(caller, q, k, v, 3, "(B, H, Dh)")
    check_state(caller, state)
    _check_fit(caller, k, state)
    return _scale_of(caller, scale, q), _namespace(caller, q)


def prompt(
    q: Tensor, k: Tensor, v: Tensor, state: MultiState, valid: Tensor | None, scale: float | None
) -> tuple[float, str | None]:
    """The door of attend_prompt: the scale and the namespace."""
    caller = "attend_prompt"
    _check_tokens(caller, q, k, v, 4, "(B, H, T, Dh)")
    check_state(caller, state)
    _check_fit(caller, k, state)
    if valid is not None:
        _check_valid(caller, valid, q)
    return _scale_of(caller, scale, q), _namespace(caller, q)


def sequence(
    q: Tensor, k: Tensor, v: Tensor, policy: Policy, valid: Tensor | None, scale: float | None
) -> tuple[Tensor | None, float, str | None]:
    """The door of attend_sequence: valid, contiguous, the scale and the namespace."""
    caller = "attend_sequence"
    _check_tokens(caller, q, k, v, 4, "(B, H, T, Dh)")
    if not isinstance(policy, Policy):
        raise errors.kind(caller, "policy", "a Policy", policy)
    if valid is not None:
        _check_valid(caller, valid, q)
        valid = valid.contiguous()
    return valid, _scale_of(caller, scale, q), _namespace(caller, q)


def scores(state: MultiState, scores: Tensor) -> str | None:
    """The door of evict: the namespace."""
    check_state("evict", state)
    wanted = accumulation_dtype(state.dtype)
    if not isinstance(scores, Tensor) or scores.dtype != wanted:
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"evict: expected scores to be a {wanted} tensor, got {got}")
    if scores.shape != state.position.shape:
        raise errors.shape("evict", "scores", tuple(state.position.shape), scores)
    if scores.device != state.device:
        raise errors.value("evict", f"scores on {state.device}", scores.device)
    return _namespace("evict", scores)


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
    """Whether the tokens are those of a state's rows and heads."""
    keys = state.keys
    batch, heads, _, head_dim = keys.shape
    if k.shape[0] != batch:
        raise errors.value(caller, f"a batch of {batch} as in the state", k.shape[0])
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
