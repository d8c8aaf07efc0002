"""The scan kernels.

A program has some channels of one row and a run of steps, which it walks tile by tile. A tile is
SEGMENTS times ROWS steps of BLOCK_D channels. Level by level:
  row       a (SEGMENTS, BLOCK_D) block: the same row of every segment, all rows read at once
  segment   its rows one after the other, in registers: plain steps, nothing shared
  tile      with several segments, `tl.associative_scan` over what each of them does to a state; a
            segment starts from what leaves the one before it (`tl.gather`) and is walked again
  run       the carry goes on behind a tile, compensated where the data has more than 16 bits
Each element meets an associative scan once in ROWS steps: composing every step that way, the whole
tile in one `tl.associative_scan`, took 280 instructions an element of bfloat16 minGRU on sm_90.

Traffic: every input read once and every output written once (SPANS: the inputs once more). The plan
(scan.py) gives a program one segment where rows and channels alone fill a GPU; several where they
nearly do; and cuts time into chunks where they do not. Then launches follow each other, so that no
program waits for another:
  SPANS    every chunk composed to one span
  carries  along the chunks of each channel, one after the other
  CHUNK    every chunk, from the carry that enters it
  WALK     again in full, where an infinity or NaN left the carries without a meaning
Look-back, which would spare the first reading, needs programs that wait for each other, and Triton
promises neither the order in which they start nor that a waiting one makes room.

A state may also start within time, where cu_seqlens begins a sequence or `resets` cuts (MARKED).
The span of such a step is `fresh`: what came before it is dropped, never multiplied by 0. Steps
that no sequence covers are not read, and zeros are written there.

Time runs either way by what a step's address is, so that no kernel depends on the scan's own
`reverse`, which has been wrong in some versions of Triton.
"""

import triton
import triton.language as tl

from .recurrence import (
    LINEAR,
    LOG,
    MIN_GRU,
    MIN_LSTM,
    adjoint,
    advance,
    advance_log,
    apply,
    gates,
    join,
    then,
    then_brief,
    then_log,
    then_log_packed,
    then_packed,
)
from .rows import row_of

WALK: tl.constexpr = tl.constexpr(0)  # all of T, from h0
SPANS: tl.constexpr = tl.constexpr(1)  # a chunk's span, nothing else
CHUNK: tl.constexpr = tl.constexpr(2)  # a chunk, from its carry

# What a step does to the state, a pair of blocks (a, b).
STATE: tl.constexpr = tl.constexpr(0)  # a -> kept a + added; b is not used
LOG_STATE: tl.constexpr = tl.constexpr(1)  # a + log(b), joined with log b of the step
ADJOINT: tl.constexpr = tl.constexpr(2)  # a -> kept (a + added)

_INFINITY: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def _walk(a, b, kept, added, SPACE: tl.constexpr, BRIEF: tl.constexpr):
    """The state after a step."""
    if SPACE == LOG_STATE:
        return join(a + kept, b, added, tl.full(added.shape, 1.0, added.dtype), BRIEF)
    if SPACE == ADJOINT:  # the sum first: two infinite products could have both signs
        return kept * (a + added), b
    return tl.fma(kept, a, added), b


@triton.jit
def _start(x, SPACE: tl.constexpr):
    """The state of log 0 or 0, in the shape of x."""
    if SPACE == LOG_STATE:
        return tl.full(x.shape, -_INFINITY, x.dtype), tl.full(x.shape, 1.0, x.dtype)
    return tl.zeros_like(x), tl.zeros_like(x)


@triton.jit
def _no_steps(x, SPACE: tl.constexpr):
    """The span of no steps: kept, lost, state, mark that a state starts in it."""
    kept = tl.full(x.shape, 0.0 if SPACE == LOG_STATE else 1.0, x.dtype)
    a, b = _start(x, SPACE)
    return kept, tl.zeros_like(x), a, b, tl.zeros(x.shape, tl.int32)


@triton.jit
def _extend(kept, lost, a, b, k, gone, added, SPACE: tl.constexpr, BRIEF: tl.constexpr):
    """A span and the step after it."""
    a, b = _walk(a, b, k, added, SPACE, BRIEF)
    if SPACE == LOG_STATE:
        return kept + k, lost, a, b
    return kept * k, tl.fma(gone, kept, lost), a, b


@triton.jit
def _last(x, SEGMENTS: tl.constexpr):
    """The last row of a block, (1, BLOCK_D)."""
    if SEGMENTS == 1:
        return x
    is_last = tl.arange(0, SEGMENTS)[:, None] == SEGMENTS - 1
    return tl.sum(tl.where(is_last, x, tl.zeros_like(x)), 0)[None, :]


@triton.jit
def _enter(value, rest, SPACE: tl.constexpr):
    """The state of a carry value + rest."""
    if SPACE == LOG_STATE:
        return value, 1.0 + rest
    return value, rest


@triton.jit
def _compose_segments(
    kept, lost, a, b, fresh, SPACE: tl.constexpr, BRIEF: tl.constexpr, MARKED: tl.constexpr
):
    """The spans from the tile's start to the end of every segment."""
    if MARKED and SPACE == LOG_STATE:
        kept, a, b, fresh = tl.associative_scan((kept, a, b, fresh), 0, then_log_packed)
    elif MARKED:
        kept, lost, a, fresh = tl.associative_scan((kept, lost, a, fresh), 0, then_packed)
    elif SPACE == LOG_STATE:
        kept, a, b = tl.associative_scan((kept, a, b), 0, then_log)
    elif BRIEF:
        kept, a = tl.associative_scan((kept, a), 0, then_brief)
    else:
        kept, lost, a = tl.associative_scan((kept, lost, a), 0, then)
    return kept, lost, a, b, fresh


@triton.jit
def _from_before(leaves, enters, SEGMENTS: tl.constexpr):
    """What enters each segment: what leaves the one before it; `enters` the first one."""
    segment = tl.arange(0, SEGMENTS)[:, None]
    before = tl.where(segment > 0, segment - 1, 0) + tl.zeros(leaves.shape, tl.int32)
    return tl.where(segment > 0, tl.gather(leaves, before, 0), enters)


@triton.jit
def _through_rows(
    a, b, steps, SPACE: tl.constexpr, BRIEF: tl.constexpr, MARKED: tl.constexpr, ROWS: tl.constexpr
):
    """The states after the rows of every segment."""
    for r in tl.static_range(ROWS):
        kept, added, starts, own_a, own_b = steps[r]
        if MARKED:
            a, b = tl.where(starts, own_a, a), tl.where(starts, own_b, b)
        a, b = _walk(a, b, kept, added, SPACE, BRIEF)
    return a, b


@triton.jit
def _enter_segments(
    steps, kept, lost, a, b, fresh, value, rest,
    SPACE: tl.constexpr, BRIEF: tl.constexpr, MARKED: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The states that enter the segments, from their composed spans and the carry."""
    first_a, first_b = _enter(value, rest, SPACE)
    if SEGMENTS == 1:
        return first_a, first_b
    first_a, first_b = first_a + tl.zeros_like(a), first_b + tl.zeros_like(a)
    if SPACE == LOG_STATE:
        leaves_a, leaves_b = join(first_a + kept, first_b, a, b, BRIEF)
        usable = kept < _INFINITY
    else:
        leaves_a, leaves_b = apply(kept, lost, a, first_a, BRIEF), b
    if MARKED:
        leaves_a, leaves_b = tl.where(fresh != 0, a, leaves_a), tl.where(fresh != 0, b, leaves_b)
    if SPACE != LOG_STATE:
        usable = tl.abs(leaves_a) < _INFINITY
    enters_a = _from_before(leaves_a, first_a, SEGMENTS)
    enters_b = first_b
    if SPACE == LOG_STATE:
        enters_b = _from_before(leaves_b, first_b, SEGMENTS)
    if tl.min(tl.min(usable.to(tl.int32), 1), 0) == 0:
        # 0 times infinity: products of decays have no meaning here. One segment after another.
        for _ in range(SEGMENTS):
            leaves_a, leaves_b = _through_rows(
                enters_a, enters_b, steps, SPACE, BRIEF, MARKED, ROWS
            )
            enters_a = _from_before(leaves_a, first_a, SEGMENTS)
            if SPACE == LOG_STATE:
                enters_b = _from_before(leaves_b, first_b, SEGMENTS)
    return enters_a, enters_b


@triton.jit
def _carry_on(value, rest, kept, lost, a, b, fresh, SPACE: tl.constexpr):
    """The carry behind a span."""
    if SPACE == LOG_STATE:
        state = a + tl.log(b)
        after, left = advance_log(value, rest, kept, state)
    else:
        state = a
        after, left = advance(value, rest, kept, lost, state)
    return tl.where(fresh != 0, state, after), tl.where(fresh != 0, 0.0, left)


@triton.jit
def _behind_tile(
    value, rest, kept, lost, a, b, fresh, leaves_a, leaves_b,
    SPACE: tl.constexpr, BRIEF: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """The carry behind a tile: compensated, or where that is no number what has been walked to."""
    walked = _last(leaves_a, SEGMENTS)
    if SPACE == LOG_STATE:
        walked += tl.log(_last(leaves_b, SEGMENTS))
    if BRIEF and SPACE != LOG_STATE:
        return walked, tl.zeros_like(rest)
    value, rest = _carry_on(
        value, rest, _last(kept, SEGMENTS), _last(lost, SEGMENTS), _last(a, SEGMENTS),
        _last(b, SEGMENTS), _last(fresh, SEGMENTS), SPACE,
    )  # fmt: skip
    finite = tl.abs(value) < _INFINITY
    return tl.where(finite, value, walked), tl.where(finite, rest, 0.0)


@triton.jit
def _add_tile(
    span_kept, span_lost, span_a, span_b, span_fresh, kept, lost, a, b, fresh,
    SPACE: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """A span and the tile after it."""
    kept, lost, fresh = _last(kept, SEGMENTS), _last(lost, SEGMENTS), _last(fresh, SEGMENTS)
    a, b = _last(a, SEGMENTS), _last(b, SEGMENTS)
    if SPACE == LOG_STATE:
        kept, a, b, fresh = then_log_packed(
            span_kept, span_a, span_b, span_fresh, kept, a, b, fresh
        )
    else:
        kept, lost, a, fresh = then_packed(
            span_kept, span_lost, span_a, span_fresh, kept, lost, a, fresh
        )
    return kept, lost, a, b, fresh


@triton.jit
def _place(rows, channels, BLOCK_D: tl.constexpr):
    """Chunk, row, channels (1, BLOCK_D) of this program, and which of them there are."""
    blocks = tl.cdiv(channels, BLOCK_D)
    index = tl.program_id(0)
    d = (index % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    row = (index // blocks % rows).to(tl.int64)
    return index // blocks // rows, row, d, d < channels


@triton.jit
def _view(data, row, d, strides):
    """Pointers (1, BLOCK_D) to the row's first step."""
    return data + (row * strides[0] + d.to(tl.int64) * strides[2])


@triton.jit
def _load(view, t, strides, mask, other, WIDE: tl.constexpr):
    """A row of the tile; t (SEGMENTS, 1)."""
    return tl.load(view + t.to(tl.int64) * strides[1], mask, other).to(WIDE)


@triton.jit
def _store(view, t, strides, mask, x):
    tl.store(view + t.to(tl.int64) * strides[1], x.to(view.dtype.element_ty), mask)


@triton.jit
def _reset_before(resets, row, step, inside, time, strides, REVERSED: tl.constexpr):
    """Whether a reset lies on the border before a step of this walk, (SEGMENTS, 1)."""
    t = time - step if REVERSED else step
    at = row * strides[0] + t.to(tl.int64) * strides[1]
    return tl.load(resets + at, inside & (t < time), 0) != 0


@triton.jit
def _store_span(spans, slot, part, kept, lost, a, b, fresh, in_row):
    tl.store(spans + slot, kept, in_row)
    tl.store(spans + slot + part, lost, in_row)
    tl.store(spans + slot + 2 * part, a, in_row)
    tl.store(spans + slot + 3 * part, b, in_row)
    tl.store(spans + slot + 4 * part, fresh.to(kept.dtype), in_row)


# What is read beyond the end: a step that changes nothing.
@triton.jit
def _pad0(OP: tl.constexpr):
    return 1.0 if OP == LINEAR else -150.0 if OP == MIN_GRU else 150.0 if OP == MIN_LSTM else 0.0


@triton.jit
def _pad1(OP: tl.constexpr):
    return float("-inf") if OP == LOG else -150.0 if OP == MIN_LSTM else 0.0


@triton.jit
def scan_forward(
    x0, x1, x2, strides0, strides1, strides2,
    h, strides_h, h0, last,
    first, sequence, resets, strides_resets, spans, flags,
    rows, time, channels, chunk_steps,
    OP: tl.constexpr, IDENTITY: tl.constexpr, REVERSE: tl.constexpr, PHASE: tl.constexpr,
    PACKED: tl.constexpr, RESETS: tl.constexpr, HAS_H0: tl.constexpr, INPUTS: tl.constexpr,
    BRIEF: tl.constexpr, WIDE: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h and the last states of a row and some channels; or, with SPANS, the span of a chunk.

    first (T) marks the first step of a sequence and every step that none covers, sequence (T) is
    its number, or -1; PACKED only. resets (B, T); RESETS only.
    spans (chunks, 5, rows, channels): a chunk's span; then the carry that enters it.
    flags (programs): with WALK and not None, only programs with a flag have work.
    """
    SPACE: tl.constexpr = LOG_STATE if OP == LOG else STATE
    MARKED: tl.constexpr = PACKED or RESETS
    if PHASE == WALK and flags is not None:
        if tl.load(flags + tl.program_id(0)) == 0:
            return
    chunk, row, d, in_row = _place(rows, channels, BLOCK_D)
    state_at = row * channels + d
    slot = (chunk.to(tl.int64) * 5 * rows + row) * channels + d
    part = tl.cast(rows, tl.int64) * channels
    nothing = tl.zeros((1, BLOCK_D), WIDE)
    span_kept, span_lost, span_a, span_b, span_fresh = _no_steps(nothing, SPACE)
    value, rest = span_a, nothing
    if PHASE == CHUNK:
        value = tl.load(spans + slot, in_row, 0.0)
        rest = tl.load(spans + slot + part, in_row, 0.0)
    elif HAS_H0 and not PACKED:
        value = tl.load(h0 + state_at, in_row, 0.0).to(WIDE)
    view0, view1 = _view(x0, row, d, strides0), _view(x1, row, d, strides1)
    view2 = _view(x2, row, d, strides2) if INPUTS > 2 else view1
    view_h = _view(h, row, d, strides_h)
    begin = chunk * chunk_steps
    end = tl.minimum(begin + chunk_steps, time)
    for start in range(begin, end, SEGMENTS * ROWS):
        first_step = start + tl.arange(0, SEGMENTS)[:, None] * ROWS
        raw = ()
        for r in tl.static_range(ROWS):
            step = first_step + r
            t = time - 1 - step if REVERSE else step
            mask = (step < end) & in_row
            if PACKED:
                mask &= tl.load(sequence + t, step < end, 0) >= 0
            p = _load(view0, t, strides0, mask, _pad0(OP), WIDE)
            q = _load(view1, t, strides1, mask, _pad1(OP), WIDE)
            c = _load(view2, t, strides2, mask, 0.0, WIDE) if INPUTS > 2 else q
            raw = raw + ((p, q, c),)
        kept, lost, a, b, fresh = _no_steps(tl.zeros((SEGMENTS, BLOCK_D), WIDE), SPACE)
        steps = ()
        for r in tl.static_range(ROWS):
            k, gone, added = gates(raw[r][0], raw[r][1], raw[r][2], OP, IDENTITY, BRIEF)
            own_a, own_b = _start(k, SPACE)
            starts = False
            step = first_step + r
            if PACKED:
                t = time - 1 - step if REVERSE else step
                starts = (tl.load(first + t, step < end, 0) != 0) & in_row
                if HAS_H0:
                    number = tl.load(sequence + t, step < end, -1).to(tl.int64)
                    enters = starts & (number >= 0)
                    own_a = tl.load(h0 + number * channels + d, enters, 0.0).to(WIDE)
            if RESETS:
                inside = step < end
                reset = _reset_before(resets, row, step, inside, time, strides_resets, REVERSE)
                if PACKED:
                    if REVERSE:  # it lies behind the sequence
                        reset = reset & ~starts
                    own_a = tl.where(reset, _start(k, SPACE)[0], own_a)
                starts = starts | reset
            if MARKED:
                a, b = tl.where(starts, own_a, a), tl.where(starts, own_b, b)
                fresh = tl.where(starts, 1, fresh)
            kept, lost, a, b = _extend(kept, lost, a, b, k, gone, added, SPACE, BRIEF)
            steps = steps + ((k, added, starts, own_a, own_b),)
        if SEGMENTS > 1:
            kept, lost, a, b, fresh = _compose_segments(
                kept, lost, a, b, fresh, SPACE, BRIEF and PHASE != SPANS, MARKED
            )
        if PHASE == SPANS:
            span_kept, span_lost, span_a, span_b, span_fresh = _add_tile(
                span_kept, span_lost, span_a, span_b, span_fresh, kept, lost, a, b, fresh,
                SPACE, SEGMENTS,
            )  # fmt: skip
        else:
            state_a, state_b = _enter_segments(
                steps, kept, lost, a, b, fresh, value, rest, SPACE, BRIEF, MARKED, SEGMENTS, ROWS
            )
            for r in tl.static_range(ROWS):
                step = first_step + r
                t = time - 1 - step if REVERSE else step
                mask = (step < end) & in_row
                k, added, starts, own_a, own_b = steps[r]
                if MARKED:
                    state_a = tl.where(starts, own_a, state_a)
                    state_b = tl.where(starts, own_b, state_b)
                state_a, state_b = _walk(state_a, state_b, k, added, SPACE, BRIEF)
                state = state_a + tl.log(state_b) if SPACE == LOG_STATE else state_a
                if PACKED:
                    number = tl.load(sequence + t, step < end, -1).to(tl.int64)
                    state = tl.where(number >= 0, state, 0.0)
                _store(view_h, t, strides_h, mask, state)
                if PACKED:
                    following = first + (t - 1 if REVERSE else t + 1)
                    ends = tl.load(following, (step < end) & (step + 1 < time), 1) != 0
                    ends = ends & mask & (number >= 0)
                    tl.store(last + number * channels + d, state, ends)
            value, rest = _behind_tile(
                value, rest, kept, lost, a, b, fresh, state_a, state_b, SPACE, BRIEF, SEGMENTS
            )
    if PHASE == SPANS:
        _store_span(spans, slot, part, span_kept, span_lost, span_a, span_b, span_fresh, in_row)
    elif not PACKED:
        if end == time:
            tl.store(last + state_at, value + rest, in_row)


@triton.jit
def scan_carries(
    spans, entering, flags, rows, channels, chunks,
    LOG_SPACE: tl.constexpr, HAS_FIRST: tl.constexpr, WIDE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Replaces the span of every chunk by the carry that enters it; flags what is not finite."""
    SPACE: tl.constexpr = LOG_STATE if LOG_SPACE else STATE
    _, row, d, in_row = _place(rows, channels, BLOCK_D)
    part = tl.cast(rows, tl.int64) * channels
    nothing = tl.zeros((1, BLOCK_D), WIDE)
    value, _ = _start(nothing, SPACE)
    rest = nothing
    if HAS_FIRST:
        value = tl.load(entering + row * channels + d, in_row, 0.0).to(WIDE)
    usable = tl.abs(nothing) < 1.0
    at = spans + row * channels + d
    for _ in range(chunks):
        kept = tl.load(at, in_row, 0.0)
        lost = tl.load(at + part, in_row, 0.0)
        a = tl.load(at + 2 * part, in_row, 0.0)
        b = tl.load(at + 3 * part, in_row, 1.0)
        fresh = tl.load(at + 4 * part, in_row, 0.0)
        tl.store(at, value, in_row)
        tl.store(at + part, rest, in_row)
        value, rest = _carry_on(value, rest, kept, lost, a, b, fresh, SPACE)
        if LOG_SPACE:
            usable = usable & (kept < _INFINITY)
        else:
            usable = usable & (tl.abs(value) < _INFINITY)
        at += 5 * part
    bad = tl.max(tl.max((~usable).to(tl.int32), 1), 0)
    tl.store(flags + tl.program_id(0), bad)


@triton.jit
def scan_backward(
    x0, x1, x2, strides0, strides1, strides2,
    grad0, grad1, grad2, strides_grad0, strides_grad1, strides_grad2,
    h, strides_h, h0, grad_h, strides_grad_h, grad_last, grad_h0,
    first, sequence, resets, strides_resets, spans, flags,
    rows, time, channels, chunk_steps,
    OP: tl.constexpr, IDENTITY: tl.constexpr, REVERSE: tl.constexpr, PHASE: tl.constexpr,
    PACKED: tl.constexpr, RESETS: tl.constexpr, HAS_H0: tl.constexpr, HAS_GRAD_H: tl.constexpr,
    HAS_GRAD_LAST: tl.constexpr, SAVED: tl.constexpr, INPUTS: tl.constexpr,
    BRIEF: tl.constexpr, WIDE: tl.constexpr,
    SEGMENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of a row and some channels.

    Against the direction of the scan. The state is what arrives at h_t from the steps after it: a
    step turns it into a_t times (it + the gradient of h_t alone), which arrives at h_{t-1}. first
    marks, as seen from this side, the last step of a sequence.
    """
    MARKED: tl.constexpr = PACKED or RESETS
    if PHASE == WALK and flags is not None:
        if tl.load(flags + tl.program_id(0)) == 0:
            return
    chunk, row, d, in_row = _place(rows, channels, BLOCK_D)
    state_at = row * channels + d
    slot = (chunk.to(tl.int64) * 5 * rows + row) * channels + d
    part = tl.cast(rows, tl.int64) * channels
    nothing = tl.zeros((1, BLOCK_D), WIDE)
    span_kept, span_lost, span_a, span_b, span_fresh = _no_steps(nothing, ADJOINT)
    value, rest = nothing, nothing
    if PHASE == CHUNK:
        value = tl.load(spans + slot, in_row, 0.0)
        rest = tl.load(spans + slot + part, in_row, 0.0)
    elif HAS_GRAD_LAST and not PACKED:
        value = tl.load(grad_last + state_at, in_row, 0.0).to(WIDE)
    none = _start(nothing, LOG_STATE if OP == LOG else STATE)[0]  # h_{t-1} where there is no h0
    afresh = none
    if HAS_H0 and not PACKED:
        none = tl.load(h0 + state_at, in_row, 0.0).to(WIDE)
    view0, view_h = _view(x0, row, d, strides0), _view(h, row, d, strides_h)
    view1 = _view(x1, row, d, strides1) if SAVED > 1 else view0
    view2 = _view(x2, row, d, strides2) if SAVED > 2 else view0
    view_grad_h = _view(grad_h, row, d, strides_grad_h) if HAS_GRAD_H else view0
    view_grad0 = _view(grad0, row, d, strides_grad0)
    view_grad1 = _view(grad1, row, d, strides_grad1)
    view_grad2 = _view(grad2, row, d, strides_grad2) if INPUTS > 2 else view_grad1
    begin = chunk * chunk_steps
    end = tl.minimum(begin + chunk_steps, time)
    for start in range(begin, end, SEGMENTS * ROWS):
        first_step = start + tl.arange(0, SEGMENTS)[:, None] * ROWS
        raw = ()
        for r in tl.static_range(ROWS):
            step = first_step + r
            t = step if REVERSE else time - 1 - step
            earlier = t + 1 if REVERSE else t - 1  # in the direction of the scan
            mask = (step < end) & in_row
            if PACKED:
                mask &= tl.load(sequence + t, step < end, 0) >= 0
            p = _load(view0, t, strides0, mask, _pad0(OP), WIDE)
            q = _load(view1, t, strides1, mask, _pad1(OP), WIDE) if SAVED > 1 else p
            c = _load(view2, t, strides2, mask, 0.0, WIDE) if SAVED > 2 else p
            begins = step == time - 1
            if PACKED:
                begins |= tl.load(first + earlier, (step < end) & (step + 1 < time), 0) != 0
            before = _load(view_h, earlier, strides_h, mask & ~begins, 0.0, WIDE)
            if PACKED and HAS_H0:
                number = tl.load(sequence + t, step < end, 0).to(tl.int64)
                own = tl.load(h0 + number * channels + d, begins & mask, 0.0).to(WIDE)
                before = tl.where(begins, own, before)
            else:
                before = tl.where(begins, none, before)
            if RESETS:
                behind, inside = step + 1, step < end
                cut = _reset_before(resets, row, behind, inside, time, strides_resets, not REVERSE)
                if REVERSE:  # that of the next sequence
                    cut = cut & ~begins
                before = tl.where(cut, afresh, before)
            grad = tl.zeros((SEGMENTS, BLOCK_D), WIDE)
            if HAS_GRAD_H:
                grad = _load(view_grad_h, t, strides_grad_h, mask, 0.0, WIDE)
            raw = raw + ((p, q, c, before, grad),)
        kept, lost, a, b, fresh = _no_steps(tl.zeros((SEGMENTS, BLOCK_D), WIDE), ADJOINT)
        steps = ()
        factors = ()
        for r in tl.static_range(ROWS):
            p, q, c, before, grad = raw[r]
            k, gone, factor0, factor1, factor2 = adjoint(p, q, c, before, OP, IDENTITY, BRIEF)
            starts = False
            own = grad
            step = first_step + r
            if MARKED:  # nothing arrives from beyond the last step of a sequence, or a reset
                own = tl.zeros((SEGMENTS, BLOCK_D), WIDE)
            if PACKED:
                t = step if REVERSE else time - 1 - step
                starts = (tl.load(first + t, step < end, 0) != 0) & in_row
                if HAS_GRAD_LAST:
                    number = tl.load(sequence + t, step < end, -1).to(tl.int64)
                    enters = starts & (number >= 0)
                    own = tl.load(grad_last + number * channels + d, enters, 0.0).to(WIDE)
            if RESETS:
                inside = (step < end) & (step > 0)
                reset = _reset_before(resets, row, step, inside, time, strides_resets, not REVERSE)
                starts = starts | reset
            if MARKED:
                a = tl.where(starts, own, a)
                fresh = tl.where(starts, 1, fresh)
            kept, lost, a, b = _extend(kept, lost, a, b, k, gone, grad, ADJOINT, BRIEF)
            steps = steps + ((k, grad, starts, own, own),)
            factors = factors + ((factor0, factor1, factor2),)
        if SEGMENTS > 1:
            kept, lost, a, b, fresh = _compose_segments(
                kept, lost, a, b, fresh, ADJOINT, BRIEF and PHASE != SPANS, MARKED
            )
        if PHASE == SPANS:
            span_kept, span_lost, span_a, span_b, span_fresh = _add_tile(
                span_kept, span_lost, span_a, span_b, span_fresh, kept, lost, a, b, fresh,
                ADJOINT, SEGMENTS,
            )  # fmt: skip
        else:
            arrives, _ = _enter_segments(
                steps, kept, lost, a, b, fresh, value, rest, ADJOINT, BRIEF, MARKED, SEGMENTS, ROWS
            )
            for r in tl.static_range(ROWS):
                step = first_step + r
                t = step if REVERSE else time - 1 - step
                mask = (step < end) & in_row
                k, grad, starts, own, _ = steps[r]
                if MARKED:
                    arrives = tl.where(starts, own, arrives)
                grad = arrives + grad
                _store(view_grad0, t, strides_grad0, mask, grad * factors[r][0])
                _store(view_grad1, t, strides_grad1, mask, grad * factors[r][1])
                if INPUTS > 2:
                    _store(view_grad2, t, strides_grad2, mask, grad * factors[r][2])
                arrives = k * grad
                if PACKED:
                    earlier = t + 1 if REVERSE else t - 1
                    begins = tl.load(first + earlier, (step < end) & (step + 1 < time), 1) != 0
                    number = tl.load(sequence + t, step < end, -1).to(tl.int64)
                    begins = begins & mask & (number >= 0)
                    leaves = arrives
                    if RESETS and not REVERSE:
                        behind, inside = step + 1, step < end
                        cut = _reset_before(resets, row, behind, inside, time, strides_resets, True)
                        leaves = tl.where(cut, 0.0, arrives)
                    tl.store(grad_h0 + number * channels + d, leaves, begins)
            value, rest = _behind_tile(
                value, rest, kept, lost, a, b, fresh, arrives, arrives, ADJOINT, BRIEF, SEGMENTS
            )
    if PHASE == SPANS:
        _store_span(spans, slot, part, span_kept, span_lost, span_a, span_b, span_fresh, in_row)
    elif not PACKED:
        if end == time:
            leaves = value + rest
            if RESETS and not REVERSE:
                leaves = tl.where(tl.load(resets + row * strides_resets[0]) != 0, 0.0, leaves)
            tl.store(grad_h0 + state_at, leaves, in_row)


@triton.jit
def scan_step(
    x0, x1, x2, strides0, strides1, strides2, h, stride_h, rows, state_rows, out, channels,
    OP: tl.constexpr, IDENTITY: tl.constexpr, INPUTS: tl.constexpr, BRIEF: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token of a row of the batch and some channels, in place on a row of a larger state h."""
    pieces = tl.cdiv(channels, BLOCK_D)
    index = (tl.program_id(0) // pieces).to(tl.int64)
    d = (tl.program_id(0) % pieces).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < channels
    row = row_of(rows, index, state_rows)
    if row < 0:
        tl.store(out + index * channels + d, tl.zeros((BLOCK_D,), WIDE), in_row)
        return
    a = tl.load(x0 + index * strides0[0] + d * strides0[1], in_row, 0.0).to(WIDE)
    b = tl.load(x1 + index * strides1[0] + d * strides1[1], in_row, 0.0).to(WIDE)
    c = b
    if INPUTS > 2:
        c = tl.load(x2 + index * strides2[0] + d * strides2[1], in_row, 0.0).to(WIDE)
    kept, _, added = gates(a, b, c, OP, IDENTITY, BRIEF)
    at = h + row * stride_h + d
    after = tl.fma(kept, tl.load(at, in_row, 0.0), added)
    tl.store(at, after, in_row)
    tl.store(out + index * channels + d, after, in_row)
