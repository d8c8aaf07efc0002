"""What PyTorch's operators compute: a prompt, and on a GPU the backward pass of a sequence.

Both run once a prompt or a training step and are mostly matrix products, which are in good hands
there. A prompt attends in one of two ways:

- :func:`output_by_rows`, on a CPU: each row without its padding, so that PyTorch's attention runs
  its causal kernel and no mask is made;
- :func:`output_by_parts`, on a GPU: all rows under a mask, so that nothing waits for the device. No
  T*T weights are held: as many queries at a time meet all columns as memory allows. float32
  products follow torch.set_float32_matmul_precision.

Packed prompts are taken one after the other. What a prompt keeps of the row of the state that it
continues is copied, as the attention of PyTorch wants keys and values side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

_WEIGHTS_AT_ONCE = 1 << 25  # of all rows and heads: 128 MB, and what is computed from them
_STATE_TENSORS = 7  # as MultiState.TENSORS
_QUERIES_AT_ONCE = 256  # rows of a mask, where a prompt meets a state that is not empty


def used_rows(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which rows of a batch use a row of a state of ``count``, (B,) bool, and which one, in bounds.

    As RowIndex of csrc/rows.h: not those that name none, or one that an earlier row names.
    """
    named = rows.to(torch.int64)
    earlier = (named[:, None] == named).tril(-1).any(1)
    used = (named >= 0) & (named < count) & ~earlier
    return used, torch.where(used, named, 0).clamp_max(max(count - 1, 0))


def attend_prompt(
    output: Callable[..., Tensor],
    store: Callable[..., None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: Tensor | None,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    score: Tensor,
    free: Tensor,
    *rest: Any,
) -> Tensor:
    """Attention by one of the two ways, then the reduction to N states by ``store``."""
    kept, scale = (keys, values, position, score, free, *rest), rest[-1]
    if cu_seqlens is not None:
        return _attend_packed(output, store, (q, k, v), cu_seqlens, rows, kept)
    valid = None if valid is None else valid.contiguous()
    mine, used = kept[:5], None
    if rows is not None:
        used, index = used_rows(rows, position.shape[0])
        mine = tuple(_select(x, index) for x in kept[:5])
        valid = _of_used(valid, used, q.shape[2])
    # A token that waits for `evict` is replaced.
    waiting = mine[4].clamp(0, position.shape[2] - 1)[..., None]
    out = output(q, k, v, valid, *mine[:2], mine[2].scatter(-1, waiting, -1), scale)
    store(q, k, v, valid, rows, *kept)
    return out


def _select(x: Tensor, index: Tensor) -> Tensor:
    """Rows of the state; one alone is not copied where its number is known."""
    if len(index) == 1 and index.is_cpu:
        return x.narrow(0, int(index), 1)
    return x.index_select(0, index)


def _of_used(valid: Tensor | None, used: Tensor, time: int) -> Tensor:
    """Which tokens are real, (B, T), if those of rows that do nothing are not."""
    real = used[:, None]
    return real.expand(-1, time).contiguous() if valid is None else valid & real


def _attend_packed(
    output: Callable[..., Tensor],
    store: Callable[..., None],
    tokens: tuple[Tensor, ...],
    cu_seqlens: Tensor,
    rows: Tensor | None,
    kept: tuple[Any, ...],
) -> Tensor:
    """Prompts that lie one behind the other, (total, H, Dh); 0 where no prompt is.

    Their lengths are numbers of Python: cu_seqlens on a GPU are waited for.
    """
    out = torch.zeros_like(tokens[0], memory_format=torch.contiguous_format)
    ends = [min(max(end, 0), len(out)) for end in cu_seqlens.tolist()]
    if rows is None:
        rows = torch.arange(len(ends) - 1, device=out.device)
    used, index = used_rows(rows, kept[2].shape[0])
    index = torch.where(used, index, -1)
    for n, (start, end) in enumerate(itertools.pairwise(ends)):
        if start < end:
            q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in tokens)
            one = attend_prompt(output, store, q, k, v, None, None, index[n : n + 1], *kept)
            out[start:end] = one[0].transpose(0, 1)
    return out


def _scaled(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries and a scale > 0 of the same logits.

    PyTorch's CPU kernel scales the -inf of what a query does not see: NaN for 0, +inf below it.
    """
    positive = abs(scale) if abs(scale) >= torch.finfo(torch.float32).tiny else 1.0
    return (q, scale) if scale == positive else (q * (scale / positive), positive)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of the last queries (B, H, T, Dh) onto all keys (B, H, before + T, Dh)."""
    queries, columns = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    q, scale = _scaled(q, scale)
    if queries == columns:
        return scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
    before = columns - queries
    parts = []
    for start in range(0, queries, _QUERIES_AT_ONCE):
        end = min(start + _QUERIES_AT_ONCE, queries)
        seen = torch.ones(end - start, before + end, dtype=torch.bool, device=q.device)
        parts.append(
            scaled_dot_product_attention(
                q[:, :, start:end],
                k[:, :, : before + end],
                v[:, :, : before + end],
                attn_mask=seen.tril(before + start),
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return torch.cat(parts, 2)


def output_by_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scale: float,
) -> Tensor:
    """Attention of every query to the kept states and to the prompt up to itself, row by row."""
    if q.numel() == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    kept = (position >= 0).sum(-1).tolist()  # (B, G)
    if valid is None and not any(map(any, kept)):
        return _causal(q, k, v, scale).contiguous()
    out = q.new_zeros(q.shape)
    for b in range(q.shape[0]):
        if len(set(kept[b])) > 1:  # where slots were emptied from outside
            row = slice(b, b + 1)
            real = None if valid is None else valid[row]
            alone = (q[row], k[row], v[row], real, keys[row], values[row], position[row])
            out[row] = output_by_parts(*alone, scale)
            continue
        token = slice(None) if valid is None else valid[b].nonzero()[:, 0]
        # Slots of the kept states, in the order of their positions, for every key-value head.
        order = position[b].argsort(-1, descending=True)[:, : kept[b][0]].flip(-1)
        slots = order[..., None].expand(k.shape[1], -1, k.shape[3])
        row_k = torch.cat([keys[b].gather(1, slots), k[b][:, token]], 1)
        row_v = torch.cat([values[b].gather(1, slots), v[b][:, token]], 1)
        row_q = q[b][:, token]
        if row_q.shape[1]:
            out[b, :, token] = _causal(row_q[None], row_k[None], row_v[None], scale)[0]
    return out


def _check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    """For direct calls of the operators; the public functions have clearer words."""
    shapes = f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
    fits = q.dim() == k.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    if not fits or k.shape != v.shape:
        raise RuntimeError(f"expected q (B, Hq, T, Dh), k and v (B, Hkv, T, Dh), {shapes}")
    if not q.shape[1] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise RuntimeError(f"expected a multiple of the key-value heads as query heads, {shapes}")


def _check_shapes(shape: tuple[int, ...], *tensors: Tensor) -> None:
    for x in tensors:
        if x.shape != shape:
            raise RuntimeError(f"expected a tensor of shape {shape}, got {tuple(x.shape)}")


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, T, Dh) as (B, Hkv, Hq / Hkv * T, Dh): heads that share keys are so many queries."""
    return x.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _fold_mask(visible: Tensor, sharing: int) -> Tensor:
    """(B, G, queries, columns) likewise."""
    return visible[:, :, None].expand(-1, -1, sharing, -1, -1).flatten(2, 3)


def _real(valid: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Padding, which may hold anything, as zeros."""
    if valid is None:
        return tensors
    return tuple(torch.where(valid[:, None, :, None], x, 0) for x in tensors)


def _parts(q: Tensor, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of queries (B, Hq, T, Dh) that meet so many columns at once."""
    batch, heads, time, _ = q.shape
    most = max(1, _WEIGHTS_AT_ONCE // max(1, batch * heads * columns))
    for start in range(0, time, most):
        yield start, min(start + most, time)


def _softmax(logits: Tensor, visible: Tensor) -> Tensor:
    """Over the visible columns; 0 elsewhere, also where a query sees none."""
    return logits.masked_fill(~visible, -torch.inf).softmax(-1).masked_fill(~visible, 0)


def _where_kept(kept: Tensor, x: Tensor) -> Tensor:
    """Rows (B, Hkv, slots, Dh) of empty slots, which may hold anything, as zeros."""
    return torch.where(kept[..., None], x, 0)


def output_by_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scale: float,
) -> Tensor:
    """The same for all rows at once, under a mask."""
    if q.numel() == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    q, k, v = _real(valid, q, k, v)
    kept = position >= 0
    all_keys = torch.cat([_where_kept(kept, keys), k], 2)
    all_values = torch.cat([_where_kept(kept, values), v], 2)
    slots, time, kv_heads = keys.shape[2], q.shape[2], k.shape[1]
    sharing = q.shape[1] // kv_heads
    step = torch.arange(time, device=q.device)
    q, scale = _scaled(q, scale)
    parts = []
    for start, end in _parts(q, slots + time):
        tokens = (step[start:end, None] >= step[:end]).expand(q.shape[0], 1, -1, -1)
        if valid is not None:
            tokens = tokens & valid[:, None, None, :end]
        states = kept[:, :, None].expand(-1, -1, end - start, -1)
        visible = torch.cat([states, tokens.expand(-1, kept.shape[1], -1, -1)], 3)
        out = scaled_dot_product_attention(
            _fold(q[:, :, start:end], kv_heads),
            all_keys[:, :, : slots + end],
            all_values[:, :, : slots + end],
            attn_mask=_fold_mask(visible, sharing),
            scale=scale,
        )
        parts.append(out.unflatten(2, (sharing, -1)).flatten(1, 2))
    out = torch.cat(parts, 2)
    return out if valid is None else torch.where(valid[:, None, :, None], out, 0)


def _attention(
    q: Tensor,
    k: Tensor,
    keys: Tensor,
    kept: Tensor,
    real: Tensor,
    every_query: bool,
    scale: float,
) -> Tensor:
    """What each column, slots and then tokens, gets of the prompt's queries: (B, G, columns)."""
    kv_heads, slots, time = k.shape[1], keys.shape[2], k.shape[2]
    columns = torch.cat([_where_kept(kept, keys), k], 2).float().transpose(2, 3)
    step = torch.arange(time, device=q.device)
    there = torch.cat([kept, real[:, None].expand(-1, kept.shape[1], -1)], 2)
    total = columns.new_zeros(k.shape[0], kv_heads, slots + time)
    if every_query:
        ranges = _parts(q, slots + time)
        parts = [(q[:, :, a:b], step[None, a:b].expand(len(q), -1)) for a, b in ranges]
    else:
        last = torch.where(real, step, 0).amax(1, keepdim=True)  # (B, 1)
        index = last[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
        parts = [(q.gather(2, index), last)]
    for queries, times in parts:
        before = step <= times[..., None]  # (B, queries, T)
        before = torch.cat([before.new_ones(*times.shape, slots), before], -1)
        before = before & real.gather(1, times)[..., None]
        visible = _fold_mask(there[:, :, None] & before[:, None], q.shape[1] // kv_heads)
        total += _softmax(_fold(queries, kv_heads).float() @ columns * scale, visible).sum(2)
    return total if kept.shape[1] > 1 else total.sum(1, keepdim=True)


def store_prompt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    rows: Tensor | None,
    *args: Any,
    total: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Keeps N of the kept states and the prompt's tokens; the survivors among these are stored.

    The arguments are those of the schema: after ``rows`` the state, the policy and the scale.
    ``total`` is asked for the sum of a layer's scores over ranks that have other heads.
    """
    _check_operands(q, k, v)
    if rows is None:
        return _store_prompt(q, k, v, valid, *args, total=total)
    state, rest = args[:_STATE_TENSORS], args[_STATE_TENSORS:]
    if k.shape[0] == 0 or state[0].shape[0] == 0:
        return
    used, index = used_rows(rows, state[0].shape[0])
    before = [x.index_select(0, index) for x in state]
    after = [x.clone() for x in before]
    _store_prompt(q, k, v, _of_used(valid, used, k.shape[2]), *after, *rest, total=total)
    # Nothing waits to learn which rows are used. One that is not writes what the first one that is
    # writes, a second time; if none is, the rows of the state get what they held.
    first = torch.where(used.any(), used.to(torch.int8).argmax(), 0)
    source = torch.where(used, torch.arange(len(used), device=used.device), first)
    for x, old, new in zip(state, before, after, strict=True):
        new = torch.where(used.view(-1, *[1] * (x.dim() - 1)), new, old)
        x.index_copy_(0, index.index_select(0, source), new.index_select(0, source))


def _store_prompt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    score: Tensor,
    free: Tensor,
    seen: Tensor,
    last_evicted: Tensor,
    kind: int,
    sinks: int,
    recent: int,
    scale: float,
    *,
    total: Callable[[Tensor], Tensor] | None,
) -> None:
    batch, groups, slots = position.shape
    time = k.shape[2]
    _check_shapes((batch, k.shape[1], slots, k.shape[3]), keys, values)
    _check_shapes((batch, groups), free, last_evicted)
    last_evicted.fill_(-1)
    if k.shape[0] == 0 or time == 0:
        return
    q, k, v = _real(valid, q, k, v)
    real = torch.ones_like(seen[:, None].expand(-1, time), dtype=torch.bool)
    real = real if valid is None else valid
    count = real.sum(1)
    waiting = free.clamp(0, slots - 1)[..., None]
    old = position.scatter(-1, waiting, -1)  # a token that waits is replaced
    new = torch.where(real, seen[:, None] + real.cumsum(1) - 1, -1)
    column = torch.cat([old, new[:, None].expand(-1, groups, -1)], -1)  # its position, or -1
    if kind == 0:
        value = column.new_zeros(column.shape, dtype=torch.float32)
    else:
        value = _attention(q, k, keys, old >= 0, real, kind == 2, scale)
        value = value if total is None else total(value)
    if kind == 2:
        value[..., :slots] += score

    # The order in which columns go: NaN first, then by score, of equals the oldest.
    there = column >= 0
    now = (seen + count - 1)[:, None, None]
    unprotected = there & (column >= sinks) & (column <= now - recent)
    key = torch.where(unprotected, torch.where(value.isnan(), -1, value), torch.inf)
    by_position = column.argsort(-1)
    going = by_position.gather(-1, key.gather(-1, by_position).argsort(dim=-1, stable=True))
    nth_to_go = torch.arange(slots + time, device=q.device).expand_as(going)
    rank = torch.empty_like(going).scatter_(-1, going, nth_to_go)
    excess = torch.minimum(there.sum(-1) - (slots - 1), unprotected.sum(-1)).clamp_min(0)
    stays = there & ~(unprotected & (rank < excess[..., None]))
    lost = column.gather(-1, going.gather(-1, (excess - 1).clamp_min(0)[..., None]))[..., 0]
    last_evicted.copy_(torch.where(excess > 0, lost, -1))

    # The n-th surviving token takes the n-th empty slot.
    survives, empty = stays[..., slots:], ~stays[..., :slots]
    tokens = (~survives).to(torch.int8).argsort(dim=-1, stable=True)
    nth = empty.cumsum(-1) - 1
    takes = empty & (nth < survives.sum(-1, keepdim=True))
    token = tokens.gather(-1, nth.clamp(0, time - 1))  # (B, G, slots)
    stored = torch.where(takes, column[..., slots:].gather(-1, token), old)
    stored = torch.where(empty & ~takes, -1, stored)
    per_head = token.expand(-1, k.shape[1], -1)[..., None].expand_as(keys)
    changed = (takes & (count > 0)[:, None, None]).expand(-1, k.shape[1], -1)[..., None]
    keys.copy_(torch.where(changed, k.gather(2, per_head), keys))
    values.copy_(torch.where(changed, v.gather(2, per_head), values))
    any_token = (count > 0)[:, None]
    if kind == 2:
        kept_score = torch.where(takes, value[..., slots:].gather(-1, token), value[..., :slots])
        kept_score = torch.where(stored >= 0, kept_score, 0)
        score.copy_(torch.where(any_token[..., None], kept_score, score))
    position.copy_(torch.where(any_token[..., None], stored, position))
    slot = torch.arange(slots, device=q.device)
    first = torch.where(stored < 0, slot, slots - 1).amin(-1)
    free.copy_(torch.where(any_token, first, free))
    seen += count


def _visible(
    step: Tensor, start: int, end: int, expiry: Tensor, valid: Tensor | None, sharing: int
) -> Tensor:
    """Whether the queries [start, end) of a sequence see the keys before `end`."""
    times = step[start:end, None]
    visible = (times >= step[:end]) & (times < expiry[:, :, None, :end])
    if valid is not None:
        visible = visible & valid[:, None, start:end, None]
    return _fold_mask(visible, sharing)


def attend_sequence(
    q: Tensor, k: Tensor, v: Tensor, expiry: Tensor, valid: Tensor | None, scale: float
) -> Tensor:
    """Causal attention in which key j is visible to the queries j <= t < expiry[j].

    It can be differentiated in any way and any number of times.
    """
    out = [q[:, :, :0]]
    q, k, v = _real(valid, q, k, v)
    kv_heads, time = k.shape[1], k.shape[2]
    sharing = q.shape[1] // kv_heads
    step = torch.arange(time, device=q.device)
    for start, end in _parts(q, time):
        query = _fold(q[:, :, start:end], kv_heads).float()
        logits = query @ k[:, :, :end].float().transpose(2, 3) * scale
        weights = _softmax(logits, _visible(step, start, end, expiry, valid, sharing))
        part = (weights @ v[:, :, :end].float()).unflatten(2, (sharing, -1)).flatten(1, 2)
        out.append(part.to(q.dtype))
    return torch.cat(out, 2)


def attend_sequence_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    expiry: Tensor,
    valid: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of :func:`attend_sequence`, and differentiable likewise."""
    _check_operands(q, k, v)
    _check_shapes(tuple(q.shape), grad_out)
    grad_q = [q[:, :, :0]]
    q, k, v, grad_out = _real(valid, q, k, v, grad_out)
    kv_heads, time = k.shape[1], k.shape[2]
    sharing = q.shape[1] // kv_heads
    step = torch.arange(time, device=q.device)
    keys, values = k.float(), v.float()
    grad_k, grad_v = keys[:, :, :0], values[:, :, :0]
    for start, end in _parts(q, time):
        query, grad = (_fold(x[:, :, start:end], kv_heads).float() for x in (q, grad_out))
        key, value = keys[:, :, :end], values[:, :, :end]
        logits = query @ key.transpose(2, 3) * scale
        weights = _softmax(logits, _visible(step, start, end, expiry, valid, sharing))
        grad_weights = grad @ value.transpose(2, 3)
        mean = (weights * grad_weights).sum(-1, keepdim=True)
        grad_logits = weights * (grad_weights - mean) * scale
        grad_query = (grad_logits @ key).unflatten(2, (sharing, -1)).flatten(1, 2)
        grad_q.append(grad_query.to(q.dtype))
        more = (0, 0, 0, end - start)  # of the keys that no earlier query sees
        grad_k = pad(grad_k, more) + grad_logits.transpose(2, 3) @ query
        grad_v = pad(grad_v, more) + weights.transpose(2, 3) @ grad
    grads = torch.cat(grad_q, 2), grad_k.to(k.dtype), grad_v.to(v.dtype)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()
