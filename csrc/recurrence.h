// The algebra of the recurrences h_t = a_t * h_{t-1} + b_t, written once for every backend.
//
// V is the number that a backend computes with: a vector of floats on the CPU (cpu/number.h), one
// float or double on a GPU (cuda/number.h). V brings +, -, *, fma, select, exp and the like, and
// everything below is built from these.
//
// Two ideas carry the accuracy.
//
// 1. A gate is kept by whichever of a and 1-a is small. Near a = 1 a float32 cannot hold 1-a, and
//    a sequence with gates around -8 forgets 3e-4 a step: that is 1e-5 of error after 256k steps.
//    So `Gates` stores a-1 where a > 1/2 ("slow") and a elsewhere, each to full relative precision.
//
// 2. Where a > 1/2 rounding errors live on, so `advance` carries what the addition rounded away
//    (Dekker's fast two-sum): the carry is `value + rest`. Where a <= 1/2 an error halves at every
//    step and the plain form is exact enough; there the complement h + (a-1)h would cancel.
//
// Against float64, with gates around -8 and T = 262144, this is off by 2e-7, and the plain walk by
// 1e-5.
//
// Backends that cut time into short runs (CUDA) use a third form, `Span`: what a run of steps does
// to any state that enters it. The steps of a run are plain, since few of them follow each other. A
// span carries both a and 1-a of the whole run, so that the long chain from run to run can
// `advance`.
#pragma once

#include "inline.h"

namespace msrnn {

// What one element contributes to h_t = a h_{t-1} + b.
template <class V>
struct Gates {
  typename V::Mask slow;  // where a > 1/2
  V decay;                // a - 1 where slow, a elsewhere
  V weight, value;        // b = weight * value
  V kept, lost;  // a and 1 - a, each as exact as the gate allows; log a and none in log-space
};

// The state between two steps: value + rest, |rest| a rounding error of value.
template <class V>
struct Carry {
  V value;
  V rest;
};

// sigma(-|x|) and sigma(|x|) from one exponential, both to full relative precision. There are two
// ways to have 1 - small, and `complement` picks one of them.
template <class V>
struct Logistic {
  V small, large;
};

template <class V>
MSRNN_FN Logistic<V> logistic(V x) {
  V e = exponential(minus_abs(x));
  V r = reciprocal(V(1) + e);
  V small = e * r;
  return {small, complement(small, r)};
}

// phi of the paper and its derivative: g(x) = x + 1/2 for x >= 0, sigma(x) otherwise.
template <class V>
struct Activated {
  V value, slope;
};

template <bool identity, class V>
MSRNN_FN Activated<V> activate(V x) {
  if constexpr (identity) {
    return {x, V(1)};
  } else {
    V e = exponential(x);  // where x > 0 this may be anything, since it is not selected
    V r = reciprocal(V(1) + e);
    V s = e * r;
    // g(-0) = g(0) and g'(-0) = g'(0). The sign decides the first. A comparison, which is false for
    // NaN, decides the second.
    return {select(is_negative(x), s, x + V(0.5)), select(at_least_zero(x), V(1), s * r)};
  }
}

// A step reduced to two numbers, h -> kept h + added, or in log-space to their logarithms.
template <class V>
struct Step {
  V kept, added;
};

// The recurrence h_t = a h_{t-1} + b itself, and the product of the a's, which applies the carry
// that enters a tile.
struct Linear {
  template <class V>
  struct State {
    V value;
  };
  // What a run of steps does to the state h that enters it: state + kept h, with kept = 1 - lost.
  template <class V>
  struct Span {
    State<V> state;
    V kept, lost;
  };

  template <class V>
  static MSRNN_FN State<V> enter(V h) {
    return {h};
  }
  template <class V>
  static MSRNN_FN V value_of(State<V> s) {
    return s.value;
  }
  template <class V>
  static MSRNN_FN Span<V> no_steps() {
    return {{V(0)}, V(1), V(0)};
  }
  template <class V>
  static MSRNN_FN Step<V> reduce(Gates<V> g) {
    return {g.kept, g.weight * g.value};
  }
  template <class V>
  static MSRNN_FN State<V> walk(State<V> s, Step<V> x) {
    return {fma(x.kept, s.value, x.added)};
  }
  // A step as a span, and a span extended by the step after it. `lost` is the step's 1 - a.
  template <class V>
  static MSRNN_FN Span<V> span_of(Step<V> x, V lost) {
    return {{x.added}, x.kept, lost};
  }
  template <class V>
  static MSRNN_FN Span<V> extend(Span<V> x, Step<V> y, V lost) {
    return {walk(x.state, y), x.kept * y.kept, fma(lost, x.kept, x.lost)};
  }
  // A product of decays must be 0 or infinite only if one of them is: else 0 * inf or inf * 0 would
  // be NaN where a walk through the steps has a number. Decays of gates lie in [0, 1] and count as
  // never quite 0, which this sees to once for each span. Other decays take clamp_product at every
  // step.
  template <class V>
  static MSRNN_FN Span<V> never_quite_lost(Span<V> x) {
    return {x.state, at_least_tiny(x.kept), x.lost};
  }
  template <class V>
  static MSRNN_FN State<V> apply(Span<V> x, State<V> before) {
    V h = before.value;
    if constexpr (V::brief) return {fma(x.kept, h, x.state.value)};
    auto slow = within_half_and_finite(x.lost, h);
    return {select(slow, fma(-x.lost, h, h) + x.state.value, fma(x.kept, h, x.state.value))};
  }
  template <class V>
  static MSRNN_FN Span<V> then(Span<V> x, Span<V> y) {
    return {apply(y, x.state), x.kept * y.kept, fma(y.lost, V(1) - x.lost, x.lost)};
  }
  // An infinite decay times the zero that a run starts from is NaN, which a walk would not have.
  template <class V>
  static MSRNN_FN bool usable_span(Span<V> x) {
    return is_finite(x.kept);
  }
  // The whole run as one step, for `advance`.
  template <class V>
  static MSRNN_FN Gates<V> as_step(Span<V> x) {
    auto slow = within_half(x.lost);
    return {slow, select(slow, -x.lost, x.kept), V(1), x.state.value, x.kept, x.lost};
  }

  template <class V>
  static MSRNN_FN Carry<V> start() {
    return {V(0), V(0)};
  }
  template <class V>
  static MSRNN_FN Carry<V> no_decay() {
    return {V(1), V(0)};
  }

  template <class V>
  static MSRNN_FN Carry<V> plain(Carry<V> c, Gates<V> g) {
    return {fma(g.weight, g.value, select(g.slow, V(1) + g.decay, g.decay) * c.value), V(0)};
  }

  template <class V>
  static MSRNN_FN Carry<V> advance(Carry<V> c, Gates<V> g) {
    V decayed = fma(g.decay, c.value, keep(g.slow, c.rest));
    return settle(c, g.slow, fma(g.weight, g.value, decayed));
  }

  // The product of a's: the same recurrence without input.
  template <class V>
  static MSRNN_FN Carry<V> compound(Carry<V> c, Gates<V> g) {
    return settle(c, g.slow, fma(g.decay, c.value, keep(g.slow, c.rest)));
  }

  // Where slow, this is the old value plus the change, and what that addition loses. Elsewhere it
  // is the change.
  template <class V>
  static MSRNN_FN Carry<V> settle(Carry<V> c, typename V::Mask slow, V change) {
    V value = add_where(slow, change, c.value);
    return {value, subtract_where(slow, change, value - c.value)};
  }

  template <class V>
  static MSRNN_FN Carry<V> add(Carry<V> c, V x) {
    V change = x + c.rest;
    V value = c.value + change;
    return {value, change - (value - c.value)};
  }

  // State after a tile that started from zero, given the state before the tile.
  template <class V>
  static MSRNN_FN V apply(V local, V product, V before) {
    return fma(product, before, local);
  }

  // Whether `advance` and `apply` hold. An infinity makes them NaN where `plain` need not be.
  template <class V>
  static MSRNN_FN bool usable(V x) {
    return all_finite(x);
  }
};

// The adjoint of a linear recurrence: the gradient s of h_t is a_{t+1} (s of h_{t+1} + what arrives
// at h_{t+1} alone). The latter is `added` here. We add before we multiply, since with an infinite
// decay two products could be infinities of both signs.
struct Adjoint : Linear {
  template <class V>
  static MSRNN_FN State<V> walk(State<V> s, Step<V> x) {
    return {x.kept * (s.value + x.added)};
  }
  template <class V>
  static MSRNN_FN Span<V> span_of(Step<V> x, V lost) {
    return {{x.kept * x.added}, x.kept, lost};
  }
  template <class V>
  static MSRNN_FN Span<V> extend(Span<V> x, Step<V> y, V lost) {
    return {walk(x.state, y), x.kept * y.kept, fma(lost, x.kept, x.lost)};
  }
};

// log h_t = logaddexp(log a + log h_{t-1}, log b). Here `decay` is log a and `value` log b.
struct LogSpace {
  // log h = largest + log(sum) with sum >= 1. So a step costs one exponential and no logarithm.
  template <class V>
  struct State {
    V largest, sum;
  };
  template <class V>
  struct Span {
    State<V> state;
    V kept;  // the sum of log a
  };

  template <class V>
  static MSRNN_FN State<V> enter(V log_h) {
    return {log_h, V(1)};
  }
  template <class V>
  static MSRNN_FN V value_of(State<V> s) {
    return s.largest + logarithm(s.sum);
  }
  template <class V>
  static MSRNN_FN Span<V> no_steps() {
    return {{V::minus_infinity(), V(1)}, V(0)};
  }
  // The sum of two states. Equal infinities have the distance NaN, which counts as far away, so
  // that log 0 + log 0 = log 0.
  template <class V>
  static MSRNN_FN State<V> join(State<V> x, State<V> y) {
    V distance = x.largest - y.largest;
    V e = zero_if_nan(exponential(minus_abs(distance)));
    auto left = at_least_zero(distance);
    return {larger_or_nan(x.largest, y.largest),
            fma(select(left, y.sum, x.sum), e, select(left, x.sum, y.sum))};
  }
  template <class V>
  static MSRNN_FN Step<V> reduce(Gates<V> g) {
    return {g.decay, g.value};
  }
  template <class V>
  static MSRNN_FN State<V> walk(State<V> s, Step<V> x) {
    return join(State<V>{s.largest + x.kept, s.sum}, State<V>{x.added, V(1)});
  }
  template <class V>
  static MSRNN_FN Span<V> span_of(Step<V> x, V) {
    return {{x.added, V(1)}, x.kept};
  }
  template <class V>
  static MSRNN_FN Span<V> extend(Span<V> x, Step<V> y, V) {
    return {walk(x.state, y), x.kept + y.kept};
  }
  template <class V>
  static MSRNN_FN State<V> apply(Span<V> x, State<V> before) {
    return join(State<V>{before.largest + x.kept, before.sum}, x.state);
  }
  template <class V>
  static MSRNN_FN Span<V> then(Span<V> x, Span<V> y) {
    return {apply(y, x.state), x.kept + y.kept};
  }
  template <class V>
  static MSRNN_FN bool usable_span(Span<V> x) {
    return greater(-x.kept, V::minus_infinity());
  }
  template <class V>
  static MSRNN_FN Gates<V> as_step(Span<V> x) {
    return {never(x.kept), x.kept, V(1), value_of(x.state), x.kept, V(0)};
  }

  template <class V>
  static MSRNN_FN Carry<V> start() {
    return {V::minus_infinity(), V(0)};
  }
  template <class V>
  static MSRNN_FN Carry<V> no_decay() {
    return {V(0), V(0)};
  }

  // logaddexp(x + rest, y). Equal infinities count as distance 0, so that log 0 + log 0 = log 0.
  template <class V>
  static MSRNN_FN Carry<V> log_add(Carry<V> x, V y) {
    V distance = select(equal(x.value, y), V(0), (x.value - y) + x.rest);
    auto left = at_least_zero(distance);
    V change = log1p_unit(exponential(minus_abs(distance))) + keep(left, x.rest);
    V larger = select(left, x.value, y);
    V value = larger + change;
    return {value, keep(is_finite(value), change - (value - larger))};
  }

  template <class V>
  static MSRNN_FN Carry<V> compound(Carry<V> c, Gates<V> g) {
    V value = c.value + g.decay;  // an exact two-sum, since log a may exceed the sum so far
    V other = value - c.value;
    V rest = (c.value - (value - other)) + (g.decay - other) + c.rest;
    return {value, keep(is_finite(value), rest)};
  }

  template <class V>
  static MSRNN_FN Carry<V> advance(Carry<V> c, Gates<V> g) {
    return log_add(compound(c, g), g.value);
  }
  template <class V>
  static MSRNN_FN Carry<V> plain(Carry<V> c, Gates<V> g) {
    return advance(c, g);
  }
  template <class V>
  static MSRNN_FN V apply(V local, V product, V before) {
    return log_add(Carry<V>{product + before, V(0)}, local).value;
  }
  template <class V>
  static MSRNN_FN bool usable(V) {
    return true;
  }
};

// The carry after a run of steps: compensated, or plain where an infinity makes that NaN.
template <class Space, class V>
MSRNN_FN Carry<V> carry_through(Carry<V> c, typename Space::template Span<V> x) {
  Gates<V> g = Space::as_step(x);
  Carry<V> after = Space::advance(c, g);
  return is_finite(after.value) ? after : Space::plain(c, g);
}

// The same for a run that may have started afresh, with a state of its own.
template <class Space, class V>
MSRNN_FN Carry<V> carry_after(Carry<V> c, typename Space::template Span<V> x, bool starts) {
  return starts ? Carry<V>{Space::value_of(x.state), V(0)} : carry_through<Space>(c, x);
}

// The ops. Backward, with the adjoint s_t = grad_t + a_{t+1} s_{t+1}, the gradient of input i is
// s_t * factor_i(x_t, h_{t-1}). `adjoint` returns the decay and fills the factors, for which it
// reads the first `saved` inputs. An op is `gated` if its decays in Linear space lie in [0, 1], and
// `cheap` if gates() costs so little that it may as well be called twice.

struct LinearScan {
  using Space = Linear;
  static constexpr int inputs = 2, saved = 1;
  static constexpr bool gated = false, cheap = true;

  template <class V>
  static MSRNN_FN Gates<V> gates(const V (&x)[2]) {
    auto slow = above_half(x[0]);  // then a - 1 is exact (Sterbenz) up to a = 2
    return {slow, select(slow, x[0] - V(1), x[0]), V(1), x[1], x[0], V(1) - x[0]};
  }
  template <class V>
  static MSRNN_FN Gates<V> adjoint(const V (&x)[1], V before, V (&factor)[2]) {
    factor[0] = before;
    factor[1] = V(1);
    return gates<V>({x[0], V(0)});
  }
};

struct DecayScan {
  using Space = Linear;
  static constexpr int inputs = 2, saved = 1;
  static constexpr bool gated = false, cheap = false;

  template <class V>
  static MSRNN_FN Gates<V> gates(const V (&x)[2]) {
    auto slow = is_gentle(x[0]);
    V gone = expm1_gentle(x[0]), a = exp_any(x[0]);
    return {slow, select(slow, gone, a),        V(1),
            x[1], select(slow, V(1) + gone, a), select(slow, -gone, V(1) - a)};
  }
  template <class V>
  static MSRNN_FN Gates<V> adjoint(const V (&x)[1], V before, V (&factor)[2]) {
    Gates<V> g = gates<V>({x[0], V(0)});
    factor[0] = g.kept * before;
    factor[1] = V(1);
    return g;
  }
};

struct LogScan {
  using Space = LogSpace;
  static constexpr int inputs = 2, saved = 2;
  static constexpr bool gated = true, cheap = false;

  template <class V>
  static MSRNN_FN Gates<V> gates(const V (&x)[2]) {
    return {never(x[0]), x[0], V(1), x[1], x[0], V(0)};
  }
  // p = exp(log a + log h_{t-1} - log h_t) and q = exp(log b - log h_t) sum to 1.
  template <class V>
  static MSRNN_FN Gates<V> adjoint(const V (&x)[2], V before, V (&factor)[2]) {
    V from_state = x[0] + before;
    auto dead = both_minus_infinity(from_state, x[1]);  // no gradient flows through log 0
    V distance = from_state - x[1];
    Logistic<V> w = logistic(distance);
    auto slow = at_least_zero(distance);
    factor[0] = drop(dead, select(slow, w.large, w.small));
    factor[1] = drop(dead, select(slow, w.small, w.large));
    return {slow, drop(dead, select(slow, -w.small, w.small)), V(0), V(0), factor[0], factor[1]};
  }
};

// a = sigma(-gate), b = sigma(gate) phi(candidate).
template <bool identity>
struct MinGru {
  using Space = Linear;
  static constexpr int inputs = 2, saved = 2;
  static constexpr bool gated = true, cheap = false;

  template <class V>
  static MSRNN_FN Gates<V> gates(const V (&x)[2]) {
    Logistic<V> w = logistic(x[0]);
    auto slow = is_negative(x[0]);
    V z = select(slow, w.small, w.large);
    return {slow,
            copy_sign(w.small, x[0]),
            z,
            activate<identity>(x[1]).value,
            select(slow, w.large, w.small),
            z};
  }
  template <class V>
  static MSRNN_FN Gates<V> adjoint(const V (&x)[2], V before, V (&factor)[2]) {
    Logistic<V> w = logistic(x[0]);
    auto slow = is_negative(x[0]);
    Activated<V> candidate = activate<identity>(x[1]);
    factor[0] = w.small * w.large * (candidate.value - before);
    V z = select(slow, w.small, w.large);
    factor[1] = z * candidate.slope;
    return {slow, copy_sign(w.small, x[0]), V(0), V(0), select(slow, w.large, w.small), z};
  }
};

// a = f/(f+i), b = i/(f+i) phi(candidate), f = sigma(forget), i = sigma(input).
//
// With 1/f = 1 + exp(-forget), a = (1/i) / (1/f + 1/i). Scaling both reciprocals by
// exp(min(lesser, 0)), where `lesser` is the smaller pre-activation, leaves only exponentials of
// non-positive numbers, so +-1e4 neither overflows nor loses the ratio.
template <bool identity>
struct MinLstm {
  using Space = Linear;
  static constexpr int inputs = 3, saved = 3;
  static constexpr bool gated = true, cheap = false;

  template <class V>
  struct Weights {
    typename V::Mask slow;  // forget > input: a > 1/2
    V small, large;         // the lesser and the greater of a and 1-a
    V lesser_off;           // a (1-a) sigma(-lesser pre-activation)
    V greater_off;          // a (1-a) sigma(-greater pre-activation)
  };

  template <class V>
  static MSRNN_FN Weights<V> weigh(V forget, V input) {
    auto slow = greater(forget, input);
    V lesser = select(slow, input, forget), other = select(slow, forget, input);
    V bound = min_with_zero(lesser);
    V x = exponential(minus_abs(lesser));
    V scaled = exp_difference(bound, other);  // exp(bound - other), its rounding corrected
    auto positive = at_least_zero(lesser);
    V sum_lesser = V(1) + x;
    V sum_other = select(positive, V(1), x) + scaled;
    V r = reciprocal(sum_lesser + sum_other);
    V small = sum_other * r, large = complement(small, sum_lesser * r);
    return {slow, small, large, small * (select(positive, x, V(1)) * r), large * (scaled * r)};
  }

  template <class V>
  static MSRNN_FN Gates<V> gates(const V (&x)[3]) {
    Weights<V> w = weigh(x[0], x[1]);
    V z = select(w.slow, w.small, w.large);
    return {w.slow,
            select(w.slow, -w.small, w.small),
            z,
            activate<identity>(x[2]).value,
            select(w.slow, w.large, w.small),
            z};
  }
  template <class V>
  static MSRNN_FN Gates<V> adjoint(const V (&x)[3], V before, V (&factor)[3]) {
    Weights<V> w = weigh(x[0], x[1]);
    Activated<V> candidate = activate<identity>(x[2]);
    V difference = before - candidate.value;
    factor[0] = select(w.slow, w.greater_off, w.lesser_off) * difference;
    factor[1] = -(select(w.slow, w.lesser_off, w.greater_off) * difference);
    V z = select(w.slow, w.small, w.large);
    factor[2] = z * candidate.slope;
    return {w.slow, select(w.slow, -w.small, w.small), V(0),
            V(0),   select(w.slow, w.large, w.small),  z};
  }
};

}  // namespace msrnn
