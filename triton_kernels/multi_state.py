"""The multi-state operators of csrc/ops.cpp by Triton: checks, plan, memory, launches.

No call waits for the device and nothing here depends on what the device holds: any stream, captured
in a graph or not. Memory comes from torch's allocator in the current stream.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import step_kernels
from .tuning import STEPS

_PROGRAMS = 256  # two for each multiprocessor of a large GPU; a plan depends on the shape alone
_FEWEST_SLOTS = 64  # of a split
_MOST_HEADS = {2: 32, 4: 8}  # query heads of a program, by bytes of an element
_NO_ROOM = 2**31  # slots and programs are numbered in 32 bits
_ACCUMULATED = 2
_LARGEST_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tile:
    """Slots that a program has at once, and how many blocks of them are under way."""

    slots: int
    warps: int
    stages: int


_FINISH_WARPS = 4
FINISH_SLOTS, FINISH_HEADS, FINISH_ELEMENTS = 32 * _FINISH_WARPS, 8, 32
# All variants of a kernel round alike: the halves of a step have the bits of the whole.
_ALIKE = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Plan:
    """How a call is cut up."""

    tile: Tile
    block_d: int
    heads: int  # query heads of a program of `attend`
    programs: int  # of `attend`, for each split
    splits: int
    split_slots: int
    parts: int  # of a row and group in `finish`
    part_slots: int


@functools.lru_cache(1024)
def plan(
    rows: int, query_heads: int, kv_heads: int, groups: int, slots: int, head_dim: int, size: int
) -> Plan:
    block_d = max(16, triton.next_power_of_2(head_dim))
    tile = Tile(*STEPS[size, block_d])
    sharing = query_heads // kv_heads
    heads = min(triton.next_power_of_2(sharing), _MOST_HEADS[size])
    heads = heads if size == 4 else max(heads, 16)  # a tile of the tensor cores
    programs = rows * kv_heads * triton.cdiv(sharing, heads)
    splits = max(1, min(_PROGRAMS // max(programs, 1), triton.cdiv(slots, _FEWEST_SLOTS)))
    split_slots = _up(triton.cdiv(slots, splits), tile.slots)
    parts = max(1, min(_PROGRAMS // max(rows * groups, 1), triton.cdiv(slots, FINISH_SLOTS)))
    part_slots = _up(triton.cdiv(slots, parts), FINISH_SLOTS)
    splits, parts = triton.cdiv(slots, split_slots), triton.cdiv(slots, part_slots)
    return Plan(tile, block_d, heads, programs, splits, split_slots, parts, part_slots)


def _up(x: int, multiple: int) -> int:
    return triton.cdiv(x, multiple) * multiple


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _check(holds: bool, what: str) -> None:
    """For direct calls of the operators; the public functions have clearer words."""
    if not holds:
        raise RuntimeError(f"expected {what}")


def _check_heads(q: Tensor, k: Tensor, v: Tensor, dimensions: int) -> None:
    _check(q.dim() == k.dim() == dimensions, f"q, k and v with {dimensions} dimensions")
    _check(q.dtype == k.dtype == v.dtype and q.dtype in _DTYPES, "q, k and v of one dtype")
    _check(k.shape == v.shape and q.shape[0] == k.shape[0], "q, k and v of one shape")
    _check(q.shape[2:] == k.shape[2:], "q, k and v of one shape")
    heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[-1]
    _check(heads > 0 and kv_heads > 0 and heads % kv_heads == 0, "a multiple of the kv_heads")
    fits = head_dim > 0 and head_dim % 8 == 0 and head_dim <= _LARGEST_HEAD_DIM
    _check(fits, f"a head_dim that is a multiple of 8, up to {_LARGEST_HEAD_DIM}")


def _check_tensor(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    fits = x.shape == shape and x.dtype == dtype and x.is_contiguous()
    _check(fits, f"a contiguous tensor of shape {shape} and {dtype}")


def _check_marks(
    position: Tensor, score: Tensor | None, free: Tensor, seen: Tensor, last_evicted: Tensor,
    kind: int,
) -> None:  # fmt: skip
    _check(position.dim() == 3 and position.shape[2] >= 2, "positions (B, 1 or Hkv, slots + 1)")
    batch, groups, slots = position.shape
    _check(slots < _NO_ROOM, "fewer slots")
    _check_tensor(position, (batch, groups, slots), torch.int64)
    if score is not None:
        kept = slots if kind == _ACCUMULATED else 0
        _check_tensor(score, (batch, groups, kept), torch.float32)
    _check_tensor(free, (batch, groups), torch.int64)
    _check_tensor(seen, (batch,), torch.int64)
    _check_tensor(last_evicted, (batch, groups), torch.int64)


def _check_state(k: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> None:
    kv_heads, head_dim = k.shape[1], k.shape[-1]
    count, groups, slots = position.shape
    _check(groups in (1, kv_heads), "a state of the heads of k")
    for x in (keys, values):
        _check_tensor(x, (count, kv_heads, slots, head_dim), k.dtype)


def _check_rows(rows: Tensor | None, batch: int, position: Tensor) -> None:
    if rows is None:
        _check(position.shape[0] == batch, "a state of the batch of k")
        return
    _check(rows.dtype in (torch.int32, torch.int64), "int32 or int64 rows")
    _check_tensor(rows, (batch,), rows.dtype)


def _adjacent(x: Tensor) -> Tensor:
    """Elements of head_dim side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of rows, heads and time."""
    return x.stride(0), x.stride(1), x.stride(2) if x.dim() == 4 else 0


class _Step:
    """The memory of a step and its two launches; a sequence repeats them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, keys: Tensor, values: Tensor,
        position: Tensor, score: Tensor | None, free: Tensor, seen: Tensor,
        last_evicted: Tensor | None, policy: tuple[int, int, int], scale: float, *,
        rows: Tensor | None = None, scores: Tensor | None = None, valid: Tensor | None = None,
        expiry: Tensor | None = None, times: Tensor | None = None,
    ) -> None:  # fmt: skip
        q, k, v = _adjacent(q), _adjacent(k), _adjacent(v)
        batch, query_heads, head_dim = q.shape[0], q.shape[1], q.shape[-1]
        kv_heads, (groups, slots) = k.shape[1], position.shape[1:]
        kind, sinks, recent = policy
        p = plan(batch, query_heads, kv_heads, groups, slots, head_dim, q.element_size())
        scored = scores is not None or kind != 0
        partial = logits = None
        if p.splits > 1:
            partial = q.new_empty((batch, query_heads, p.splits, head_dim), dtype=torch.float32)
        if scored:
            logits = q.new_empty((batch, query_heads, slots), dtype=torch.float32)
        sums = q.new_empty((batch, query_heads, p.splits, 2), dtype=torch.float32)
        exchange_size = step_kernels.CANDIDATES.value + step_kernels.CANDIDATE.value * p.parts
        exchange = position.new_empty((batch, groups, exchange_size))
        pieces = triton.cdiv(head_dim, FINISH_ELEMENTS)
        outputs = batch * query_heads * pieces if p.splits > 1 else 0
        both = {
            "out": out, "strides_out": _strides(out), "valid": valid,
            "time": q.shape[2] if q.dim() == 4 else 1, "rows": rows, "position": position,
            "free": free, "seen": seen, "partial": partial, "sums": sums, "logits": logits,
            "exchange": exchange, "exchange_size": exchange_size, "slots": slots,
            "splits": p.splits, "split_slots": p.split_slots, "QUERY_HEADS": query_heads,
            "GROUPS": groups, "HEAD_DIM": head_dim,
        }  # fmt: skip
        self._like = q
        self._attend_grid = (p.programs * p.splits,)
        self._attend = {
            **both, "q": q, "strides_q": _strides(q), "k": k, "strides_k": _strides(k), "v": v,
            "strides_v": _strides(v), "state_rows": keys.shape[0], "keys": keys, "values": values,
            "scale": scale * math.log2(math.e), "KV_HEADS": kv_heads, "ROWS": p.heads,
            "BLOCK_N": p.tile.slots, "BLOCK_D": p.block_d, "num_warps": p.tile.warps,
            "num_stages": p.tile.stages, **_ALIKE,
        }  # fmt: skip
        self._finish_grid = (outputs + batch * groups * p.parts,)
        self._finish = {
            **both, "score": score, "last_evicted": last_evicted, "scores": scores,
            "expiry": expiry, "times": times, "parts": p.parts, "part_slots": p.part_slots,
            "outputs": outputs, "sinks": sinks, "recent": recent, "KIND": kind,
            "SPLITS": triton.next_power_of_2(p.splits),
            "PARTS": triton.next_power_of_2(p.parts), "BLOCK_OUT": FINISH_ELEMENTS,
            "BLOCK_H": min(FINISH_HEADS, triton.next_power_of_2(query_heads // groups)),
            "BLOCK_S": FINISH_SLOTS, "num_warps": _FINISH_WARPS, **_ALIKE,
        }  # fmt: skip
        _check(max(self._attend_grid + self._finish_grid) < _NO_ROOM, "fewer rows and slots")

    def run(self, steps: int = 1) -> None:
        if self._finish_grid[0] == 0:
            return
        with _on(self._like):
            for t in range(steps):
                step_kernels.attend[self._attend_grid](t=t, **self._attend)
                step_kernels.finish[self._finish_grid](t=t, **self._finish)


def attend_evict(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, keys: Tensor, values: Tensor,
    position: Tensor,
    score: Tensor, free: Tensor, seen: Tensor, last_evicted: Tensor, kind: int, sinks: int,
    recent: int, scale: float,
) -> Tensor:  # fmt: skip
    _check_heads(q, k, v, 3)
    _check_marks(position, score, free, seen, last_evicted, kind)
    _check_state(k, keys, values, position)
    _check_rows(rows, q.shape[0], position)
    out = q.new_empty(q.shape)
    state = keys, values, position, score, free, seen, last_evicted
    _Step(q, k, v, out, *state, (kind, sinks, recent), scale, rows=rows).run()
    return out


def attend_scores(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, keys: Tensor, values: Tensor,
    position: Tensor,
    free: Tensor, seen: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_heads(q, k, v, 3)
    _check_marks(position, None, free, seen, free, 0)
    _check_state(k, keys, values, position)
    _check_rows(rows, q.shape[0], position)
    out = q.new_empty(q.shape)
    empty = position.new_empty if rows is None else position.new_zeros
    scores = empty((q.shape[0], *position.shape[1:]), dtype=torch.float32)
    state = keys, values, position, None, free, seen, None
    _Step(q, k, v, out, *state, (0, 0, 0), scale, rows=rows, scores=scores).run()
    return out, scores


def evict(
    scores: Tensor, rows: Tensor | None, position: Tensor, score: Tensor, free: Tensor,
    seen: Tensor, last_evicted: Tensor, kind: int, sinks: int, recent: int,
) -> None:  # fmt: skip
    _check_marks(position, score, free, seen, last_evicted, kind)
    batch, (groups, slots) = scores.shape[0], position.shape[1:]
    _check_tensor(scores, (batch, groups, slots), torch.float32)
    _check_rows(rows, batch, position)
    if batch == 0:
        return
    block = min(512, max(32 * _FINISH_WARPS, triton.next_power_of_2(slots)))
    with _on(position):
        step_kernels.evict[(batch,)](
            scores, rows, position.shape[0], position, score, free, seen, last_evicted, slots,
            sinks, recent, GROUPS=groups, KIND=kind, BLOCK_S=block, num_warps=_FINISH_WARPS,
            **_ALIKE,
        )  # fmt: skip


def attend_sequence(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, slots: int, per_head: bool, kind: int,
    sinks: int, recent: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A state of its own, never of more slots than tokens, and a step for every token."""
    _check_heads(q, k, v, 4)
    _check(slots >= 1, "at least one slot")
    batch, kv_heads, time, head_dim = k.shape
    groups = kv_heads if per_head else 1
    slots = min(slots, time) + 1
    whole = functools.partial(torch.full, dtype=torch.int64, device=q.device)
    expiry = whole((batch, groups, time), time)
    times = None
    if valid is not None:
        _check_tensor(valid, (batch, time), torch.bool)
        step = torch.arange(time, device=q.device)
        expiry = torch.where(valid[:, None], expiry, step)
        times = valid.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    out = q.new_zeros(q.shape)
    if batch == 0 or time == 0:
        return out, expiry
    keys = k.new_empty((batch, kv_heads, slots, head_dim))
    values = torch.empty_like(keys)
    scored = slots if kind == _ACCUMULATED else 0
    score = q.new_zeros((batch, groups, scored), dtype=torch.float32)
    position, free = whole((batch, groups, slots), -1), whole((batch, groups), 0)
    seen, last_evicted = whole((batch,), 0), whole((batch, groups), -1)
    state = keys, values, position, score, free, seen, last_evicted
    _Step(
        q, k, v, out, *state, (kind, sinks, recent), scale,
        valid=valid, expiry=expiry, times=times,
    ).run(time)  # fmt: skip
    return out, expiry


OPERATORS: dict[str, Callable[..., Any]] = {
    "attend_evict": attend_evict,
    "attend_scores": attend_scores,
    "evict": evict,
    "attend_sequence": attend_sequence,
}
