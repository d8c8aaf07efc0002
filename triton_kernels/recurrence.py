"""The algebra of csrc/recurrence.h on Triton's blocks: gates, their derivatives, runs of steps.

A step h -> kept h + added comes with lost = 1 - kept, each as exact as the gates allow: near
kept = 1 a float32 does not hold 1 - kept. A run of steps is a span, of the same three numbers. In
log-space a step is log a and log b; a state is largest + log(sum); a span the sum of log a and a
state.

BRIEF, for 16-bit data: exponentials without their last two bits, and no compensation.
"""

import triton
import triton.language as tl

LINEAR: tl.constexpr = tl.constexpr(0)
DECAY: tl.constexpr = tl.constexpr(1)
LOG: tl.constexpr = tl.constexpr(2)
MIN_GRU: tl.constexpr = tl.constexpr(3)
MIN_LSTM: tl.constexpr = tl.constexpr(4)

_LOG2_E: tl.constexpr = tl.constexpr(1.44269502)  # with the rest below, log2(e)
_LOG2_E_REST: tl.constexpr = tl.constexpr(1.92596303e-8)
_LOG_2: tl.constexpr = tl.constexpr(0.693147182)
_INFINITY: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def exponential(x, BRIEF: tl.constexpr):
    """exp(x) to a rounding or two, for x < 88; BRIEF: to 1e-7 |x|."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    y = x * _LOG2_E
    e = tl.exp2(y)
    if BRIEF:
        return e
    bounded = tl.where(x < -150.0, -150.0, x)
    rest = tl.fma(bounded, _LOG2_E_REST, tl.fma(bounded, _LOG2_E, -(bounded * _LOG2_E)))
    return tl.fma(e, rest * _LOG_2, e)


@triton.jit
def bounded_exponential(x, BRIEF: tl.constexpr):
    """exp(x), at most 6e37 (float64: 1e304): what is divided by it stays a number."""
    most = 700.0 if x.dtype == tl.float64 else 87.0
    return exponential(tl.where(x > most, most, x), BRIEF)


@triton.jit
def exp_any(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    return tl.where(
        x > 88.7228394, _INFINITY, exponential(tl.where(x > 88.7228394, 88.0, x), False)
    )


@triton.jit
def expm1_gentle(x):
    """exp(x) - 1 for |x| < log 2, by its Taylor polynomial. Compilers fuse it; `tl.fma` would round
    its constants to float32 in some versions."""
    p = x * (x * 2.7557319223985893e-6 + 2.4801587301587302e-5) + 1.984126984126984e-4
    if x.dtype == tl.float64:
        q = x * 1.1470745597729725e-11 + 1.6059043836821613e-10
        q = x * (x * q + 2.08767569878681e-9) + 2.505210838544172e-8
        q = x * (x * q + 2.755731922398589e-7) + 2.7557319223985893e-6
        p = x * (x * q + 2.4801587301587302e-5) + 1.984126984126984e-4
    p = x * p + 1.388888888888889e-3
    p = x * p + 8.333333333333333e-3
    p = x * p + 4.1666666666666664e-2
    p = x * p + 1.6666666666666666e-1
    p = x * p + 0.5
    return (p * x) * x + x


@triton.jit
def log1p_unit(x):
    """log(1 + x) for 0 <= x <= 1, and what 1 + x rounds away."""
    u = 1.0 + x
    return tl.log(u) - ((u - 1.0) - x) / u


@triton.jit
def logistic(x, BRIEF: tl.constexpr):
    """sigma(-x) and sigma(x) from one exponential; the first is never quite 0."""
    e = bounded_exponential(x, BRIEF)
    r = 1.0 / (1.0 + e)
    return r, e * r


@triton.jit
def activate(x, IDENTITY: tl.constexpr, BRIEF: tl.constexpr):
    """phi of the paper and its derivative: g(x) = x + 1/2 for x >= 0, sigma(x) otherwise."""
    if IDENTITY:
        return x, tl.full(x.shape, 1.0, x.dtype)
    off, on = logistic(x, BRIEF)
    positive = x >= 0
    return tl.where(positive, x + 0.5, on), tl.where(positive, 1.0, off * on)


@triton.jit
def weigh(forget, input, BRIEF: tl.constexpr):
    """Of minLSTM: a and 1 - a, and a (1 - a) sigma(-forget), a (1 - a) sigma(-input).

    a = (1 + e^-input) / (2 + e^-input + e^-forget), both divided by the larger exponential if
    that is above 1: nothing overflows. The difference of two large exponents is corrected for its
    own rounding.
    """
    slow = forget > input
    lesser = tl.where(slow, input, forget)
    greater = tl.where(slow, forget, input)
    lesser = tl.where(greater == greater, lesser, greater)  # a NaN in either
    bound = tl.where(lesser > 0, 0.0, lesser)
    x = exponential(-tl.abs(lesser), BRIEF)
    distance = bound - greater
    scaled = exponential(distance, BRIEF)
    if not BRIEF:
        missed = (bound - distance) - greater
        scaled = tl.fma(scaled, tl.where(tl.abs(missed) < _INFINITY, missed, 0.0), scaled)
    positive = lesser >= 0
    sum_lesser = 1.0 + x
    sum_greater = tl.where(positive, 1.0, x) + scaled
    r = 1.0 / (sum_lesser + sum_greater)
    small = sum_greater * r
    large = sum_lesser * r
    lesser_off = small * (tl.where(positive, x, 1.0) * r)
    greater_off = large * (scaled * r)
    kept = tl.where(slow, large, small)
    lost = tl.where(slow, small, large)
    of_forget = tl.where(slow, greater_off, lesser_off)
    of_input = tl.where(slow, lesser_off, greater_off)
    return kept, lost, of_forget, of_input


@triton.jit
def decay(log_a):
    """exp(log_a) and 1 - exp(log_a)."""
    gentle = tl.abs(log_a) < 0.6931471805599453
    gone = expm1_gentle(log_a)
    a = exp_any(log_a)
    return tl.where(gentle, 1.0 + gone, a), tl.where(gentle, -gone, 1.0 - a)


@triton.jit
def gates(x0, x1, x2, OP: tl.constexpr, IDENTITY: tl.constexpr, BRIEF: tl.constexpr):
    """A step: kept, lost, added; in log-space log a, nothing, log b."""
    if OP == LINEAR:
        return x0, 1.0 - x0, x1
    if OP == DECAY:
        kept, lost = decay(x0)
        return kept, lost, x1
    if OP == LOG:
        return x0, x0, x1
    if OP == MIN_GRU:
        kept, lost = logistic(x0, BRIEF)
        value, _ = activate(x1, IDENTITY, BRIEF)
        return kept, lost, lost * value
    kept, lost, _, _ = weigh(x0, x1, BRIEF)
    value, _ = activate(x2, IDENTITY, BRIEF)
    return kept, lost, lost * value


@triton.jit
def adjoint(x0, x1, x2, before, OP: tl.constexpr, IDENTITY: tl.constexpr, BRIEF: tl.constexpr):
    """kept and lost of a step, and the derivatives of h_t in its inputs, h_{t-1} held fixed."""
    one = tl.full(x0.shape, 1.0, x0.dtype)
    if OP == LINEAR:
        return x0, 1.0 - x0, before, one, one
    if OP == DECAY:
        kept, lost = decay(x0)
        return kept, lost, kept * before, one, one
    if OP == LOG:
        # exp(log a + log h_{t-1} - log h_t) and exp(log b - log h_t) sum to 1.
        from_state = x0 + before
        dead = (from_state == -_INFINITY) & (x1 == -_INFINITY)  # log 0: no gradient flows
        lost, kept = logistic(from_state - x1, BRIEF)
        kept = tl.where(dead, 0.0, kept)
        lost = tl.where(dead, 0.0, lost)
        return kept, lost, kept, lost, one
    if OP == MIN_GRU:
        kept, lost = logistic(x0, BRIEF)
        value, slope = activate(x1, IDENTITY, BRIEF)
        return kept, lost, kept * lost * (value - before), lost * slope, one
    kept, lost, of_forget, of_input = weigh(x0, x1, BRIEF)
    value, slope = activate(x2, IDENTITY, BRIEF)
    difference = before - value
    return kept, lost, of_forget * difference, -(of_input * difference), lost * slope


@triton.jit
def apply(kept, lost, state, before, BRIEF: tl.constexpr):
    """The state after a span that `before` enters."""
    if BRIEF:
        return tl.fma(kept, before, state)
    slow = tl.abs(lost) < 0.5
    return tl.where(slow, tl.fma(-lost, before, before) + state, tl.fma(kept, before, state))


@triton.jit
def then(kept1, lost1, state1, kept2, lost2, state2):
    """A span, and the span after it."""
    state = apply(kept2, lost2, state2, state1, False)
    return kept1 * kept2, tl.fma(lost2, 1.0 - lost1, lost1), state


@triton.jit
def then_brief(kept1, state1, kept2, state2):
    return kept1 * kept2, tl.fma(kept2, state1, state2)


@triton.jit
def join(largest1, sum1, largest2, sum2, BRIEF: tl.constexpr):
    """log-space states added up. Equal infinities have no distance: that counts as far away."""
    distance = largest1 - largest2
    e = exponential(-tl.abs(distance), BRIEF)
    e = tl.where(e == e, e, 0.0)
    left = distance >= 0
    unordered = (largest1 != largest1) | (largest2 != largest2)
    largest = tl.where(left, largest1, tl.maximum(largest1, largest2))
    largest = tl.where(unordered, largest1 + largest2, largest)
    return largest, tl.fma(tl.where(left, sum2, sum1), e, tl.where(left, sum1, sum2))


@triton.jit
def then_log(kept1, largest1, sum1, kept2, largest2, sum2):
    largest, sum = join(largest1 + kept2, sum1, largest2, sum2, False)
    return kept1 + kept2, largest, sum


@triton.jit
def then_packed(kept1, lost1, state1, fresh1, kept2, lost2, state2, fresh2):
    """Where the second span holds a sequence's first step, nothing of the first one is left."""
    kept, lost, state = then(kept1, lost1, state1, kept2, lost2, state2)
    fresh = fresh2 != 0
    kept = tl.where(fresh, kept2, kept)
    return kept, tl.where(fresh, lost2, lost), tl.where(fresh, state2, state), fresh1 | fresh2


@triton.jit
def then_log_packed(kept1, largest1, sum1, fresh1, kept2, largest2, sum2, fresh2):
    kept, largest, sum = then_log(kept1, largest1, sum1, kept2, largest2, sum2)
    fresh = fresh2 != 0
    kept = tl.where(fresh, kept2, kept)
    return kept, tl.where(fresh, largest2, largest), tl.where(fresh, sum2, sum), fresh1 | fresh2


@triton.jit
def advance(value, rest, kept, lost, state):
    """The compensated carry value + rest after a span (csrc/recurrence.h)."""
    slow = tl.abs(lost) < 0.5
    change = state + tl.fma(tl.where(slow, -lost, kept), value, tl.where(slow, rest, 0.0))
    after = tl.where(slow, value + change, change)
    return after, tl.where(slow, change - (after - value), 0.0)


@triton.jit
def advance_log(value, rest, kept, state):
    """Likewise in log-space: log h = value + rest; kept is a sum of log a, state a log h."""
    moved = value + kept  # exact two-sum: either may be the larger
    other = moved - value
    missed = (value - (moved - other)) + (kept - other) + rest
    missed = tl.where(tl.abs(moved) < _INFINITY, missed, 0.0)
    distance = tl.where(moved == state, 0.0, (moved - state) + missed)
    left = distance >= 0
    larger = tl.where(left, moved, state)
    larger = tl.where(distance == distance, larger, moved + state)  # a NaN in either
    e = exponential(-tl.abs(distance), False)
    change = log1p_unit(e) + tl.where(left, missed, 0.0)
    after = larger + change
    return after, tl.where(tl.abs(after) < _INFINITY, change - (after - larger), 0.0)
