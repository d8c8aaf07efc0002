"""The scan kernels.

A program has some channels of one row and a run of steps, which it walks tile by tile. A tile is
SEGMENTS times ROWS steps of BLOCK_D channels. Level by level:
  row       a (SEGMENTS, BLOCK_D) block: the same row of every segment, all rows read at once
  segment   its rows one after the other, in registers: plain steps, nothing shared
  tile      `tl.associative_scan` over the segments, of which each brings one span; what enters a
            segment is what leaves the one before it (`tl.gather`)
  run       the carry goes on behind a tile, compensated
Each element meets an associative scan once in ROWS steps: composing every step that way, the whole
tile in one `tl.associative_scan`, took 280 instructions an element of bfloat16 minGRU on sm_90.

Enough rows and channels: a program walks all of T and reads and writes every element once. Few of
them: time is cut into chunks and three launches follow each other, so that nobody waits for anybody:
  spans    every chunk composed to one span; reads the inputs once more
  carries  along the chunks of each channel, one after the other
  scan     every chunk, from the carry that enters it
Look-back, which would spare the first reading, needs blocks that wait for each other, and Triton
promises neither the order in which programs start nor that a waiting one makes room.

Time runs either way by what a step's address is, so that no kernel depends on the scan's own
`reverse`, which has been wrong in some versions of Triton.
"""

import triton
import triton.language as tl

from .recurrence import (
    DECAY,
    LINEAR,
    LOG,
    adjoint,
    apply,
    compound,
    gates,
    join,
    then,
    then_gated,
    then_log,
    then_log_packed,
    then_packed,
    through,
)

WALK: tl.constexpr = tl.constexpr(0)  # all of T, from h0
SPANS: tl.constexpr = tl.constexpr(1)  # a chunk's span, nothing else
CHUNK: tl.constexpr = tl.constexpr(2)  # a chunk, from its carry

_INFINITY: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def _place(rows, channels, BLOCK_D: tl.constexpr):
    """Chunk, row and channels of this program."""
    blocks = tl.cdiv(channels, BLOCK_D)
    index = tl.program_id(0)
    d = (index % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = index // blocks % rows
    return index // blocks // rows, row.to(tl.int64), d


@triton.jit
def _at(row, times, d, strides):
    """Offsets (SEGMENTS, BLOCK_D) in a view."""
    across = d[None, :].to(tl.int64) * strides[2]
    return row * strides[0] + times[:, None].to(tl.int64) * strides[1] + across


@triton.jit
def _load(data, at, mask, WIDE: tl.constexpr):
    return tl.load(data + at, mask, 0.0).to(WIDE)


@triton.jit
def _store(data, at, mask, x):
    tl.store(data + at, x.to(data.dtype.element_ty), mask)


@triton.jit
def _last(x, SEGMENTS: tl.constexpr):
    """The last row of a block."""
    is_last = tl.arange(0, SEGMENTS)[:, None] == SEGMENTS - 1
    return tl.sum(tl.where(is_last, x, tl.zeros_like(x)), 0)


@triton.jit
def _nothing(x, LOG_SPACE: tl.constexpr):
    """The span of no steps, in the shape of x."""
    if LOG_SPACE:
        return tl.zeros_like(x), tl.zeros_like(x) - _INFINITY, tl.zeros_like(x) + 1.0
    return tl.zeros_like(x) + 1.0, tl.zeros_like(x), tl.zeros_like(x)


@triton.jit
def _extend(kept, second, third, k, s, u, LOG_SPACE: tl.constexpr, GATED: tl.constexpr):
    """A span and the step after it."""
    if LOG_SPACE:
        largest, sum = join(second + k, third, s, u)
        return kept + k, largest, sum
    lost = tl.fma(s, kept, second)
    state = tl.fma(k, third, u)
    return (kept * k if GATED else compound(kept, k)), lost, state


@triton.jit
def _enter(state, LOG_SPACE: tl.constexpr):
    """The carry of a state: value and rest; in log-space largest and sum."""
    if LOG_SPACE:
        return state, tl.zeros_like(state) + 1.0
    return state, tl.zeros_like(state)


@triton.jit
def _after(kept, second, third, value, rest, LOG_SPACE: tl.constexpr):
    """A state (as a carry) after a span that the carry enters."""
    if LOG_SPACE:
        return join(value + kept, rest, second, third)
    return apply(kept, second, third, value), rest


@triton.jit
def _carry_on(value, rest, kept, second, third, fresh, LOG_SPACE: tl.constexpr):
    """The carry behind a tile or chunk."""
    if LOG_SPACE:
        after, left = join(value + kept, rest, second, third)
        return tl.where(fresh != 0, second, after), tl.where(fresh != 0, third, left)
    after, left = through(value, rest, kept, second, third)
    return tl.where(fresh != 0, third, after), tl.where(fresh != 0, tl.zeros_like(left), left)


@triton.jit
def _join_segments(
    kept, second, third, fresh, value, rest,
    LOG_SPACE: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """What enters each segment, and the span of the tile."""
    if GATED:  # such decays count as never quite 0: 0 times infinity is NaN
        kept = tl.where(kept < 1.2e-38, 1.2e-38, kept)
    if PACKED and LOG_SPACE:
        kept, second, third, fresh = tl.associative_scan(
            (kept, second, third, fresh), 0, then_log_packed
        )
    elif PACKED:
        kept, second, third, fresh = tl.associative_scan(
            (kept, second, third, fresh), 0, then_packed
        )
    elif LOG_SPACE:
        kept, second, third = tl.associative_scan((kept, second, third), 0, then_log)
    elif GATED:
        kept, second, third = tl.associative_scan((kept, second, third), 0, then_gated)
    else:
        kept, second, third = tl.associative_scan((kept, second, third), 0, then)
    wide_value = value[None, :] + tl.zeros_like(kept)
    wide_rest = rest[None, :] + tl.zeros_like(kept)
    leaves, leaves_rest = _after(kept, second, third, wide_value, wide_rest, LOG_SPACE)
    if PACKED:
        leaves = tl.where(fresh != 0, second if LOG_SPACE else third, leaves)
        leaves_rest = tl.where(fresh != 0, third, leaves_rest)
    segment = tl.arange(0, SEGMENTS)[:, None]
    before = tl.where(segment > 0, segment - 1, 0) + tl.zeros(kept.shape, tl.int32)
    enters = tl.where(segment > 0, tl.gather(leaves, before, 0), wide_value)
    if LOG_SPACE:
        enters_rest = tl.where(segment > 0, tl.gather(leaves_rest, before, 0), wide_rest)
    else:
        enters_rest = wide_rest  # not used
    return enters, enters_rest, kept, second, third, fresh


@triton.jit
def scan_forward(
    x0, x1, x2, strides0, strides1, strides2,
    h, strides_h, h0, last,
    first, sequence, spans,
    rows, time, channels, chunk_steps,
    OP: tl.constexpr, IDENTITY: tl.constexpr, REVERSE: tl.constexpr, PHASE: tl.constexpr,
    PACKED: tl.constexpr, HAS_H0: tl.constexpr, INPUTS: tl.constexpr, WIDE: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h and the last states of a row and some channels; or, with SPANS, the span of a chunk.

    first (T) marks the first step of a sequence, sequence (T) is its number; PACKED only.
    spans (chunks, 4, rows, channels): kept, two numbers and a mark of a chunk's span; then the
    carry that enters it.
    """
    LOG_SPACE: tl.constexpr = OP == LOG
    GATED: tl.constexpr = (OP != LINEAR) & (OP != DECAY)
    chunk, row, d = _place(rows, channels, BLOCK_D)
    in_row = d < channels
    state_at = row * channels + d
    slot = (chunk.to(tl.int64) * 4 * rows + row) * channels + d
    part = tl.cast(rows, tl.int64) * channels
    total, total_second, total_third = _nothing(tl.zeros((BLOCK_D,), WIDE), LOG_SPACE)
    mark = tl.zeros((BLOCK_D,), tl.int32)
    if PHASE == CHUNK:
        value = tl.load(spans + slot, in_row, 0.0)
        rest = tl.load(spans + slot + part, in_row, 0.0)
    elif HAS_H0 and not PACKED and PHASE == WALK:
        value, rest = _enter(tl.load(h0 + state_at, in_row, 0.0).to(WIDE), LOG_SPACE)
    else:
        value, rest = _enter(total_second if LOG_SPACE else total_third, LOG_SPACE)
    begin = chunk * chunk_steps
    end = tl.minimum(begin + chunk_steps, time)
    for start in range(begin, end, SEGMENTS * ROWS):
        first_step = start + tl.arange(0, SEGMENTS) * ROWS
        raw = ()
        for r in tl.static_range(ROWS):
            step = first_step + r
            t = time - 1 - step if REVERSE else step
            mask = (step < end)[:, None] & in_row[None, :]
            a = _load(x0, _at(row, t, d, strides0), mask, WIDE)
            b = _load(x1, _at(row, t, d, strides1), mask, WIDE)
            c = _load(x2, _at(row, t, d, strides2), mask, WIDE) if INPUTS > 2 else b
            raw = raw + ((a, b, c),)
        kept, second, third = _nothing(tl.zeros((SEGMENTS, BLOCK_D), WIDE), LOG_SPACE)
        fresh = tl.zeros((SEGMENTS, BLOCK_D), tl.int32)
        local = ()
        for r in tl.static_range(ROWS):
            step = first_step + r
            t = time - 1 - step if REVERSE else step
            mask = (step < end)[:, None] & in_row[None, :]
            k, s, u = gates(raw[r][0], raw[r][1], raw[r][2], OP, IDENTITY)
            no_k, no_s, no_u = _nothing(k, LOG_SPACE)
            k, s, u = tl.where(mask, k, no_k), tl.where(mask, s, no_s), tl.where(mask, u, no_u)
            kept, second, third = _extend(kept, second, third, k, s, u, LOG_SPACE, GATED)
            if PACKED:
                starts = (tl.load(first + t, step < end, 0) != 0)[:, None] & mask
                entering = no_s if LOG_SPACE else no_u
                if HAS_H0:
                    number = tl.load(sequence + t, step < end, 0).to(tl.int64)
                    at = number[:, None] * channels + d[None, :]
                    entering = tl.load(h0 + at, starts, 0.0).to(WIDE)
                own, own_rest = _enter(entering, LOG_SPACE)
                own, own_rest = _after(k, s, u, own, own_rest, LOG_SPACE)
                kept = tl.where(starts, k, kept)
                if LOG_SPACE:
                    second = tl.where(starts, own, second)
                    third = tl.where(starts, own_rest, third)
                else:
                    second = tl.where(starts, s, second)
                    third = tl.where(starts, own, third)
                fresh = tl.where(starts, 1, fresh)
            local = local + ((kept, second, third, fresh),)
        enters, enters_rest, kept, second, third, fresh = _join_segments(
            kept, second, third, fresh, value, rest, LOG_SPACE, GATED and not LOG_SPACE, PACKED,
            SEGMENTS,
        )
        if PHASE != SPANS:
            for r in tl.static_range(ROWS):
                step = first_step + r
                t = time - 1 - step if REVERSE else step
                mask = (step < end)[:, None] & in_row[None, :]
                k, s, u, f = local[r]
                state, state_rest = _after(k, s, u, enters, enters_rest, LOG_SPACE)
                if PACKED:
                    state = tl.where(f != 0, s if LOG_SPACE else u, state)
                    if LOG_SPACE:
                        state_rest = tl.where(f != 0, u, state_rest)
                if LOG_SPACE:
                    state = state + tl.log(state_rest)
                _store(h, _at(row, t, d, strides_h), mask, state)
                if PACKED:
                    following = first + (t - 1 if REVERSE else t + 1)
                    ends = tl.load(following, (step < end) & (step + 1 < time), 1) != 0
                    number = tl.load(sequence + t, step < end, 0).to(tl.int64)
                    at = number[:, None] * channels + d[None, :]
                    tl.store(last + at, state, ends[:, None] & mask)
        k, s, u = _last(kept, SEGMENTS), _last(second, SEGMENTS), _last(third, SEGMENTS)
        f = _last(fresh, SEGMENTS)
        if PHASE == SPANS:
            if LOG_SPACE:
                total, total_second, total_third, mark = then_log_packed(
                    total, total_second, total_third, mark, k, s, u, f
                )
            else:
                total, total_second, total_third, mark = then_packed(
                    total, total_second, total_third, mark, k, s, u, f
                )
        else:
            value, rest = _carry_on(value, rest, k, s, u, f, LOG_SPACE)
    if PHASE != SPANS and not PACKED:
        tl.store(last + state_at, value + (tl.log(rest) if LOG_SPACE else rest),
                 in_row & (end == time))  # fmt: skip
    if PHASE == SPANS:
        tl.store(spans + slot, total, in_row)
        tl.store(spans + slot + part, total_second, in_row)
        tl.store(spans + slot + 2 * part, total_third, in_row)
        tl.store(spans + slot + 3 * part, mark.to(WIDE), in_row)


@triton.jit
def scan_carries(
    spans, entering, rows, channels, chunks,
    LOG_SPACE: tl.constexpr, HAS_FIRST: tl.constexpr, WIDE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Replaces the span of every chunk by the carry that enters it."""
    _, row, d = _place(rows, channels, BLOCK_D)
    in_row = d < channels
    part = tl.cast(rows, tl.int64) * channels
    _, largest, state = _nothing(tl.zeros((BLOCK_D,), WIDE), LOG_SPACE)
    value, rest = _enter(largest if LOG_SPACE else state, LOG_SPACE)
    if HAS_FIRST:
        first = tl.load(entering + row * channels + d, in_row, 0.0).to(WIDE)
        value, rest = _enter(first, LOG_SPACE)
    at = spans + row * channels + d
    for _ in range(chunks):
        kept = tl.load(at, in_row, 0.0)
        second = tl.load(at + part, in_row, 0.0)
        third = tl.load(at + 2 * part, in_row, 0.0)
        mark = tl.load(at + 3 * part, in_row, 0.0)
        tl.store(at, value, in_row)
        tl.store(at + part, rest, in_row)
        value, rest = _carry_on(value, rest, kept, second, third, mark, LOG_SPACE)
        at += 4 * part


@triton.jit
def scan_backward(
    x0, x1, x2, strides0, strides1, strides2,
    grad0, grad1, grad2, strides_grad0, strides_grad1, strides_grad2,
    h, strides_h, h0, grad_h, strides_grad_h, grad_last, grad_h0,
    first, sequence, spans,
    rows, time, channels, chunk_steps,
    OP: tl.constexpr, IDENTITY: tl.constexpr, REVERSE: tl.constexpr, PHASE: tl.constexpr,
    PACKED: tl.constexpr, HAS_H0: tl.constexpr, HAS_GRAD_H: tl.constexpr,
    HAS_GRAD_LAST: tl.constexpr, SAVED: tl.constexpr, INPUTS: tl.constexpr, WIDE: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of a row and some channels.

    Against the direction of the scan. The state is what arrives at h_t from the steps after it: a
    step turns it into a_t times (it + the gradient of h_t alone), which arrives at h_{t-1}. first
    marks, as seen from this side, the last step of a sequence.
    """
    GATED: tl.constexpr = (OP != LINEAR) & (OP != DECAY)
    chunk, row, d = _place(rows, channels, BLOCK_D)
    in_row = d < channels
    state_at = row * channels + d
    slot = (chunk.to(tl.int64) * 4 * rows + row) * channels + d
    part = tl.cast(rows, tl.int64) * channels
    total, total_lost, total_state = _nothing(tl.zeros((BLOCK_D,), WIDE), False)
    mark = tl.zeros((BLOCK_D,), tl.int32)
    value, rest = total_state, tl.zeros((BLOCK_D,), WIDE)
    if PHASE == CHUNK:
        value = tl.load(spans + slot, in_row, 0.0)
        rest = tl.load(spans + slot + part, in_row, 0.0)
    elif HAS_GRAD_LAST and not PACKED and PHASE == WALK:
        value = tl.load(grad_last + state_at, in_row, 0.0).to(WIDE)
    begin = chunk * chunk_steps
    end = tl.minimum(begin + chunk_steps, time)
    for start in range(begin, end, SEGMENTS * ROWS):
        first_step = start + tl.arange(0, SEGMENTS) * ROWS
        raw = ()
        for r in tl.static_range(ROWS):
            step = first_step + r
            t = step if REVERSE else time - 1 - step
            earlier = t + 1 if REVERSE else t - 1  # in the direction of the scan
            there = step < end
            mask = there[:, None] & in_row[None, :]
            a = _load(x0, _at(row, t, d, strides0), mask, WIDE)
            b = _load(x1, _at(row, t, d, strides1), mask, WIDE) if SAVED > 1 else a
            c = _load(x2, _at(row, t, d, strides2), mask, WIDE) if SAVED > 2 else a
            begins = there & (step == time - 1)
            if PACKED:
                begins |= tl.load(first + earlier, there & (step + 1 < time), 0) != 0
            begins = begins[:, None] & in_row[None, :]
            before = _load(h, _at(row, earlier, d, strides_h), mask & ~begins, WIDE)
            if OP == LOG:
                before = tl.where(begins, -_INFINITY, before)
            if HAS_H0:
                number = tl.zeros((SEGMENTS,), tl.int64) + row
                if PACKED:
                    number = tl.load(sequence + t, there, 0).to(tl.int64)
                entering = tl.load(h0 + number[:, None] * channels + d[None, :], begins, 0.0)
                before = tl.where(begins, entering.to(WIDE), before)
            grad = tl.zeros((SEGMENTS, BLOCK_D), WIDE)
            if HAS_GRAD_H:
                grad = _load(grad_h, _at(row, t, d, strides_grad_h), mask, WIDE)
            raw = raw + ((a, b, c, before, grad),)
        kept, lost, state = _nothing(tl.zeros((SEGMENTS, BLOCK_D), WIDE), False)
        fresh = tl.zeros((SEGMENTS, BLOCK_D), tl.int32)
        local = ()
        for r in tl.static_range(ROWS):
            step = first_step + r
            t = step if REVERSE else time - 1 - step
            mask = (step < end)[:, None] & in_row[None, :]
            a, b, c, before, grad = raw[r]
            k, s, factor0, factor1, factor2 = adjoint(a, b, c, before, OP, IDENTITY)
            if PACKED:  # nothing arrives at the last step of a sequence from beyond it
                ends = (tl.load(first + t, step < end, 0) != 0)[:, None] & mask
                arrives = tl.zeros((SEGMENTS, BLOCK_D), WIDE)
                if HAS_GRAD_LAST:
                    number = tl.load(sequence + t, step < end, 0).to(tl.int64)
                    at = number[:, None] * channels + d[None, :]
                    arrives = tl.load(grad_last + at, ends, 0.0).to(WIDE)
                kept, lost = tl.where(ends, 1.0, kept), tl.where(ends, 0.0, lost)
                state = tl.where(ends, arrives, state)
                fresh = tl.where(ends, 1, fresh)
            local = local + ((kept, lost, state, fresh, k, factor0, factor1, factor2),)
            k, s = tl.where(mask, k, 1.0), tl.where(mask, s, 0.0)
            lost = tl.fma(s, kept, lost)
            state = k * (state + grad)
            kept = kept * k if GATED else compound(kept, k)
        enters, _, kept, lost, state, fresh = _join_segments(
            kept, lost, state, fresh, value, rest, False, GATED, PACKED, SEGMENTS
        )
        if PHASE != SPANS:
            for r in tl.static_range(ROWS):
                step = first_step + r
                t = step if REVERSE else time - 1 - step
                earlier = t + 1 if REVERSE else t - 1
                there = step < end
                mask = there[:, None] & in_row[None, :]
                k, s, u, f, own, factor0, factor1, factor2 = local[r]
                arrives = apply(k, s, u, enters)
                if PACKED:
                    arrives = tl.where(f != 0, u, arrives)
                grad = arrives + raw[r][4]
                _store(grad0, _at(row, t, d, strides_grad0), mask, grad * factor0)
                _store(grad1, _at(row, t, d, strides_grad1), mask, grad * factor1)
                if INPUTS > 2:
                    _store(grad2, _at(row, t, d, strides_grad2), mask, grad * factor2)
                if PACKED:
                    begins = tl.load(first + earlier, there & (step + 1 < time), 1) != 0
                    number = tl.load(sequence + t, there, 0).to(tl.int64)
                    at = number[:, None] * channels + d[None, :]
                    tl.store(grad_h0 + at, own * grad, begins[:, None] & mask)
        k, s, u = _last(kept, SEGMENTS), _last(lost, SEGMENTS), _last(state, SEGMENTS)
        f = _last(fresh, SEGMENTS)
        if PHASE == SPANS:
            total, total_lost, total_state, mark = then_packed(
                total, total_lost, total_state, mark, k, s, u, f
            )
        else:
            value, rest = _carry_on(value, rest, k, s, u, f, False)
    if PHASE != SPANS and not PACKED:
        tl.store(grad_h0 + state_at, value + rest, in_row & (end == time))
    if PHASE == SPANS:
        tl.store(spans + slot, total, in_row)
        tl.store(spans + slot + part, total_lost, in_row)
        tl.store(spans + slot + 2 * part, total_state, in_row)
        tl.store(spans + slot + 3 * part, mark.to(WIDE), in_row)
