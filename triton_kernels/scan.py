"""The scan operators of csrc/ops.cpp by Triton: plan, memory, launches.

No call waits for the device; memory comes from torch's allocator in the current stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from . import recurrence, scan_kernels
from .tuning import SCANS

# Rows times channels that fill a large GPU, and that nearly do; a plan depends on shape and dtype
# alone.
_FILL, _NEARLY = 128 * 256, 128 * 32
_FEWEST_STEPS = 256  # of a chunk
_FEWEST_CHUNKS = 4  # fewer do not pay for reading twice
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Op:
    """What the kernels need to know of an op."""

    code: tl.constexpr
    inputs: int
    saved: int  # leading inputs that backward reads


LINEAR = Op(recurrence.LINEAR, 2, 1)
DECAY = Op(recurrence.DECAY, 2, 1)
LOG = Op(recurrence.LOG, 2, 2)
MIN_GRU = Op(recurrence.MIN_GRU, 2, 2)
MIN_LSTM = Op(recurrence.MIN_LSTM, 3, 3)


@dataclass(frozen=True)
class Plan:
    """How a call is cut up."""

    form: str
    segments: int
    rows: int  # of a segment
    block_d: int
    warps: int
    chunks: int
    chunk_steps: int

    @property
    def tile(self) -> int:
        return self.segments * self.rows


def plan(
    backward: bool, size: int, inputs: int, marked: bool, rows: int, time: int, channels: int
) -> Plan:
    """Of elements of so many bytes, `marked` if states may start anywhere in time.

    The fewer rows and channels, the more is parallel in time.
    """

    def tuned(form: str, chunks: int = 1) -> Plan:
        key = ("backward" if backward else "forward", form, min(size, 4), inputs)
        segments, tile_rows, block_d, warps = SCANS[key]
        if size == 8 or (marked and segments == 1):  # more registers a row
            tile_rows = max(1, tile_rows // 2)
        if marked and segments > 1 and backward and size == 2:  # else a few words are spilled
            warps *= 2
        block_d = min(block_d, triton.next_power_of_2(channels))
        tile = segments * tile_rows
        steps = triton.cdiv(triton.cdiv(time, chunks), tile) * tile
        chunks = triton.cdiv(time, steps)
        return Plan(form, segments, tile_rows, block_d, warps, chunks, steps)

    lanes = rows * channels
    walk = tuned("walk")
    if lanes >= _FILL or time <= 2 * walk.tile:
        return walk
    chunks = min(triton.cdiv(_FILL, max(lanes, 1)), time // _FEWEST_STEPS)
    if lanes >= _NEARLY or chunks < _FEWEST_CHUNKS:
        return tuned("segments")
    return tuned("chunks", chunks)


def _check(
    tensors: Sequence[Tensor], states: Sequence[Tensor | None], count: int, packed: bool,
    resets: Tensor | None,
) -> None:  # fmt: skip
    """For direct calls of the operators; the public functions have clearer words."""
    first = tensors[0]
    if first.dim() != 3 or any(x.shape != first.shape or x.dtype != first.dtype for x in tensors):
        raise RuntimeError("expected tensors (B, T, D) of one shape and dtype")
    if first.shape[1] >= 2**31 - 2**16:
        raise RuntimeError(f"expected fewer steps, got {first.shape[1]}")
    if packed and first.shape[0] != 1:
        raise RuntimeError(f"expected B = 1 with cu_seqlens, got {first.shape[0]}")
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    for x in states:
        if x is not None and (x.shape != (count, first.shape[2]) or x.dtype != dtype):
            raise RuntimeError("expected a state (sequences, D) in the accumulation dtype")
    if resets is not None and (resets.shape != first.shape[:2] or resets.dtype != torch.bool):
        raise RuntimeError("expected resets (B, T) of bool")


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _marks(cu_seqlens: Tensor | None, time: int, starts: bool) -> tuple[Tensor | None, ...]:
    """For each step whether its sequence starts, or ends, there; and the sequence's number.

    A step that no sequence covers is one of its own, of number -1.
    """
    if cu_seqlens is None:
        return None, None
    step = torch.arange(time, device=cu_seqlens.device)
    number = torch.searchsorted(cu_seqlens[1:].contiguous(), step, right=True)
    number = number.clamp_max(cu_seqlens.shape[0] - 2)
    begin, end = cu_seqlens[number], cu_seqlens[number + 1]
    covered = (begin <= step) & (step < end)
    edge = begin == step if starts else end == step + 1
    return (edge | ~covered).to(torch.int32), torch.where(covered, number, -1).to(torch.int32)


def _reset_arguments(resets: Tensor | None) -> dict[str, Any]:
    if resets is None:
        return {"resets": None, "strides_resets": (0, 0), "RESETS": False}
    return {"resets": resets.view(torch.uint8), "strides_resets": resets.stride(), "RESETS": True}


def _run(
    kernel: Any, plan: Plan, shape: tuple[int, ...], entering: Tensor | None, log_space: bool,
    like: Tensor, arguments: dict[str, Any],
) -> None:  # fmt: skip
    """One launch, or those over chunks of time."""
    rows, time, channels = shape
    programs = rows * triton.cdiv(channels, plan.block_d)
    wide = like.dtype == torch.float64
    settings = {
        **arguments, "rows": rows, "time": time, "channels": channels,
        "chunk_steps": plan.chunk_steps, "BRIEF": like.element_size() == 2,
        "WIDE": tl.float64 if wide else tl.float32, "SEGMENTS": plan.segments,
        "ROWS": plan.rows, "BLOCK_D": plan.block_d, "num_warps": plan.warps,
        "enable_fp_fusion": True,
    }  # fmt: skip
    walk = {"spans": None, "PHASE": scan_kernels.WALK}
    with _on(like):
        if plan.chunks == 1:
            kernel[(programs,)](**settings, **walk, flags=None)
            return
        dtype = torch.float64 if wide else torch.float32
        spans = like.new_empty((plan.chunks, 5, rows, channels), dtype=dtype)
        flags = like.new_empty((programs,), dtype=torch.int32)
        grid = (programs * plan.chunks,)
        kernel[grid](**settings, spans=spans, flags=None, PHASE=scan_kernels.SPANS)
        scan_kernels.scan_carries[(programs,)](
            spans, entering, flags, rows, channels, plan.chunks, LOG_SPACE=log_space,
            HAS_FIRST=entering is not None, WIDE=settings["WIDE"], BLOCK_D=plan.block_d,
            num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
        kernel[grid](**settings, spans=spans, flags=None, PHASE=scan_kernels.CHUNK)
        settings["chunk_steps"] = time
        kernel[(programs,)](**settings, **walk, flags=flags)


def _named(name: str, tensors: Sequence[Tensor | None]) -> dict[str, Any]:
    """Kernel arguments: each tensor and its strides, three of them."""
    padded = [*tensors, *[None] * (3 - len(tensors))]
    found: dict[str, Any] = {f"{name}{i}": x for i, x in enumerate(padded)}
    strides = "strides" if name == "x" else f"strides_{name}"
    for i, x in enumerate(padded):
        found[f"{strides}{i}"] = (0, 0, 0) if x is None else x.stride()
    return found


def forward(
    op: Op, inputs: Sequence[Tensor], h0: Tensor | None, cu_seqlens: Tensor | None,
    resets: Tensor | None, reverse: bool, identity: bool = False,
) -> Outputs:  # fmt: skip
    packed = cu_seqlens is not None
    count = inputs[0].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _check(inputs, [h0], count, packed, resets)
    shape = _, time, channels = tuple(inputs[0].shape)
    h = inputs[0].new_empty(shape)
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    h0 = None if h0 is None else h0.contiguous()
    none = -torch.inf if op is LOG else 0.0
    last = h.new_full((count, channels), none, dtype=dtype) if h0 is None else h0.clone()
    if h.numel() == 0 or count == 0:
        return h.zero_(), last
    first, sequence = _marks(cu_seqlens, time, starts=not reverse)
    marked = packed or resets is not None
    _run(
        scan_kernels.scan_forward, plan(False, h.element_size(), op.inputs, marked, *shape),
        shape, None if packed else h0, op is LOG, h,
        {
            **_named("x", inputs), "h": h, "strides_h": h.stride(), "h0": h0, "last": last,
            "first": first, "sequence": sequence, **_reset_arguments(resets),
            "OP": op.code, "IDENTITY": identity, "REVERSE": reverse, "PACKED": packed,
            "HAS_H0": h0 is not None, "INPUTS": op.inputs,
        },
    )  # fmt: skip
    return h, last


def backward(
    op: Op, gradients: Sequence[Tensor], grad_h: Tensor | None, grad_last: Tensor | None,
    saved: Sequence[Tensor], h: Tensor, h0: Tensor | None, cu_seqlens: Tensor | None,
    resets: Tensor | None, reverse: bool, identity: bool = False,
) -> Tensor:  # fmt: skip
    """Fills the gradients of the inputs; returns that of h0."""
    packed = cu_seqlens is not None
    count = h.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tensors = [h, *saved, *([] if grad_h is None else [grad_h])]
    _check(tensors, [h0, grad_last], count, packed, resets)
    shape = _, time, channels = tuple(h.shape)
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    if grad_last is None:
        grad_h0 = h.new_zeros((count, channels), dtype=dtype)
    else:
        grad_h0 = grad_last.clone(memory_format=torch.contiguous_format)
    if h.numel() == 0 or count == 0:
        for gradient in gradients:
            gradient.zero_()
        return grad_h0
    h0 = None if h0 is None else h0.contiguous()
    grad_last = None if grad_last is None else grad_last.contiguous()
    ends, sequence = _marks(cu_seqlens, time, starts=reverse)
    marked = packed or resets is not None
    _run(
        scan_kernels.scan_backward, plan(True, h.element_size(), op.inputs, marked, *shape),
        shape, None if packed else grad_last, False, h,
        {
            **_named("x", saved), **_named("grad", gradients), "h": h, "strides_h": h.stride(),
            "h0": h0, "grad_h": grad_h,
            "strides_grad_h": (0, 0, 0) if grad_h is None else grad_h.stride(),
            "grad_last": grad_last, "grad_h0": grad_h0, "first": ends, "sequence": sequence,
            **_reset_arguments(resets), "OP": op.code, "IDENTITY": identity, "REVERSE": reverse,
            "PACKED": packed, "HAS_H0": h0 is not None,
            "HAS_GRAD_H": grad_h is not None, "HAS_GRAD_LAST": grad_last is not None,
            "SAVED": op.saved, "INPUTS": op.inputs,
        },
    )  # fmt: skip
    return grad_h0


def _separate(op: Op) -> tuple[Callable[..., Outputs], Callable[..., Outputs]]:
    """The two operators of an op, by the schemas of csrc/ops.cpp."""

    def run(*args: Any) -> Outputs:
        return forward(op, args[: op.inputs], *args[op.inputs :])

    def run_backward(grad_h: Tensor | None, grad_last: Tensor | None, *args: Any) -> Outputs:
        saved, rest = args[: op.saved], args[op.saved :]
        gradients = [rest[0].new_empty(rest[0].shape) for _ in range(op.inputs)]
        grad_h0 = backward(op, gradients, grad_h, grad_last, saved, *rest)
        return *gradients, grad_h0

    return run, run_backward


def _joint(op: Op) -> tuple[Callable[..., Outputs], Callable[..., Outputs]]:
    """Likewise, the inputs side by side in one tensor."""

    def run(projection: Tensor, *args: Any) -> Outputs:
        return forward(op, projection.chunk(op.inputs, -1), *args)

    def run_backward(
        grad_h: Tensor | None, grad_last: Tensor | None, projection: Tensor, *args: Any
    ) -> Outputs:
        grad = torch.empty_like(projection, memory_format=torch.contiguous_format)
        parts, saved = grad.chunk(op.inputs, -1), projection.chunk(op.inputs, -1)
        return grad, backward(op, parts, grad_h, grad_last, saved, *args)

    return run, run_backward


_STEP_CHANNELS = 256  # of a program


def _step(op: Op) -> Callable[..., Tensor]:
    """One token in place on rows of a larger state, by the schemas of csrc/ops.cpp."""

    def run(*args: Any) -> Tensor:
        inputs, (h, rows, identity) = args[: op.inputs], args[op.inputs :]
        first = inputs[0]
        if first.dim() != 2 or any(
            x.shape != first.shape or x.dtype != first.dtype for x in inputs
        ):
            raise RuntimeError("expected tensors (B, D) of one shape and dtype")
        batch, channels = first.shape
        wide = first.dtype == torch.float64
        dtype = torch.float64 if wide else torch.float32
        adjacent = channels < 2 or h.stride(-1) == 1
        apart = h.shape[0] < 2 or h.stride(0) >= channels
        if h.dim() != 2 or h.shape[1] != channels or h.dtype != dtype or not adjacent or not apart:
            expected = "a state (rows, D) in the accumulation dtype, channels side by side"
            raise RuntimeError(f"expected {expected}")
        whole = rows.dtype in (torch.int32, torch.int64) and rows.is_contiguous()
        if rows.shape != (batch,) or not whole:
            raise RuntimeError("expected rows (B,) of int32 or int64")
        out = first.new_empty((batch, channels), dtype=dtype)
        if out.numel() == 0:
            return out
        block = min(_STEP_CHANNELS, triton.next_power_of_2(channels))
        third = inputs[-1]
        with _on(first):
            scan_kernels.scan_step[(batch * triton.cdiv(channels, block),)](
                inputs[0], inputs[1], third, inputs[0].stride(), inputs[1].stride(),
                third.stride(), h, h.stride(0), rows, h.shape[0], out, channels, OP=op.code,
                IDENTITY=identity, INPUTS=op.inputs, BRIEF=first.element_size() == 2,
                WIDE=tl.float64 if wide else tl.float32, BLOCK_D=block, num_warps=2,
                enable_fp_fusion=True,
            )  # fmt: skip
        return out

    return run


OPERATORS: dict[str, Callable[..., Any]] = {
    "min_gru_step": _step(MIN_GRU),
    "min_lstm_step": _step(MIN_LSTM),
}
for _name, _pair in (
    ("linear_scan", _separate(LINEAR)),
    ("decay_scan", _separate(DECAY)),
    ("log_scan", _separate(LOG)),
    ("min_gru", _separate(MIN_GRU)),
    ("min_lstm", _separate(MIN_LSTM)),
    ("min_gru_joint", _joint(MIN_GRU)),
    ("min_lstm_joint", _joint(MIN_LSTM)),
):
    OPERATORS[_name], OPERATORS[f"{_name}_backward"] = _pair
