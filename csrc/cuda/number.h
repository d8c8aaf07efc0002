// The numbers that recurrence.h computes with on a GPU: one float or double for each thread.
//
// The twin of this file is cpu/number.h. Functions that exist in both have the same names, and a
// set comes in the same order: arithmetic, comparisons, selection, special functions.
//
// Float is exact to a rounding or two: its exp splits the argument, which would otherwise cost
// 6e-8 |x| of relative error. Brief serves 16-bit data, whose numbers are 4e-3 apart. It leaves the
// split out and saves 4 instructions for each exponential.
#pragma once

#include <cmath>
#include <cstring>

#include "../recurrence.h"
#include "device.h"

namespace msrnn {
namespace gpu {

constexpr float kInfinity = HUGE_VALF;

template <class T, bool exact = true>
struct Number {
  using Scalar = T;
  using Mask = bool;
  static constexpr bool brief = !exact;

  T v;

  Number() = default;
  template <class S>
  MSRNN_FN explicit Number(S x) : v(static_cast<T>(x)) {}
  static MSRNN_FN Number minus_infinity() { return Number(-kInfinity); }
};
using Float = Number<float, true>;
using Brief = Number<float, false>;
using Double = Number<double, true>;

// Every function below is a template over T and `exact`, which follow from its operands.
#define MSRNN_NUMBER template <class T, bool exact>
#define MSRNN_N Number<T, exact>

MSRNN_NUMBER MSRNN_FN MSRNN_N operator+(MSRNN_N a, MSRNN_N b) { return MSRNN_N(a.v + b.v); }
MSRNN_NUMBER MSRNN_FN MSRNN_N operator-(MSRNN_N a, MSRNN_N b) { return MSRNN_N(a.v - b.v); }
MSRNN_NUMBER MSRNN_FN MSRNN_N operator*(MSRNN_N a, MSRNN_N b) { return MSRNN_N(a.v * b.v); }
MSRNN_NUMBER MSRNN_FN MSRNN_N operator-(MSRNN_N x) { return MSRNN_N(-x.v); }
MSRNN_FN float fused(float a, float b, float c) { return fmaf(a, b, c); }
MSRNN_FN double fused(double a, double b, double c) { return ::fma(a, b, c); }
MSRNN_NUMBER MSRNN_FN MSRNN_N fma(MSRNN_N a, MSRNN_N b, MSRNN_N c) {
  return MSRNN_N(fused(a.v, b.v, c.v));
}
MSRNN_FN float magnitude(float x) { return fabsf(x); }
MSRNN_FN double magnitude(double x) { return fabs(x); }
MSRNN_FN float with_sign(float x, float s) { return copysignf(x, s); }
MSRNN_FN double with_sign(double x, double s) { return copysign(x, s); }
MSRNN_NUMBER MSRNN_FN MSRNN_N minus_abs(MSRNN_N x) { return MSRNN_N(-magnitude(x.v)); }
MSRNN_NUMBER MSRNN_FN MSRNN_N copy_sign(MSRNN_N x, MSRNN_N s) {
  return MSRNN_N(with_sign(x.v, s.v));
}
MSRNN_NUMBER MSRNN_FN MSRNN_N min_with_zero(MSRNN_N x) { return x.v > 0 ? MSRNN_N(0) : x; }
// By the sign: -0 is negative.
MSRNN_FN bool sign_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits < 0;
}
MSRNN_FN bool sign_of(double x) { return copysign(1.0, x) < 0; }
MSRNN_NUMBER MSRNN_FN bool is_negative(MSRNN_N x) { return sign_of(x.v); }
MSRNN_NUMBER MSRNN_FN bool greater(MSRNN_N a, MSRNN_N b) { return a.v > b.v; }
MSRNN_NUMBER MSRNN_FN bool at_least_zero(MSRNN_N x) { return x.v >= 0; }
MSRNN_NUMBER MSRNN_FN bool equal(MSRNN_N a, MSRNN_N b) { return a.v == b.v; }
MSRNN_NUMBER MSRNN_FN bool never(MSRNN_N) { return false; }
MSRNN_NUMBER MSRNN_FN bool is_finite(MSRNN_N x) { return magnitude(x.v) < T(kInfinity); }
MSRNN_NUMBER MSRNN_FN bool is_infinite(MSRNN_N x) { return magnitude(x.v) == T(kInfinity); }
MSRNN_NUMBER MSRNN_FN bool above_half(MSRNN_N x) { return x.v > T(0.5); }
MSRNN_NUMBER MSRNN_FN bool within_half(MSRNN_N x) { return magnitude(x.v) < T(0.5); }
MSRNN_NUMBER MSRNN_FN bool is_gentle(MSRNN_N x) {
  return magnitude(x.v) < T(exact ? 0.6931471805599453 : 0.25);
}
MSRNN_NUMBER MSRNN_FN bool both_minus_infinity(MSRNN_N a, MSRNN_N b) {
  return a.v == -T(kInfinity) && b.v == -T(kInfinity);
}
MSRNN_NUMBER MSRNN_FN bool within_half_and_finite(MSRNN_N x, MSRNN_N h) {
  return within_half(x) && is_finite(h);
}
MSRNN_NUMBER MSRNN_FN MSRNN_N select(bool m, MSRNN_N a, MSRNN_N b) { return m ? a : b; }
MSRNN_NUMBER MSRNN_FN MSRNN_N keep(bool m, MSRNN_N x) { return m ? x : MSRNN_N(0); }
MSRNN_NUMBER MSRNN_FN MSRNN_N drop(bool m, MSRNN_N x) { return m ? MSRNN_N(0) : x; }
MSRNN_NUMBER MSRNN_FN MSRNN_N add_where(bool m, MSRNN_N a, MSRNN_N b) { return m ? a + b : a; }
MSRNN_NUMBER MSRNN_FN MSRNN_N subtract_where(bool m, MSRNN_N a, MSRNN_N b) {
  return keep(m, a - b);
}

// A product of decays is neither 0 nor infinite unless a factor is (see recurrence.h).
MSRNN_FN float tiny(float) { return 1.4012985e-45f; }
MSRNN_FN double tiny(double) { return 4.9406564584124654e-324; }
MSRNN_FN float huge(float) { return 3.4028235e38f; }
MSRNN_FN double huge(double) { return 1.7976931348623157e308; }
MSRNN_FN float larger(float a, float b) { return fmaxf(a, b); }
MSRNN_FN double larger(double a, double b) { return fmax(a, b); }
MSRNN_FN double larger_propagating(double a, double b) { return a > b || a != a ? a : b; }
MSRNN_NUMBER MSRNN_FN MSRNN_N at_least_tiny(MSRNN_N p) { return MSRNN_N(larger(p.v, tiny(p.v))); }
MSRNN_NUMBER MSRNN_FN MSRNN_N zero_if_nan(MSRNN_N x) { return MSRNN_N(larger(x.v, T(0))); }
MSRNN_NUMBER MSRNN_FN MSRNN_N larger_or_nan(MSRNN_N a, MSRNN_N b) {
  return MSRNN_N(larger_propagating(a.v, b.v));
}
MSRNN_NUMBER MSRNN_FN bool is_ordinary(MSRNN_N p) {
  return magnitude(p.v) > 0 && magnitude(p.v) < T(kInfinity);
}
MSRNN_NUMBER MSRNN_FN MSRNN_N clamp_product(MSRNN_N p, MSRNN_N a, MSRNN_N b) {
  const bool vanished = p.v == 0 && a.v != 0 && b.v != 0;
  const bool overflowed = is_infinite(p) && is_finite(a) && is_finite(b);
  const T bound = with_sign(vanished ? tiny(p.v) : huge(p.v), p.v);
  return vanished || overflowed ? MSRNN_N(bound) : p;
}

constexpr float kLog2E = 1.44269502f, kLog2ERest = 1.92596303e-8f;  // their sum is log2(e)
constexpr float kLog2 = 0.693147182f;
constexpr float kExpLowest = -150.0f, kExpHighest = 150.0f;  // beyond: 0 and infinity

// 1/x for x >= 1. The instruction is biased, and a gate repeats its bias at every step. So exact
// numbers take a Newton step. Brief ones use only what cannot accumulate: 1 - small, not large.
template <bool exact>
MSRNN_FN Number<float, exact> reciprocal(Number<float, exact> x) {
  const float r = reciprocal_approximate(x.v);
  if constexpr (!exact) return Number<float, exact>(r);
  return Number<float, exact>(fused(fused(-x.v, r, 1.0f), r, r));
}
MSRNN_FN Double reciprocal(Double x) { return Double(1 / x.v); }
MSRNN_NUMBER MSRNN_FN MSRNN_N complement(MSRNN_N small, MSRNN_N computed) {
  return exact ? computed : MSRNN_N(1) - small;
}

// exp(x); NaN or anything where x > 88.
template <bool exact>
MSRNN_FN Number<float, exact> exponential(Number<float, exact> x) {
  if constexpr (exact) {
    const float bounded = x.v < kExpLowest ? kExpLowest : x.v;
    const float y = bounded * kLog2E;
    const float rest = fused(bounded, kLog2ERest, fused(bounded, kLog2E, -y));
    const float e = exp2_approximate(y);
    return Number<float, exact>(fused(e, rest * kLog2, e));
  } else {
    return Number<float, exact>(exp2_approximate(x.v * kLog2E));
  }
}
MSRNN_FN Double exponential(Double x) { return Double(exp(x.v)); }

template <bool exact>
MSRNN_FN Number<float, exact> exp_any(Number<float, exact> x) {
  if constexpr (!exact) return exponential(x);
  const Number<float, exact> bounded(x.v > kExpHighest ? kExpHighest : x.v);
  const Number<float, exact> e = exponential(bounded);
  return x.v > 88.7228394f ? Number<float, exact>(kInfinity) : e;
}
MSRNN_FN Double exp_any(Double x) { return Double(exp(x.v)); }

// exp(a - b) for a <= 0, a <= b where b is finite. The rounding of the subtraction is corrected.
template <bool exact>
MSRNN_FN Number<float, exact> exp_difference(Number<float, exact> a, Number<float, exact> b) {
  const Number<float, exact> d = a - b;
  const Number<float, exact> e = exponential(d);
  if constexpr (!exact) return e;
  const Number<float, exact> lost = (a - d) - b;
  return fma(e, keep(is_finite(lost), lost), e);
}
MSRNN_FN Double exp_difference(Double a, Double b) { return Double(exp(a.v - b.v)); }

// exp(x) - 1 for a gentle x by its Taylor polynomial, to 2e-8 of relative error, or 5e-8 if brief.
template <bool exact>
MSRNN_FN Number<float, exact> expm1_gentle(Number<float, exact> x) {
  float p = 1.3888889e-3f;
  if constexpr (exact) {
    p = fused(2.7557319e-6f, x.v, 2.4801587e-5f);
    p = fused(p, x.v, 1.9841270e-4f);
    p = fused(p, x.v, 1.3888889e-3f);
  }
  p = fused(p, x.v, 8.3333333e-3f);
  p = fused(p, x.v, 4.1666668e-2f);
  p = fused(p, x.v, 1.6666667e-1f);
  p = fused(p, x.v, 0.5f);
  return Number<float, exact>(fused(p * x.v, x.v, x.v));
}
MSRNN_FN Double expm1_gentle(Double x) { return Double(expm1(x.v)); }

// log(x) for x >= 1.
template <bool exact>
MSRNN_FN Number<float, exact> logarithm(Number<float, exact> x) {
  return Number<float, exact>(log2_approximate(x.v) * kLog2);
}
MSRNN_FN Double logarithm(Double x) { return Double(log(x.v)); }

// log(1 + x) for x in [0, 1], which only carries from tile to tile need.
template <bool exact>
MSRNN_FN Number<float, exact> log1p_unit(Number<float, exact> x) {
  return Number<float, exact>(log1pf(x.v));
}
MSRNN_FN Double log1p_unit(Double x) { return Double(log1p(x.v)); }

#undef MSRNN_NUMBER
#undef MSRNN_N

}  // namespace gpu
}  // namespace msrnn
