"""The kernels of a multi-state step: a token stored, attended for, scored, and one state evicted.

Two launches a token, so that nobody waits for anybody:
  attend   a program has some slots of one key-value head of a row (a split) and the query heads
           that share it. It stores the token if the free slot is among its own, and walks its
           slots block by block with an online softmax, on tensor cores for 16-bit numbers. It
           leaves maximum, sum and partial output of every query head, and all logits where the
           policy scores by attention.
  finish   some programs combine the partial outputs, each a few elements of one query head. Others
           (parts) have some slots of a row and group: they normalise the logits, sum them over
           the query heads, publish the state that would go of their slots, and arrive at a
           counter. The last to arrive picks the victim of all parts.
`evict` alone is one launch, a program a row.

Traffic. Keys and values are read once, 16 bytes at a time, up to the last slot that a token has
reached; more than 32 query heads a key-value head (8 in float32) find them in L2 again. Logits are
4 bytes a query head and slot, written once and read once, through L2: at 32 query heads over 8 of
128 in bfloat16 6 % of the bytes of the slots. A partial output is 4 bytes a query head, element and
split, likewise.

Weights. The product with 16-bit values takes each weight as the sum of two 16-bit numbers, which
keeps 16 bits of it and more: tensor cores have time to spare. Sums run in an order that the plan
fixes, and a minimum over unique positions has none: the same bits in every run.

Rejected: one launch, whose programs wait for the sums of the others. Triton promises neither the
order in which programs start nor that a waiting one makes room. Also the weights of a split in
place of the logits: as many bytes, and one more pass over a split that has several blocks.
"""

import triton
import triton.language as tl

from .rows import row_of

POSITION: tl.constexpr = tl.constexpr(0)  # as ScoreKind of csrc/eviction.h
ACCUMULATED: tl.constexpr = tl.constexpr(2)

# What `attend` and `finish` exchange of a row and group, int64: the row's `seen` before the token,
# arrivals, then four numbers of each part's candidate: rank, position, slot, first empty slot.
NOW: tl.constexpr = tl.constexpr(0)
ARRIVALS: tl.constexpr = tl.constexpr(1)
CANDIDATES: tl.constexpr = tl.constexpr(2)
CANDIDATE: tl.constexpr = tl.constexpr(4)

_INFINITY: tl.constexpr = tl.constexpr(float("inf"))
_NONE: tl.constexpr = tl.constexpr(2**31 - 1)  # a rank or slot behind all others
_NEVER: tl.constexpr = tl.constexpr(2**63 - 1)  # a position likewise
_LOWEST: tl.constexpr = tl.constexpr(-(2**31))
_NOTHING: tl.constexpr = tl.constexpr(-(2**63))  # NOW of a row of the batch that does nothing


@triton.jit
def _used(seen, slots):
    """Slots that any token has reached: the lowest empty one is filled first."""
    return (tl.minimum(tl.maximum(seen, 0), slots - 1) + 1).to(tl.int32)


@triton.jit
def _free_slot(free, slots):
    """The slot of the next token, in bounds whatever `free` holds."""
    return tl.minimum(tl.maximum(tl.load(free), 0), slots - 1).to(tl.int32)


@triton.jit
def _is_real(valid, row, time, t):
    """Whether the token of time t of a row is none of its padding."""
    if valid is None:
        return True
    else:
        return tl.load(valid + row * time + t) != 0


@triton.jit
def _number(x):
    """0 in place of the maximum of nothing, from which nothing can be subtracted."""
    return tl.where(x == -_INFINITY, 0.0, x)


@triton.jit
def _add_values(weights, values, acc):
    """acc + weights @ values, the weights in float32 or as the sum of two 16-bit numbers."""
    if values.dtype == tl.float32:
        return tl.dot(weights, values, acc, input_precision="ieee")
    else:
        high = weights.to(values.dtype)
        low = (weights - high.to(tl.float32)).to(values.dtype)
        finite = tl.where(tl.abs(values) < _INFINITY, values, 0.0)  # low may be 0, or below
        return tl.dot(low, finite, tl.dot(high, values, acc))


@triton.jit(do_not_specialize=["t"])
def attend(
    q, strides_q, k, strides_k, v, strides_v, out, strides_out, t, valid, time,
    rows, state_rows, keys, values, position, free, seen,
    partial, sums, logits, exchange, exchange_size,
    slots, splits, split_slots, scale,
    QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums and partial outputs of a split; out itself where `partial` is None (one split).

    scale includes log2(e). partial (B, Hq, splits, Dh), sums (B, Hq, splits, 2), logits
    (B, Hq, slots) or None. ROWS query heads at once. Row `index` of the batch uses a row of the
    state that it names in `rows`, or None: that of its own number.
    """
    SHARING: tl.constexpr = QUERY_HEADS // KV_HEADS
    TURNS: tl.constexpr = (SHARING + ROWS - 1) // ROWS
    program = tl.program_id(0)
    split = program % splits
    turn = program // splits % TURNS
    kv_head = (program // splits // TURNS % KV_HEADS).to(tl.int64)
    index = (program // splits // TURNS // KV_HEADS).to(tl.int64)
    t = tl.cast(t, tl.int64)
    if not _is_real(valid, index, time, t):
        return
    d = tl.arange(0, BLOCK_D)
    in_row = d < HEAD_DIM
    heads_here = turn * ROWS + tl.arange(0, ROWS)
    in_head = heads_here < SHARING
    head = kv_head * SHARING + heads_here
    store_mask = in_head[:, None] & in_row[None, :]
    is_first = split == 0 and turn == 0 and (GROUPS > 1 or kv_head == 0)
    exchange_at = exchange + (index * GROUPS + (kv_head if GROUPS > 1 else 0)) * exchange_size
    row = row_of(rows, index, state_rows)
    if rows is not None:
        if row < 0:
            if is_first:
                tl.store(exchange_at + NOW, _NOTHING)
            if split == 0:
                to = out + index * strides_out[0] + head * strides_out[1]
                tl.store(
                    to[:, None] + d[None, :],
                    tl.zeros((ROWS, BLOCK_D), out.dtype.element_ty),
                    store_mask,
                )
            return
    group = row * GROUPS + (kv_head if GROUPS > 1 else 0)
    now = tl.load(seen + row)
    used = _used(now, slots)
    begin = split * split_slots
    end = tl.minimum(begin + split_slots, used)
    if begin >= end:
        return
    if is_first:
        tl.store(exchange_at + NOW, now)
        tl.store(exchange_at + ARRIVALS, 0)

    slot_free = _free_slot(free + group, slots)
    state_at = (row * KV_HEADS + kv_head) * slots * HEAD_DIM
    if begin <= slot_free and slot_free < end:
        # All turns write the same, and each reads what it wrote itself, after the barrier. Nobody
        # reads the position of the free slot in this launch.
        at = state_at + slot_free.to(tl.int64) * HEAD_DIM + d
        from_k = k + index * strides_k[0] + kv_head * strides_k[1] + t * strides_k[2]
        from_v = v + index * strides_v[0] + kv_head * strides_v[1] + t * strides_v[2]
        tl.store(keys + at, tl.load(from_k + d, in_row, 0.0), in_row)
        tl.store(values + at, tl.load(from_v + d, in_row, 0.0), in_row)
        if turn == 0 and (GROUPS > 1 or kv_head == 0):
            tl.store(position + group * slots + slot_free, now)
    tl.debug_barrier()

    heads = index * QUERY_HEADS + head
    from_q = q + index * strides_q[0] + t * strides_q[2] + head * strides_q[1]
    query = tl.load(from_q[:, None] + d[None, :], in_head[:, None] & in_row[None, :], 0.0)
    largest = tl.full((ROWS,), -_INFINITY, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        known = (slot < end) & (slot != slot_free)
        there = tl.load(position + group * slots + slot, known, -1) >= 0
        there = there | (slot == slot_free)
        at = state_at + slot[:, None].to(tl.int64) * HEAD_DIM + d[None, :]
        inside = (slot < end)[:, None] & in_row[None, :]  # loads that wait for no other
        block = tl.load(keys + at, inside, 0.0)
        x = tl.dot(query, tl.trans(block), input_precision="ieee") * scale
        x = tl.where(there[None, :], x, -_INFINITY)
        if logits is not None:
            to = logits + heads[:, None] * slots + slot[None, :]
            tl.store(to, x, in_head[:, None] & (slot < end)[None, :])
        larger = tl.maximum(largest, tl.max(x, 1))
        weights = tl.exp2(x - _number(larger)[:, None])
        factor = tl.exp2(largest - _number(larger))
        total = total * factor + tl.sum(weights, 1)
        block = tl.load(values + at, inside, 0.0)
        block = tl.where(there[:, None], block, 0.0)  # empty slots hold anything, also NaN
        acc = _add_values(weights, block, acc * factor[:, None])
        largest = larger

    at_sums = sums + (heads * splits + split) * 2
    tl.store(at_sums, largest, in_head)
    tl.store(at_sums + 1, total, in_head)
    if partial is None:
        to = out + index * strides_out[0] + t * strides_out[2] + head * strides_out[1]
        y = acc / total[:, None]
        tl.store(to[:, None] + d[None, :], y.to(out.dtype.element_ty), store_mask)
    else:
        to = partial + (heads * splits + split) * HEAD_DIM
        tl.store(to[:, None] + d[None, :], acc, store_mask)


@triton.jit
def _totals(sums, heads, in_head, splits, active, SPLITS: tl.constexpr):
    """Of query heads: the sums of their splits' logits, the maximum over all, and 1 / the sum."""
    i = tl.arange(0, SPLITS)
    mask = in_head[:, None] & (i < active)[None, :]
    at = sums + (heads[:, None] * splits + i[None, :]) * 2
    largest = tl.load(at, mask, -_INFINITY)
    shift = _number(tl.max(largest, 1))
    factors = tl.exp2(largest - shift[:, None])
    return factors, shift, 1.0 / tl.sum(tl.load(at + 1, mask, 0.0) * factors, 1)


@triton.jit
def _combine(
    index, out, strides_out, t, valid, time, partial, sums, exchange, exchange_size,
    slots, splits, split_slots,
    QUERY_HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """A few elements of the output of one query head."""
    PIECES: tl.constexpr = (HEAD_DIM + BLOCK_OUT - 1) // BLOCK_OUT
    d = index % PIECES * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = (index // PIECES // QUERY_HEADS).to(tl.int64)  # of the batch
    head = (index // PIECES % QUERY_HEADS).to(tl.int64)
    if _is_real(valid, row, time, t):
        now = tl.load(exchange + row * GROUPS * exchange_size + NOW)
        if now != _NOTHING:
            active = tl.cdiv(_used(now, slots), split_slots)
            heads = row * QUERY_HEADS + head + tl.zeros((1,), tl.int64)
            factors, _, norm = _totals(sums, heads, heads >= 0, splits, active, SPLITS)
            i = tl.arange(0, SPLITS)
            at = ((row * QUERY_HEADS + head) * splits + i[:, None]) * HEAD_DIM + d[None, :]
            parts = tl.load(partial + at, (i < active)[:, None] & (d < HEAD_DIM)[None, :], 0.0)
            sum = tl.sum(parts * tl.reshape(factors, (SPLITS, 1)), 0) * norm
            to = out + row * strides_out[0] + head * strides_out[1] + t * strides_out[2] + d
            tl.store(to, sum.to(out.dtype.element_ty), d < HEAD_DIM)


@triton.jit
def _attention(
    logits, sums, row, group, slot, used, slots, splits, active,
    QUERY_HEADS: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """What slots get from all query heads of a group, in the order of the heads."""
    EACH: tl.constexpr = QUERY_HEADS // GROUPS
    sum = tl.zeros((BLOCK_S,), tl.float32)
    for first in range(0, EACH, BLOCK_H):
        i = first + tl.arange(0, BLOCK_H)
        in_head = i < EACH
        heads = row * QUERY_HEADS + group * EACH + i
        _, shift, norm = _totals(sums, heads, in_head, splits, active, SPLITS)
        mask = in_head[:, None] & (slot < used)[None, :]
        x = tl.load(logits + heads[:, None] * slots + slot[None, :], mask, 0.0)
        weights = tl.exp2(x - shift[:, None]) * norm[:, None]
        sum += tl.sum(tl.where(mask, weights, 0.0), 0)
    return sum


@triton.jit
def _rank(score):
    """Numbers in the order of scores, NaN the lowest."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 equals 0
    return tl.where(score != score, _LOWEST, tl.where(bits < 0, bits ^ _NONE, bits))


@triton.jit
def _lowest(rank, position, slot, may_go):
    """The lowest rank and, of equals, the oldest position; and its slot."""
    rank = tl.where(may_go, rank, _NONE)
    lowest = tl.min(rank, 0)
    may_go = may_go & (rank == lowest)
    oldest = tl.min(tl.where(may_go, position, _NEVER), 0)
    may_go = may_go & (position == oldest)
    return lowest, oldest, tl.min(tl.where(may_go, slot, _NONE), 0)


@triton.jit
def _candidate(rank, position, slot, used, now, sinks, recent):
    """What would go of some slots, and the first empty one."""
    may_go = (position >= sinks) & (position <= now - recent) & (position >= 0)
    lowest, oldest, victim = _lowest(rank, position, slot, may_go)
    empty = (position < 0) & (slot < used)
    return lowest, oldest, victim, tl.min(tl.where(empty, slot, _NONE), 0)


@triton.jit
def _earlier(rank, position, slot, empty, rank2, position2, slot2, empty2):
    """Of two candidates."""
    second = (rank2 < rank) | ((rank2 == rank) & (position2 < position))
    rank, position = tl.where(second, rank2, rank), tl.where(second, position2, position)
    return rank, position, tl.where(second, slot2, slot), tl.minimum(empty, empty2)


@triton.jit
def _search(
    begin, end, position, score, scores, logits, sums, row, g, now, slots, splits, active, sinks,
    recent, QUERY_HEADS: tl.constexpr, GROUPS: tl.constexpr, KIND: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The candidate of a group's slots, after adding to their score what accumulates.

    Pointers of the group. Attention is read from `scores` or, where they are None, from `logits`.
    BLOCK_S is no less than the threads of a program: what accumulates is read and written back
    without a barrier, which only holds where no two threads share a slot.
    """
    none = tl.full((), _NONE, tl.int32)
    lowest, oldest, victim, empty = none, tl.full((), _NEVER, tl.int64), none, none
    for start in range(begin, end, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        where = tl.load(position + slot, slot < end, -1)
        rank = tl.zeros((BLOCK_S,), tl.int32)
        if KIND != POSITION:
            if scores is not None:
                value = tl.load(scores + slot, where >= 0, 0.0)
            else:
                value = _attention(
                    logits, sums, row, g, slot, end, slots, splits, active,
                    QUERY_HEADS, GROUPS, SPLITS, BLOCK_H, BLOCK_S,
                )  # fmt: skip
            if KIND == ACCUMULATED:
                value += tl.load(score + slot, where >= 0, 0.0)
                tl.store(score + slot, value, where >= 0)
            rank = _rank(value)
        lowest, oldest, victim, empty = _earlier(
            lowest, oldest, victim, empty, *_candidate(rank, where, slot, end, now, sinks, recent)
        )
    return lowest, oldest, victim, empty


@triton.jit
def _decide(
    oldest, victim, empty, used, slots, position, score, free, last_evicted, KIND: tl.constexpr
):
    """Drops the victim if no slot is left, and finds the next token a slot. Pointers of a group."""
    evicts = (empty == _NONE) & (used == slots) & (victim != _NONE)
    to = tl.where(evicts, victim, tl.where(empty == _NONE, used, empty))
    tl.debug_barrier()  # other threads have written scores of the victim
    tl.store(position + victim, -1, evicts)
    if KIND == ACCUMULATED:
        tl.store(score + victim, 0.0, evicts)
    tl.store(free, to)
    tl.store(last_evicted, tl.where(evicts, oldest, -1))
    return evicts


@triton.jit
def _decide_together(
    lowest, oldest, victim, empty, part, parts, used, slots, position, score, free, last_evicted,
    exchange, KIND: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Publishes the candidate of a part. Of `parts`, the last to arrive decides.

    Returns whether it is the last, whether a state goes, and its position.
    """
    mine = exchange + CANDIDATES + part * CANDIDATE
    tl.store(mine, lowest)
    tl.store(mine + 1, oldest)
    tl.store(mine + 2, victim)
    tl.store(mine + 3, empty)
    # The barrier orders what all threads of this program have read and written before the release
    # of the one that arrives; what its acquire sees reaches the others by the barrier with which
    # the counter's value does. So the last to arrive sees every candidate, and may overwrite what
    # any part has read or written. It does not matter which one is the last.
    tl.debug_barrier()
    is_last = tl.atomic_add(exchange + ARRIVALS, 1, sem="acq_rel") == parts - 1
    evicts, goes = is_last, tl.full((), _NEVER, tl.int64)
    if is_last:
        i = tl.arange(0, PARTS)
        at, mask = exchange + CANDIDATES + i * CANDIDATE, i < parts
        ranks = tl.load(at, mask, _NONE, cache_modifier=".cg")
        positions = tl.load(at + 1, mask, _NEVER, cache_modifier=".cg")
        victims = tl.load(at + 2, mask, _NONE, cache_modifier=".cg")
        empties = tl.load(at + 3, mask, _NONE, cache_modifier=".cg")
        _, goes, from_slot = _lowest(ranks, positions, victims, victims != _NONE)
        evicts = _decide(
            goes, from_slot, tl.min(empties, 0), used, slots, position, score, free, last_evicted,
            KIND,
        )  # fmt: skip
    return is_last, evicts, goes


@triton.jit(do_not_specialize=["t"])
def finish(
    out, strides_out, t, valid, time,
    rows, position, score, free, seen, last_evicted, scores, expiry, times,
    partial, sums, logits, exchange, exchange_size,
    slots, splits, split_slots, parts, part_slots, outputs, sinks, recent,
    QUERY_HEADS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, KIND: tl.constexpr,
    SPLITS: tl.constexpr, PARTS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out, and then either `scores` (B, G, slots) or what they decide.

    The first `outputs` programs combine partial outputs, the others have a part each. expiry
    (B, G, T) of a sequence notes when a key goes; times (B, T) has the times of a row's real
    tokens, None where all are.
    """
    t = tl.cast(t, tl.int64)
    part = tl.program_id(0) - outputs
    g = part // parts % GROUPS
    index = (part // parts // GROUPS).to(tl.int64)
    part = part % parts
    if partial is not None:
        if tl.program_id(0) < outputs:
            _combine(
                tl.program_id(0), out, strides_out, t, valid, time, partial, sums, exchange,
                exchange_size, slots, splits, split_slots,
                QUERY_HEADS, GROUPS, HEAD_DIM, SPLITS, BLOCK_OUT,
            )  # fmt: skip
            return
    if _is_real(valid, index, time, t):
        exchange_at = exchange + (index * GROUPS + g) * exchange_size
        now = tl.load(exchange_at + NOW)
        if now == _NOTHING:
            return
        # The first launch has found that this names a row of the state.
        row = index if rows is None else tl.load(rows + index).to(tl.int64)
        group = row * GROUPS + g
        offset = group * slots
        used = _used(now, slots)
        active = tl.cdiv(used, split_slots)
        begin = part * part_slots
        end = tl.minimum(begin + part_slots, slots)
        if scores is not None:
            scores_at = scores + (index * GROUPS + g) * slots
            for start in range(begin, end, BLOCK_S):
                slot = start + tl.arange(0, BLOCK_S)
                sum = _attention(
                    logits, sums, index, g, slot, used, slots, splits, active,
                    QUERY_HEADS, GROUPS, SPLITS, BLOCK_H, BLOCK_S,
                )  # fmt: skip
                kept = tl.load(position + offset + slot, slot < used, -1) >= 0
                tl.store(scores_at + slot, tl.where(kept, sum, 0.0), slot < end)
        elif begin < used:
            score_of_group = score + offset if KIND == ACCUMULATED else score
            lowest, oldest, victim, empty = _search(
                begin, tl.minimum(end, used), position + offset, score_of_group, None, logits,
                sums, index, g, now, slots, splits, active, sinks, recent,
                QUERY_HEADS, GROUPS, KIND, SPLITS, BLOCK_H, BLOCK_S,
            )  # fmt: skip
            is_last, evicts, goes = _decide_together(
                lowest, oldest, victim, empty, part, tl.cdiv(used, part_slots), used, slots,
                position + offset, score_of_group, free + group, last_evicted + group,
                exchange_at, KIND, PARTS,
            )  # fmt: skip
            if expiry is not None:
                key = goes
                if times is not None:
                    key = tl.load(times + row * time + goes, evicts, 0)
                tl.store(expiry + group * time + key, t + 1, evicts)
            # Everybody else has it from the exchange.
            tl.store(seen + row, now + 1, is_last & (g == 0))


@triton.jit
def evict(
    scores, rows, state_rows, position, score, free, seen, last_evicted, slots, sinks, recent,
    GROUPS: tl.constexpr, KIND: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The policy alone, for a row: where ranks or others had a say in the scores."""
    index = tl.program_id(0).to(tl.int64)
    row = row_of(rows, index, state_rows)
    if row < 0:
        return
    now = tl.load(seen + row)
    used = _used(now, slots)
    any_waits = row < 0
    for g in range(GROUPS):
        group = row * GROUPS + g
        offset = group * slots
        waits = tl.load(position + offset + _free_slot(free + group, slots)) >= 0
        if waits:
            score_of_group = score + offset if KIND == ACCUMULATED else score
            scores_of_group = scores + (index * GROUPS + g) * slots
            _, oldest, victim, empty = _search(
                0, used, position + offset, score_of_group, scores_of_group, None,
                None, row, g, now, slots, 1, 1, sinks, recent,
                1, GROUPS, KIND, 1, 1, BLOCK_S,
            )  # fmt: skip
            _decide(
                oldest, victim, empty, used, slots, position + offset, score_of_group,
                free + group, last_evicted + group, KIND,
            )  # fmt: skip
        any_waits = any_waits | waits
    tl.store(seen + row, now + 1, any_waits)
