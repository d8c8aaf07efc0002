"""Every op, one step at a time, as one would write it on a blackboard.

Slow, any device, any floating dtype, differentiable by PyTorch itself. In float64 this is the truth
that every kernel is tested against. 16-bit inputs are computed in float32, like everywhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from msrnn_ops.state import MultiState, Policy, restore

Step = Callable[[Tensor, tuple[Tensor, ...]], Tensor]


_WIDE = (torch.float64, torch.complex64, torch.complex128)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gates, carries and sums are computed in: float32, but for wider and complex numbers."""
    return dtype if dtype in _WIDE else torch.float32


def g(x: Tensor) -> Tensor:
    """x + 1/2 for x >= 0, sigma(x) otherwise: positive, continuous, and its slope is too."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def activate(x: Tensor, activation: str) -> Tensor:
    return g(x) if activation == "g" else x


def linear_step(h: Tensor, x: tuple[Tensor, ...]) -> Tensor:
    a, b = x
    return a * h + b


def decay_step(h: Tensor, x: tuple[Tensor, ...]) -> Tensor:
    log_a, b = x
    return log_a.exp() * h + b


def log_step(log_h: Tensor, x: tuple[Tensor, ...]) -> Tensor:
    log_a, log_b = x
    left = log_a + log_h
    larger, lesser = torch.maximum(left, log_b), torch.minimum(left, log_b)
    distance = torch.where(larger == lesser, 0.0, lesser - larger)
    dead = larger == -torch.inf  # log(0 + 0): no gradient flows
    return torch.where(dead, -torch.inf, larger + torch.log1p(distance.exp()))


def min_gru_step(h: Tensor, x: tuple[Tensor, ...], activation: str) -> Tensor:
    gate, candidate = x
    z = torch.sigmoid(gate)
    return torch.sigmoid(-gate) * h + z * activate(candidate, activation)


def min_lstm_step(h: Tensor, x: tuple[Tensor, ...], activation: str) -> Tensor:
    forget, input, candidate = x
    # f / (f + i) and i / (f + i), without forming f and i, which may both be 0.
    difference = softplus(-forget) - softplus(-input)
    keep, take = torch.sigmoid(-difference), torch.sigmoid(difference)
    return keep * h + take * activate(candidate, activation)


def scan(
    step: Step,
    inputs: tuple[Tensor, ...],
    h0: Tensor | None,
    *,
    start: float = 0.0,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All states (B, T, D), and the last one of each sequence in the accumulation dtype."""
    dtype = inputs[0].dtype
    wide = accumulation_dtype(dtype)
    inputs = tuple(x.to(wide) for x in inputs)
    batch, time, channels = inputs[0].shape
    rows = [(b, 0, time) for b in range(batch)]
    before = after = 0  # steps that no sequence covers
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        if ends != sorted(ends) or ends[0] < 0 or ends[-1] > time:
            raise ValueError(
                f"expected cu_seqlens from 0 to T = {time}, not to decrease, got {ends}"
            )
        rows = [(0, begin, end) for begin, end in itertools.pairwise(ends)]
        before, after = ends[0], time - ends[-1]
    nothing = inputs[0].new_full((channels,), start)
    if batch and time:
        nothing = torch.full_like(inputs[0][0, 0], start)  # batched where torch.vmap batches
    outputs, lasts = [inputs[0].new_zeros(before, channels)], []
    for n, (b, begin, end) in enumerate(rows):
        h = nothing if h0 is None else h0[n].to(wide)
        states: list[Tensor] = [h.new_empty(0, channels)]
        for t in reversed(range(begin, end)) if reverse else range(begin, end):
            border = t + 1 if reverse else t
            if resets is not None and border < end:
                h = torch.where(resets[b, border], nothing, h)
            h = step(h, tuple(x[b, t] for x in inputs))
            states.append(h[None])
        outputs.append(torch.cat(states[:1] + states[:0:-1] if reverse else states))
        lasts.append(h)
    h_all = torch.cat([*outputs, inputs[0].new_zeros(after, channels)])
    last = torch.stack(lasts) if lasts else inputs[0].new_empty(0, channels)
    return h_all.reshape(batch, time, channels).to(dtype), last


def step_rows(step: Step, inputs: tuple[Tensor, ...], h: Tensor, rows: Tensor) -> Tensor:
    """One token for some rows of a larger state h (rows of it, D), changed in place; (B, D)."""
    out = h.new_zeros(rows.shape[0], h.shape[1])
    for b, row in used_rows(rows, h.shape[0]):
        h[row] = out[b] = step(h[row], tuple(x[b].to(h.dtype) for x in inputs))
    return out


# Rows by index.


def used_rows(rows: Tensor | None, count: int) -> list[tuple[int, int]]:
    """Each row of a batch that uses a row of a state of ``count`` rows, and which one.

    A row that is named is one of the state that no earlier row of the batch names.
    """
    if rows is None:
        return [(b, b) for b in range(count)]
    pairs: list[tuple[int, int]] = []
    for b, row in enumerate(rows.tolist()):
        if 0 <= row < count and row not in dict(pairs).values():
            pairs.append((b, row))
    return pairs


# Multi-state attention. A state is the object of state.py, changed in place.

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _without_autocast(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Matrix products of a reference are not rounded to 16 bits."""

    @wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        q = args[0] if args else kwargs["q"]
        assert isinstance(q, Tensor)
        with torch.autocast(q.device.type, enabled=False):
            return function(*args, **kwargs)

    return run


def _widened(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def _groups(x: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, ...) as (B, Hkv, Hq / Hkv, ...)."""
    return x.unflatten(1, (kv_heads, -1))


@contextmanager
def _rows_of(state: MultiState, rows: Tensor | None) -> Iterator[tuple[Tensor, MultiState]]:
    """The rows of a batch that use one of the state, and these rows as a state of their own."""
    pairs = used_rows(rows, state.seen.shape[0])
    batch, index = (
        torch.tensor(x, dtype=torch.int64, device=state.device)
        for x in ([b for b, _ in pairs], [row for _, row in pairs])
    )
    mine = restore([x[index] for x in state.tensors()], state.policy)
    yield batch, mine
    for x, changed in zip(state.tensors(), mine.tensors(), strict=True):
        x[index] = changed


@_without_autocast
def attend_scores(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, state: MultiState, scale: float
) -> tuple[Tensor, Tensor]:
    """Stores a token of every row in its free slot and attends over all occupied ones."""
    if rows is not None:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        all_scores = _widened(q).new_zeros(len(q), *state.position.shape[1:])
        with _rows_of(state, rows) as (b, mine):
            out[b], all_scores[b] = attend_scores(q[b], k[b], v[b], None, mine, scale)
        return out, all_scores
    kv_heads, groups = k.shape[1], state.position.shape[1]
    rows = torch.arange(k.shape[0], device=k.device)[:, None]
    state.position[rows, torch.arange(groups, device=k.device), state.free] = state.seen[:, None]
    slot = state.free.expand(-1, kv_heads)
    heads = torch.arange(kv_heads, device=k.device)
    state.keys[rows, heads, slot] = k
    state.values[rows, heads, slot] = v

    occupied = (state.position >= 0).expand(-1, kv_heads, -1)[..., None]  # (B, Hkv, N+1, 1)
    keys = torch.where(occupied, _widened(state.keys), 0)
    values = torch.where(occupied, _widened(state.values), 0)
    logits = _groups(_widened(q), kv_heads) @ keys.transpose(2, 3) * scale
    empty = ~occupied.transpose(2, 3)
    weights = logits.masked_fill(empty, -torch.inf).softmax(-1).masked_fill(empty, 0)
    scores = weights.sum(2)  # over the query heads of each key-value head
    if groups == 1:
        scores = scores.sum(1, keepdim=True)
    return (weights @ values).flatten(1, 2).to(q.dtype), scores


def evict(state: MultiState, scores: Tensor, rows: Tensor | None) -> None:
    """Drops the lowest unprotected state of every row and group that holds more than N."""
    if rows is not None:
        with _rows_of(state, rows) as (index, mine):
            evict(mine, scores[index], None)
        return
    policy = state.policy
    for b in range(state.position.shape[0]):
        waiting = False
        now = int(state.seen[b])
        for g in range(state.position.shape[1]):
            position = state.position[b, g]
            if position[state.free[b, g]] < 0:
                continue
            waiting = True
            value = scores[b, g] if policy.score == "attention" else torch.zeros_like(scores[b, g])
            if policy.score == "accumulated":
                state.score[b, g] += scores[b, g]
                value = state.score[b, g]
            kept = [(int(p), slot) for slot, p in enumerate(position.tolist()) if p >= 0]
            state.last_evicted[b, g] = -1
            if len(kept) > policy.slots:
                victim = _lowest(policy, {p: float(value[slot]) for p, slot in kept}, now)[0]
                slot = dict(kept)[victim]
                state.last_evicted[b, g], position[slot] = victim, -1
                if policy.score == "accumulated":
                    state.score[b, g, slot] = 0
            state.free[b, g] = int((position < 0).nonzero()[0])
        if waiting:
            state.seen[b] += 1


def _lowest(policy: Policy, scores: dict[int, float], now: int) -> list[int]:
    """The unprotected positions in the order in which they go."""
    free = [p for p in scores if p >= policy.sinks and p <= now - policy.recent]

    def order(p: int) -> tuple[bool, float, int]:
        number = scores[p] == scores[p]
        return number, scores[p] if number else 0.0, p

    return sorted(free, key=order)


@_without_autocast
def attend_evict(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, state: MultiState, scale: float
) -> Tensor:
    out, scores = attend_scores(q, k, v, rows, state, scale)
    evict(state, scores, rows)
    return out


@_without_autocast
def attend_prompt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: MultiState,
    valid: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: Tensor | None,
    scale: float,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Row by row and query by query: attend over the kept states and the prompt so far.

    ``total`` is asked for the sum of a row's scores over ranks that have other heads.
    """
    policy, kv_heads, groups = state.policy, k.shape[1], state.position.shape[1]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    if cu_seqlens is not None:
        with _rows_of(state, rows) as (index, mine):
            for i, n in enumerate(index.tolist()):
                tokens = slice(int(cu_seqlens[n]), int(cu_seqlens[n + 1]))
                one_q, one_k, one_v = (x[tokens].transpose(0, 1)[None] for x in (q, k, v))
                row = torch.tensor([i])
                found = attend_prompt(one_q, one_k, one_v, mine, None, None, row, scale, total)
                out[tokens] = found[0].transpose(0, 1)
        return out
    if rows is not None:
        with _rows_of(state, rows) as (index, mine):
            real = None if valid is None else valid[index]
            mine_out = attend_prompt(
                q[index], k[index], v[index], mine, real, None, None, scale, total
            )
            out[index] = mine_out
        return out
    for b in range(q.shape[0]):
        times = list(range(q.shape[2])) if valid is None else valid[b].nonzero()[:, 0].tolist()
        state.last_evicted[b] = -1
        if not times:
            continue
        # A token that waits for `evict` is replaced.
        state.position[b].scatter_(-1, state.free[b][:, None], -1)
        seen = int(state.seen[b])
        now = seen + len(times) - 1
        # Positions and rows of what is kept, for each group; the prompt's own tokens follow.
        slots = [(state.position[b, g] >= 0).nonzero()[:, 0] for g in range(groups)]
        wide = _widened(q).dtype
        scores = [q.new_zeros(len(slots[g]) + len(times), dtype=wide) for g in range(groups)]
        for h in range(kv_heads):
            g = h % groups
            keys = _widened(torch.cat([state.keys[b, h, slots[g]], k[b, h, times]]))
            values = _widened(torch.cat([state.values[b, h, slots[g]], v[b, h, times]]))
            for i, t in enumerate(times):
                end = len(slots[g]) + i + 1
                query = _widened(_groups(q[:, :, t], kv_heads)[b, h])
                weights = (query @ keys[:end].T * scale).softmax(-1)
                _groups(out[:, :, t], kv_heads)[b, h] = (weights @ values[:end]).to(q.dtype)
                if policy.score == "accumulated" or i == len(times) - 1:
                    scores[g][:end] += weights.sum(0)
        for g in range(groups):
            scores[g] = scores[g] if total is None else total(scores[g])
            if policy.score == "accumulated":
                scores[g][: len(slots[g])] += state.score[b, g, slots[g]]
            _reduce(state, b, g, slots[g], scores[g], k, v, times, now)
        state.seen[b] += len(times)
    return out


def _reduce(
    state: MultiState,
    b: int,
    g: int,
    slots: Tensor,
    scores: Tensor,
    k: Tensor,
    v: Tensor,
    times: list[int],
    now: int,
) -> None:
    """Keeps N of a row's states and new tokens; the survivors among the tokens are stored."""
    policy, groups = state.policy, state.position.shape[1]
    heads = slice(None) if groups == 1 else slice(g, g + 1)
    old = [int(p) for p in state.position[b, g, slots]]
    new = [int(state.seen[b]) + i for i in range(len(times))]
    score = dict(zip(old + new, scores.tolist(), strict=True))
    value = dict.fromkeys(score, 0.0) if policy.score == "position" else score
    excess = max(len(score) - policy.slots, 0)
    dropped = _lowest(policy, value, now)[:excess]
    state.last_evicted[b, g] = dropped[-1] if dropped else -1
    for p, slot in zip(old, slots.tolist(), strict=True):
        if p in dropped:
            state.position[b, g, slot] = -1
    for p, t in zip(new, times, strict=True):
        if p not in dropped:
            slot = int((state.position[b, g] < 0).nonzero()[0])
            state.position[b, g, slot] = p
            state.keys[b, heads, slot], state.values[b, heads, slot] = (
                k[b, heads, t],
                v[b, heads, t],
            )
    if policy.score == "accumulated":
        for slot, p in enumerate(state.position[b, g].tolist()):
            state.score[b, g, slot] = score[p] if p >= 0 else 0
    state.free[b, g] = int((state.position[b, g] < 0).nonzero()[0])


@_without_autocast
def attend_sequence(
    q: Tensor, k: Tensor, v: Tensor, policy: Policy, valid: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """One row at a time: a step for every token notes when a key goes; then masked attention."""
    batch, _, time, head_dim = q.shape
    kv_heads = k.shape[1]
    groups = 1 if policy.scope == "layer" else kv_heads
    expiry = torch.full((batch, groups, time), time, device=q.device)
    for b in range(batch):
        state = MultiState(
            policy, batch=1, kv_heads=kv_heads, head_dim=head_dim, dtype=k.dtype, device=k.device
        )
        times: list[int] = []
        for t in range(time):
            if valid is not None and not valid[b, t]:
                expiry[b, :, t] = t
                continue
            times.append(t)
            row = slice(b, b + 1)
            with torch.no_grad():
                attend_evict(q[row, :, t], k[row, :, t], v[row, :, t], None, state, scale)
            for g, evicted in enumerate(state.last_evicted[0].tolist()):
                if evicted >= 0:
                    expiry[b, g, times[evicted]] = t + 1
    step = torch.arange(time, device=q.device)
    visible = (step[:, None] >= step) & (step[:, None] < expiry[..., None, :])  # (B, G, T, T)
    visible = visible.expand(-1, kv_heads, -1, -1)[:, :, None]
    logits = _groups(_widened(q), kv_heads) @ _widened(k)[:, :, None].transpose(3, 4) * scale
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    weights = torch.where(visible.any(-1, keepdim=True), weights, 0)
    out = (weights @ _widened(v)[:, :, None]).flatten(1, 2).to(q.dtype)
    if valid is not None:
        out = torch.where(valid[:, None, :, None], out, 0)
    return out, expiry
