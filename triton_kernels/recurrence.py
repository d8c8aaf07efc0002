"""The algebra of csrc/recurrence.h on Triton's blocks: gates, their derivatives, and runs of steps.

A run of steps is a span: what it does to any state that enters it. Of h -> kept h + state both
kept and lost = 1 - kept are carried, each as exact as the gates allow: near kept = 1 a float32 does
not hold 1 - kept. In log-space a span is the sum of log a, and largest + log(sum).
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
def exponential(x):
    """exp(x), to a rounding or two; NaN or anything where x > 88."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    bounded = tl.where(x < -150.0, -150.0, x)
    y = bounded * _LOG2_E
    rest = tl.fma(bounded, _LOG2_E_REST, tl.fma(bounded, _LOG2_E, -y))
    e = tl.exp2(y)
    return tl.fma(e, rest * _LOG_2, e)


@triton.jit
def exp_any(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    e = exponential(tl.where(x > 150.0, 150.0, x))
    return tl.where(x > 88.7228394, _INFINITY, e)


@triton.jit
def exp_difference(a, b):
    """exp(a - b) for a <= 0, a <= b; the subtraction's own rounding is corrected."""
    d = a - b
    e = exponential(d)
    lost = (a - d) - b
    return tl.fma(e, tl.where(tl.abs(lost) < _INFINITY, lost, 0.0), e)


@triton.jit
def expm1_gentle(x):
    """exp(x) - 1 for |x| < log 2, by its Taylor polynomial."""
    p = tl.fma(x, tl.fma(x, 2.7557319223985893e-6, 2.4801587301587302e-5), 1.984126984126984e-4)
    if x.dtype == tl.float64:
        q = tl.fma(x, 1.6059043836821613e-10, 2.08767569878681e-9)
        q = tl.fma(x, tl.fma(x, 1.1470745597729725e-11, 1.6059043836821613e-10), 2.08767569878681e-9)
        q = tl.fma(x, tl.fma(x, q, 2.505210838544172e-8), 2.755731922398589e-7)
        q = tl.fma(x, q, 2.7557319223985893e-6)
        p = tl.fma(x, tl.fma(x, q, 2.4801587301587302e-5), 1.984126984126984e-4)
    p = tl.fma(x, p, 1.388888888888889e-3)
    p = tl.fma(x, p, 8.333333333333333e-3)
    p = tl.fma(x, p, 4.1666666666666664e-2)
    p = tl.fma(x, p, 1.6666666666666666e-1)
    p = tl.fma(x, p, 0.5)
    return tl.fma(p * x, x, x)


@triton.jit
def logistic(x):
    """sigma(-|x|) and sigma(|x|) from one exponential."""
    e = exponential(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return e * r, r


@triton.jit
def activate(x, IDENTITY: tl.constexpr):
    """phi of the paper and its derivative: g(x) = x + 1/2 for x >= 0, sigma(x) otherwise."""
    if IDENTITY:
        return x, tl.full(x.shape, 1.0, x.dtype)
    small, large = logistic(x)
    negative = x < 0
    value = tl.where(negative, small, x + 0.5)
    return value, tl.where(negative, small * large, tl.where(x >= 0, 1.0, x))


@triton.jit
def weigh(forget, input):
    """Of minLSTM: 1 - a and a, and a (1 - a) sigma(-forget), a (1 - a) sigma(-input)."""
    slow = forget > input
    lesser = tl.where(slow, input, forget)
    other = tl.where(slow, forget, input)
    bound = tl.where(lesser > 0, 0.0, lesser)
    x = exponential(-tl.abs(lesser))
    scaled = exp_difference(bound, other)
    positive = lesser >= 0
    sum_lesser = 1.0 + x
    sum_other = tl.where(positive, 1.0, x) + scaled
    r = 1.0 / (sum_lesser + sum_other)
    small = sum_other * r
    large = sum_lesser * r
    lesser_off = small * (tl.where(positive, x, 1.0) * r)
    greater_off = large * (scaled * r)
    lost = tl.where(slow, small, large)
    kept = tl.where(slow, large, small)
    of_forget = tl.where(slow, greater_off, lesser_off)
    of_input = tl.where(slow, lesser_off, greater_off)
    return kept, lost, of_forget, of_input


@triton.jit
def gates(x0, x1, x2, OP: tl.constexpr, IDENTITY: tl.constexpr):
    """A step as a span: kept, lost, state; in log-space kept, largest, sum."""
    if OP == LINEAR:
        return x0, 1.0 - x0, x1
    if OP == DECAY:
        slow = tl.abs(x0) < 0.6931471805599453
        gone = expm1_gentle(x0)
        a = exp_any(x0)
        return tl.where(slow, 1.0 + gone, a), tl.where(slow, -gone, 1.0 - a), x1
    if OP == LOG:
        return x0, x1, tl.full(x1.shape, 1.0, x1.dtype)
    if OP == MIN_GRU:
        small, large = logistic(x0)
        slow = x0 < 0
        lost = tl.where(slow, small, large)
        value, _ = activate(x1, IDENTITY)
        return tl.where(slow, large, small), lost, lost * value
    kept, lost, _, _ = weigh(x0, x1)
    value, _ = activate(x2, IDENTITY)
    return kept, lost, lost * value


@triton.jit
def adjoint(x0, x1, x2, before, OP: tl.constexpr, IDENTITY: tl.constexpr):
    """kept and lost of a step, and the derivatives of h_t in its inputs, h_{t-1} held fixed."""
    one = tl.full(x0.shape, 1.0, x0.dtype)
    if OP == LINEAR:
        return x0, 1.0 - x0, before, one, one
    if OP == DECAY:
        kept, lost, _ = gates(x0, x0, x0, OP, IDENTITY)
        return kept, lost, kept * before, one, one
    if OP == LOG:
        # exp(log a + log h_{t-1} - log h_t) and exp(log b - log h_t) sum to 1.
        from_state = x0 + before
        dead = (from_state == -_INFINITY) & (x1 == -_INFINITY)  # log 0: no gradient flows
        distance = from_state - x1
        small, large = logistic(distance)
        slow = distance >= 0
        kept = tl.where(dead, 0.0, tl.where(slow, large, small))
        lost = tl.where(dead, 0.0, tl.where(slow, small, large))
        return kept, lost, kept, lost, one
    if OP == MIN_GRU:
        small, large = logistic(x0)
        slow = x0 < 0
        lost = tl.where(slow, small, large)
        value, slope = activate(x1, IDENTITY)
        kept = tl.where(slow, large, small)
        return kept, lost, small * large * (value - before), lost * slope, one
    kept, lost, of_forget, of_input = weigh(x0, x1)
    value, slope = activate(x2, IDENTITY)
    difference = before - value
    return kept, lost, of_forget * difference, -(of_input * difference), lost * slope


@triton.jit
def apply(kept, lost, state, before):
    """The state after a span that `before` enters."""
    slow = (tl.abs(lost) < 0.5) & (tl.abs(before) < _INFINITY)
    return tl.where(slow, tl.fma(-lost, before, before) + state, tl.fma(kept, before, state))


@triton.jit
def compound(a, b):
    """The product of two decays: 0 or infinite only if one of them is."""
    p = a * b
    tiny = 2.2250738585072014e-308 if a.dtype == tl.float64 else 1.2e-38
    huge = 1.7976931348623157e308 if a.dtype == tl.float64 else 3.4028230e38
    sign = tl.where((a < 0) != (b < 0), -1.0, 1.0).to(a.dtype)
    vanished = (p == 0) & (a != 0) & (b != 0)
    finite = (tl.abs(a) < _INFINITY) & (tl.abs(b) < _INFINITY)
    overflowed = (tl.abs(p) == _INFINITY) & finite
    return tl.where(vanished, sign * tiny, tl.where(overflowed, sign * huge, p))


@triton.jit
def then(kept1, lost1, state1, kept2, lost2, state2):
    """A span, and the span after it."""
    state = apply(kept2, lost2, state2, state1)
    return compound(kept1, kept2), tl.fma(lost2, 1.0 - lost1, lost1), state


@triton.jit
def then_gated(kept1, lost1, state1, kept2, lost2, state2):
    """Likewise, of decays in [0, 1]."""
    state = apply(kept2, lost2, state2, state1)
    return kept1 * kept2, tl.fma(lost2, 1.0 - lost1, lost1), state


@triton.jit
def join(largest1, sum1, largest2, sum2):
    """log-space states added up. Equal infinities have no distance: that counts as far away."""
    distance = largest1 - largest2
    e = exponential(-tl.abs(distance))
    e = tl.where(e == e, e, 0.0)
    left = distance >= 0
    unordered = (largest1 != largest1) | (largest2 != largest2)
    largest = tl.where(left, largest1, tl.maximum(largest1, largest2))
    largest = tl.where(unordered, largest1 + largest2, largest)
    return largest, tl.fma(tl.where(left, sum2, sum1), e, tl.where(left, sum1, sum2))


@triton.jit
def then_log(kept1, largest1, sum1, kept2, largest2, sum2):
    largest, sum = join(largest1 + kept2, sum1, largest2, sum2)
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
def through(value, rest, kept, lost, state):
    """The compensated carry value + rest after a span (csrc/recurrence.h, `advance`)."""
    slow = tl.abs(lost) < 0.5
    decay = tl.where(slow, -lost, kept)
    change = state + tl.fma(decay, value, tl.where(slow, rest, 0.0))
    after = tl.where(slow, value + change, change)
    left = tl.where(slow, change - (after - value), 0.0)
    finite = tl.abs(after) < _INFINITY
    return tl.where(finite, after, tl.fma(kept, value, state)), tl.where(finite, left, 0.0)
