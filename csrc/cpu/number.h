// The numbers that recurrence.h computes with on the CPU, a set for each instruction set.
//
// The twin of this file is cuda/number.h. Functions that exist in both have the same names, and a
// set comes in the same order: arithmetic, comparisons, selection, special functions.
//
// A file in instantiations/ defines MSRNN_ISA (a namespace: baseline, avx2, avx512 or avx512_bf16),
// begins its target and includes this. Every function lives in that namespace and is forced inline,
// so that no wide instruction ends up in code that an older processor runs.
//
// baseline and avx2 share one implementation on the compiler's vector extension, of which SSE2 and
// NEON are the case of 4 lanes. avx512 has its own, for its masks. Where a permutation looks up a
// table in a register, avx2 and avx512, exp takes its powers of 2 from there.
#pragma once

#include "../dtype.h"
#include "../recurrence.h"

namespace msrnn {
namespace MSRNN_ISA {

// exp in float32 is denormal, and so counts as 0, below the first of these. It is 2^-127 at the
// second, and infinite above the third.
constexpr float kExpLowest = -87.33654f;
constexpr float kExpZero = -88.02969f;
constexpr float kExpHighest = 88.72283f;
constexpr float kLog2 = 0.69314718f;
// Adding this float leaves the rounded integer in the low bits of the mantissa.
constexpr float kRoundShift = 12582912.0f;

#if defined(MSRNN_AVX512)

struct Float {
  static constexpr int lanes = 16;
  static constexpr bool compensated = true;
  using Scalar = float;
  using Mask = __mmask16;

  __m512 v;

  Float() = default;
  MSRNN_FN Float(__m512 x) : v(x) {}
  MSRNN_FN explicit Float(float x) : v(_mm512_set1_ps(x)) {}
  static MSRNN_FN Float minus_infinity() { return Float(-__builtin_inff()); }
};

using Mask = Float::Mask;

MSRNN_FN __m512i bits(Float x) { return _mm512_castps_si512(x.v); }
MSRNN_FN Float from_bits(__m512i x) { return _mm512_castsi512_ps(x); }

MSRNN_FN Float operator+(Float a, Float b) { return _mm512_add_ps(a.v, b.v); }
MSRNN_FN Float operator-(Float a, Float b) { return _mm512_sub_ps(a.v, b.v); }
MSRNN_FN Float operator*(Float a, Float b) { return _mm512_mul_ps(a.v, b.v); }
MSRNN_FN Float operator-(Float x) {
  return from_bits(_mm512_xor_si512(bits(x), _mm512_set1_epi32(INT32_MIN)));
}
MSRNN_FN Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
MSRNN_FN Float abs(Float x) { return _mm512_abs_ps(x.v); }
MSRNN_FN Float minus_abs(Float x) {
  return from_bits(_mm512_or_si512(bits(x), _mm512_set1_epi32(INT32_MIN)));
}
MSRNN_FN Float copy_sign(Float magnitude, Float sign) {  // magnitude >= 0
  return from_bits(
      _mm512_ternarylogic_epi32(bits(magnitude), bits(sign), _mm512_set1_epi32(INT32_MIN), 0xF8));
}
// The second operand is returned when one is NaN: NaN for NaN.
MSRNN_FN Float min_with_zero(Float x) { return _mm512_min_ps(_mm512_setzero_ps(), x.v); }
MSRNN_FN Float at_least(float bound, Float x) { return _mm512_max_ps(_mm512_set1_ps(bound), x.v); }

MSRNN_FN Mask is_negative(Float x) { return _mm512_movepi32_mask(bits(x)); }
MSRNN_FN Mask greater(Float a, Float b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
MSRNN_FN Mask at_least_zero(Float x) {
  return _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_GE_OQ);
}
MSRNN_FN Mask equal(Float a, Float b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
MSRNN_FN Mask never(Float) { return 0; }
MSRNN_FN Mask both(Mask a, Mask b) { return static_cast<Mask>(a & b); }
MSRNN_FN bool all(Mask m) { return m == 0xFFFF; }

MSRNN_FN Float select(Mask m, Float a, Float b) { return _mm512_mask_blend_ps(m, b.v, a.v); }
MSRNN_FN Float keep(Mask m, Float x) { return _mm512_maskz_mov_ps(m, x.v); }
MSRNN_FN Float drop(Mask m, Float x) { return _mm512_maskz_mov_ps(static_cast<Mask>(~m), x.v); }
MSRNN_FN Float add_where(Mask m, Float a, Float b) { return _mm512_mask_add_ps(a.v, m, a.v, b.v); }
MSRNN_FN Float subtract_where(Mask m, Float a, Float b) { return _mm512_maskz_sub_ps(m, a.v, b.v); }

MSRNN_FN Float reciprocal_estimate(Float x) { return _mm512_rcp14_ps(x.v); }  // 14 bits
MSRNN_FN Float one_minus_product(Float a, Float b) {
  return _mm512_fnmadd_ps(a.v, b.v, _mm512_set1_ps(1.0f));
}

// 2^(j/16) with j << 19 taken off its bits: adding n << 19 then multiplies by 2^floor(n/16).
alignas(64) constexpr uint32_t kPowers[16] = {
    0x3F800000, 0x3F7DAAC3, 0x3F7B95C2, 0x3F79C3D3, 0x3F7837F0, 0x3F76F532, 0x3F75FED7, 0x3F75583F,
    0x3F7504F3, 0x3F7508A4, 0x3F75672A, 0x3F76248C, 0x3F7744FD, 0x3F78CCDF, 0x3F7AC0C7, 0x3F7D257D,
};

constexpr float kPerOctave = 16;  // of the powers
// 2^(n/16) for the integer n in the low bits of x.
MSRNN_FN Float power(Float x) {
  __m512i power = _mm512_castps_si512(_mm512_permutexvar_ps(bits(x), _mm512_load_ps(kPowers)));
  return from_bits(_mm512_add_epi32(power, _mm512_slli_epi32(bits(x), 19)));
}

// (exp(r) - 1) / r for |r| <= log(2)/32: exp is off by 1e-9.
template <class V>
MSRNN_FN V expm1_over(V r) {
  return fma(fma(r, V(1.0f / 6), V(0.5f)), r, V(1.0f));
}

MSRNN_FN Float load_partial(const float* p, int n) {
  return _mm512_maskz_loadu_ps(static_cast<Mask>((1u << n) - 1), p);
}
MSRNN_FN void store_partial(float* p, Float x, int n) {
  _mm512_mask_storeu_ps(p, static_cast<Mask>((1u << n) - 1), x.v);
}
MSRNN_FN Float load_full(const float* p) { return _mm512_loadu_ps(p); }
MSRNN_FN Float widen(const float* p) { return load_full(p); }
MSRNN_FN void store_full(float* p, Float x) { _mm512_storeu_ps(p, x.v); }
MSRNN_FN void stream(float* p, Float x) { _mm512_stream_ps(p, x.v); }

MSRNN_FN Float widen(const BFloat16* p) {
  __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return from_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
MSRNN_FN __m256i narrow_bfloat16(Float x) {
  __m512i u = bits(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  Mask nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
MSRNN_FN void store_full(BFloat16* p, Float x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bfloat16(x));
}
MSRNN_FN void stream(BFloat16* p, Float x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bfloat16(x));
}
MSRNN_FN Float widen(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MSRNN_FN __m256i narrow_half(Float x) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MSRNN_FN void store_full(Half* p, Float x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_half(x));
}
MSRNN_FN void stream(Half* p, Float x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_half(x));
}

// One Newton step: the result is off by at most 1 unit in the last place for x in [1, 4].
MSRNN_FN Float reciprocal(Float x) {
  Float r = reciprocal_estimate(x);
  return fma(r, one_minus_product(x, r), r);
}

#else  // the compiler's vector extension

#if defined(MSRNN_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float FloatLanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UintLanes __attribute__((vector_size(4 * kLanes)));

struct Float {
  static constexpr int lanes = kLanes;
  static constexpr bool compensated = true;
  using Scalar = float;
  using Mask = IntLanes;

  FloatLanes v;

  Float() = default;
  MSRNN_FN Float(FloatLanes x) : v(x) {}
  MSRNN_FN explicit Float(float x) : v(x - FloatLanes{}) {}
  static MSRNN_FN Float minus_infinity() { return Float(-__builtin_inff()); }
};

using Mask = Float::Mask;

MSRNN_FN IntLanes bits(Float x) { return (IntLanes)x.v; }
MSRNN_FN Float from_bits(IntLanes x) { return Float((FloatLanes)x); }

MSRNN_FN Float operator+(Float a, Float b) { return Float(a.v + b.v); }
MSRNN_FN Float operator-(Float a, Float b) { return Float(a.v - b.v); }
MSRNN_FN Float operator*(Float a, Float b) { return Float(a.v * b.v); }
MSRNN_FN Float operator-(Float x) { return Float(-x.v); }
MSRNN_FN Float fma(Float a, Float b, Float c) {
#if defined(MSRNN_AVX2)
  return Float((FloatLanes)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v));
#elif defined(__aarch64__)
  return Float((FloatLanes)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v));
#else
  return Float(a.v * b.v + c.v);
#endif
}
MSRNN_FN Float abs(Float x) { return from_bits(bits(x) & INT32_MAX); }
MSRNN_FN Float minus_abs(Float x) { return from_bits(bits(x) | INT32_MIN); }
MSRNN_FN Float copy_sign(Float magnitude, Float sign) {  // magnitude >= 0
  return from_bits(bits(magnitude) | (bits(sign) & INT32_MIN));
}

MSRNN_FN Mask is_negative(Float x) { return bits(x) < 0; }
MSRNN_FN Mask greater(Float a, Float b) { return a.v > b.v; }
MSRNN_FN Mask at_least_zero(Float x) { return x.v >= 0.0f; }
MSRNN_FN Mask equal(Float a, Float b) { return a.v == b.v; }
MSRNN_FN Mask never(Float) { return Mask{}; }
MSRNN_FN Mask both(Mask a, Mask b) { return a & b; }
MSRNN_FN bool all(Mask m) {
#if defined(__aarch64__)
  return vminvq_u32((uint32x4_t)m) != 0;
#else
  bool yes = true;
  for (int i = 0; i < kLanes; ++i) yes &= m[i] != 0;
  return yes;
#endif
}

MSRNN_FN Float select(Mask m, Float a, Float b) { return Float(m ? a.v : b.v); }
MSRNN_FN Float keep(Mask m, Float x) { return from_bits(bits(x) & m); }
MSRNN_FN Float drop(Mask m, Float x) { return from_bits(bits(x) & ~m); }
MSRNN_FN Float add_where(Mask m, Float a, Float b) { return a + keep(m, b); }
MSRNN_FN Float subtract_where(Mask m, Float a, Float b) { return keep(m, a - b); }
MSRNN_FN Float min_with_zero(Float x) { return select(x.v > 0.0f, Float(0.0f), x); }

MSRNN_FN Float reciprocal(Float x) { return Float(1.0f / x.v); }

#if defined(MSRNN_AVX2)
// The second operand is returned when one is NaN: NaN for NaN.
MSRNN_FN Float at_least(float bound, Float x) {
  return Float((FloatLanes)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)x.v));
}

// 2^(j/8) with j << 20 taken off its bits: adding n << 20 then multiplies by 2^floor(n/8).
alignas(32) constexpr uint32_t kPowers[8] = {
    0x3F800000, 0x3F7B95C2, 0x3F7837F0, 0x3F75FED7, 0x3F7504F3, 0x3F75672A, 0x3F7744FD, 0x3F7AC0C7,
};

constexpr float kPerOctave = 8;  // of the powers
// 2^(n/8) for the integer n in the low bits of x.
MSRNN_FN Float power(Float x) {
  __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kPowers));
  __m256i found = _mm256_permutevar8x32_epi32(table, (__m256i)bits(x));
  return from_bits((IntLanes)_mm256_add_epi32(found, _mm256_slli_epi32((__m256i)bits(x), 20)));
}
// (exp(r) - 1) / r for |r| <= log(2)/16, fitted so that exp is off by at most 3e-8.
template <class V>
MSRNN_FN V expm1_over(V r) {
  return fma(fma(r, V(0.16666859f), V(0.50006473f)), r, V(1.0f));
}
#else
// exp(x) = 2^n exp(r), |r| <= log(2)/2: a polynomial of degree 6; log(2) in two parts, the first
// exact times any n in range, since the baseline has no fused multiply-add.
MSRNN_FN Float exponential(Float x) {
  Mask underflow = x.v < kExpLowest;  // false for NaN, which then passes
  Float shifted = fma(x, Float(1.0f / kLog2), Float(kRoundShift));
  Float n = shifted - Float(kRoundShift);
  Float r = fma(n, Float(2.12194440e-4f), fma(n, Float(-0.693359375f), x));
  Float p = Float(1.3888889e-3f);
  p = fma(p, r, Float(8.3333333e-3f));
  p = fma(p, r, Float(4.1666668e-2f));
  p = fma(p, r, Float(1.6666667e-1f));
  p = fma(p, r, Float(0.5f));
  p = fma(p * r, r, r) + Float(1.0f);
  IntLanes exponent = (IntLanes)((UintLanes)bits(shifted) << 23);
  Float result = from_bits((IntLanes)((UintLanes)bits(p) + (UintLanes)exponent));
  return select(x.v == x.v, drop(underflow, result), x);  // the sum of bits may not keep a NaN
}

using Pair = Float;
#endif

MSRNN_FN Float load_full(const float* p) {
  Float x;
  __builtin_memcpy(&x.v, p, sizeof x.v);
  return x;
}
MSRNN_FN Float widen(const float* p) { return load_full(p); }
MSRNN_FN void store_full(float* p, Float x) { __builtin_memcpy(p, &x.v, sizeof x.v); }
MSRNN_FN Float load_partial(const float* p, int n) {
  Float x(0.0f);
  for (int i = 0; i < n; ++i) x.v[i] = p[i];
  return x;
}
MSRNN_FN void store_partial(float* p, Float x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x.v[i];
}
MSRNN_FN void stream(float* p, Float x) {
#if defined(MSRNN_AVX2)
  _mm256_stream_ps(p, (__m256)x.v);
#elif defined(__x86_64__)
  _mm_stream_ps(p, (__m128)x.v);
#else
  store_full(p, x);
#endif
}

MSRNN_FN Float widen(const BFloat16* p) {
  Float x;
#if defined(MSRNN_AVX2)
  __m128i u = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  x.v = (FloatLanes)_mm256_slli_epi32(_mm256_cvtepu16_epi32(u), 16);
#elif defined(__aarch64__)
  x.v = (FloatLanes)vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16);
#else
  for (int i = 0; i < kLanes; ++i) x.v[i] = to_float(p[i]);
#endif
  return x;
}
MSRNN_FN Float widen(const Half* p) {
  Float x;
#if defined(MSRNN_AVX2)
  x.v = (FloatLanes)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  const uint16x4_t u = vld1_u16(reinterpret_cast<const uint16_t*>(p));
  x.v = (FloatLanes)vcvt_f32_f16(vreinterpret_f16_u16(u));
#else
  for (int i = 0; i < kLanes; ++i) x.v[i] = to_float(p[i]);
#endif
  return x;
}
// The bits of bfloat16 in 32 each: to nearest, ties to even.
MSRNN_FN UintLanes rounded_bfloat16(Float x) {
  const UintLanes u = (UintLanes)x.v;
  const UintLanes rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return x.v == x.v ? rounded : UintLanes{} + 0x7FC0u;
}
#if defined(MSRNN_AVX2)
MSRNN_FN __m256i narrow_bfloat16(Float a, Float b) {
  // Packs each half of the vectors by itself.
  __m256i packed = _mm256_packus_epi32((__m256i)rounded_bfloat16(a), (__m256i)rounded_bfloat16(b));
  return _mm256_permute4x64_epi64(packed, 0xD8);
}
MSRNN_FN __m128i narrow_half(Float x) {
  return _mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#endif
MSRNN_FN void store_full(BFloat16* p, Float x) {
#if defined(MSRNN_AVX2)
  __m128i packed = _mm256_castsi256_si128(narrow_bfloat16(x, x));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
#elif defined(__aarch64__)
  vst1_u16(reinterpret_cast<uint16_t*>(p), vmovn_u32((uint32x4_t)rounded_bfloat16(x)));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = to_bfloat16(x.v[i]);
#endif
}
MSRNN_FN void store_full(Half* p, Float x) {
#if defined(MSRNN_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_half(x));
#elif defined(__aarch64__)
  const float16x4_t narrow = vcvt_f16_f32((float32x4_t)x.v);
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(narrow));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = to_half(x.v[i]);
#endif
}
template <class Narrow>
MSRNN_FN void stream(Narrow* p, Float x) {
  store_full(p, x);
}

#endif

#if defined(MSRNN_AVX512) || defined(MSRNN_AVX2)

// Two vectors, with every operation on both. The scheduler's window has twice the independent work,
// and both share a prefetch and a turn of the loop. We measured 29 cycles for 16 minGRU steps of
// AVX-512, against 31 to 38.
struct Pair {
  static constexpr int lanes = 2 * Float::lanes;
  static constexpr bool compensated = true;
  using Scalar = float;
  struct Mask {
    Float::Mask a, b;
  };

  Float a, b;

  Pair() = default;
  MSRNN_FN Pair(Float x, Float y) : a(x), b(y) {}
  MSRNN_FN explicit Pair(float x) : a(x), b(x) {}
  static MSRNN_FN Pair minus_infinity() { return Pair(-__builtin_inff()); }
};

MSRNN_FN Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
MSRNN_FN Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
MSRNN_FN Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
MSRNN_FN Pair operator-(Pair x) { return {-x.a, -x.b}; }
MSRNN_FN Pair fma(Pair x, Pair y, Pair z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
MSRNN_FN Pair abs(Pair x) { return {abs(x.a), abs(x.b)}; }
MSRNN_FN Pair minus_abs(Pair x) { return {minus_abs(x.a), minus_abs(x.b)}; }
MSRNN_FN Pair copy_sign(Pair x, Pair s) { return {copy_sign(x.a, s.a), copy_sign(x.b, s.b)}; }
MSRNN_FN Pair min_with_zero(Pair x) { return {min_with_zero(x.a), min_with_zero(x.b)}; }
MSRNN_FN Pair at_least(float bound, Pair x) { return {at_least(bound, x.a), at_least(bound, x.b)}; }
MSRNN_FN Pair::Mask is_negative(Pair x) { return {is_negative(x.a), is_negative(x.b)}; }
MSRNN_FN Pair::Mask greater(Pair x, Pair y) { return {greater(x.a, y.a), greater(x.b, y.b)}; }
MSRNN_FN Pair::Mask at_least_zero(Pair x) { return {at_least_zero(x.a), at_least_zero(x.b)}; }
MSRNN_FN Pair::Mask equal(Pair x, Pair y) { return {equal(x.a, y.a), equal(x.b, y.b)}; }
MSRNN_FN Pair::Mask never(Pair x) { return {never(x.a), never(x.b)}; }
MSRNN_FN Pair::Mask both(Pair::Mask m, Pair::Mask n) { return {both(m.a, n.a), both(m.b, n.b)}; }
MSRNN_FN bool all(Pair::Mask m) { return all(m.a) && all(m.b); }
MSRNN_FN Pair select(Pair::Mask m, Pair x, Pair y) {
  return {select(m.a, x.a, y.a), select(m.b, x.b, y.b)};
}
MSRNN_FN Pair keep(Pair::Mask m, Pair x) { return {keep(m.a, x.a), keep(m.b, x.b)}; }
MSRNN_FN Pair drop(Pair::Mask m, Pair x) { return {drop(m.a, x.a), drop(m.b, x.b)}; }
MSRNN_FN Pair add_where(Pair::Mask m, Pair x, Pair y) {
  return {add_where(m.a, x.a, y.a), add_where(m.b, x.b, y.b)};
}
MSRNN_FN Pair subtract_where(Pair::Mask m, Pair x, Pair y) {
  return {subtract_where(m.a, x.a, y.a), subtract_where(m.b, x.b, y.b)};
}
MSRNN_FN Pair reciprocal(Pair x) { return {reciprocal(x.a), reciprocal(x.b)}; }
MSRNN_FN Pair power(Pair x) { return {power(x.a), power(x.b)}; }

template <class T>
MSRNN_FN Pair widen_pair(const T* p) {
  return {widen(p), widen(p + Float::lanes)};
}
template <class T>
MSRNN_FN void store_full(T* p, Pair x) {
  store_full(p, x.a);
  store_full(p + Float::lanes, x.b);
}
template <class T>
MSRNN_FN void stream(T* p, Pair x) {
  stream(p, x.a);
  stream(p + Float::lanes, x.b);
}
#if defined(MSRNN_AVX2)  // a pair of 16 bits is one store
MSRNN_FN __m256i narrow(const BFloat16*, Pair x) { return narrow_bfloat16(x.a, x.b); }
MSRNN_FN __m256i narrow(const Half*, Pair x) {
  return _mm256_set_m128i(narrow_half(x.b), narrow_half(x.a));
}
template <class T>
  requires(sizeof(T) == 2)
MSRNN_FN void store_full(T* p, Pair x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p, x));
}
template <class T>
  requires(sizeof(T) == 2)
MSRNN_FN void stream(T* p, Pair x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(p, x));
}
#endif

// exp(x) = 2^(n/k) exp(r): a table of k powers in one register and then a cubic. At the lower clamp
// the power is 2^-127, a denormal, which counts as 0 wherever kernels run. (With AVX-512 a table of
// 32, a quadratic and a mask for the underflow take 20 % more time.)
template <class V>
MSRNN_FN V exponential(V x) {
  x = at_least(kExpZero, x);
  V shifted = fma(x, V(kPerOctave / kLog2), V(kRoundShift));
  V n = shifted - V(kRoundShift);
  V r = fma(n, V(-kLog2 / kPerOctave), x);
  V t = power(shifted);
  return fma(t, expm1_over(r) * r, t);
}

#endif

// The rest is built from the above, for any of these vectors.

template <class V>
MSRNN_FN typename V::Mask is_finite(V x) {
  return equal(x - x, V(0.0f));
}
template <class V>
MSRNN_FN bool all_finite(V x) {
  return all(is_finite(x));
}
template <class V>
MSRNN_FN typename V::Mask above_half(V x) {
  return greater(x, V(0.5f));
}
template <class V>
MSRNN_FN typename V::Mask is_gentle(V x) {
  return greater(V(kLog2), abs(x));
}
template <class V>
MSRNN_FN typename V::Mask both_minus_infinity(V a, V b) {
  return both(equal(a, V::minus_infinity()), equal(b, V::minus_infinity()));
}

template <class V>
MSRNN_FN V complement(V, V computed) {
  return computed;
}

template <class V>
MSRNN_FN V exp_any(V x) {
  return select(greater(x, V(kExpHighest)), V(__builtin_inff()), exponential(x));
}

// exp(a - b) for a <= 0, a <= b where b is finite. The subtraction's own rounding is corrected to
// first order: at a - b = -12 it alone would cost 5e-7.
template <class V>
MSRNN_FN V exp_difference(V a, V b) {
  V d = a - b;
  V e = exponential(d);
  V lost = (a - d) - b;
  return fma(e, keep(is_finite(lost), lost), e);
}

// exp(x) - 1 for a gentle x, |x| < log 2, by its Taylor polynomial: relative error 2e-8.
template <class V>
MSRNN_FN V expm1_gentle(V x) {
  V p = V(2.7557319e-6f);
  p = fma(p, x, V(2.4801587e-5f));
  p = fma(p, x, V(1.9841270e-4f));
  p = fma(p, x, V(1.3888889e-3f));
  p = fma(p, x, V(8.3333333e-3f));
  p = fma(p, x, V(4.1666668e-2f));
  p = fma(p, x, V(1.6666667e-1f));
  p = fma(p, x, V(0.5f));
  return fma(p * x, x, x);
}

// log(1 + x) for x in [0, 1], as 2 atanh(x / (2 + x)): relative error 2e-8.
template <class V>
MSRNN_FN V log1p_unit(V x) {
  V t = x * reciprocal(V(2.0f) + x);
  V s = t * t;
  V p = V(1.0f / 13);
  p = fma(p, s, V(1.0f / 11));
  p = fma(p, s, V(1.0f / 9));
  p = fma(p, s, V(1.0f / 7));
  p = fma(p, s, V(1.0f / 5));
  p = fma(p, s, V(1.0f / 3));
  V two_t = t + t;
  return fma(p * s, two_t, two_t);
}

// float64 has one lane and the functions of the C library. It serves gradient checks and
// references, not speed.
struct Double {
  static constexpr int lanes = 1;
  static constexpr bool compensated = false;
  using Scalar = double;
  using Mask = bool;

  double v;

  Double() = default;
  MSRNN_FN explicit Double(double x) : v(x) {}
  static MSRNN_FN Double minus_infinity() { return Double(-__builtin_inf()); }
};

MSRNN_FN Double operator+(Double a, Double b) { return Double(a.v + b.v); }
MSRNN_FN Double operator-(Double a, Double b) { return Double(a.v - b.v); }
MSRNN_FN Double operator*(Double a, Double b) { return Double(a.v * b.v); }
MSRNN_FN Double operator-(Double x) { return Double(-x.v); }
MSRNN_FN Double fma(Double a, Double b, Double c) { return Double(a.v * b.v + c.v); }
MSRNN_FN Double abs(Double x) { return Double(__builtin_fabs(x.v)); }
MSRNN_FN Double minus_abs(Double x) { return Double(-__builtin_fabs(x.v)); }
MSRNN_FN Double copy_sign(Double m, Double s) { return Double(__builtin_copysign(m.v, s.v)); }
MSRNN_FN Double min_with_zero(Double x) { return x.v > 0 ? Double(0) : x; }
MSRNN_FN bool is_negative(Double x) { return __builtin_signbit(x.v) != 0; }
MSRNN_FN bool greater(Double a, Double b) { return a.v > b.v; }
MSRNN_FN bool at_least_zero(Double x) { return x.v >= 0; }
MSRNN_FN bool equal(Double a, Double b) { return a.v == b.v; }
MSRNN_FN bool never(Double) { return false; }
MSRNN_FN bool is_finite(Double x) { return x.v - x.v == 0; }
MSRNN_FN bool all_finite(Double x) { return is_finite(x); }
MSRNN_FN bool above_half(Double x) { return x.v > 0.5; }
MSRNN_FN bool is_gentle(Double x) { return __builtin_fabs(x.v) < 0.6931471805599453; }
MSRNN_FN bool both_minus_infinity(Double a, Double b) {
  return a.v == -__builtin_inf() && b.v == -__builtin_inf();
}
MSRNN_FN Double select(bool m, Double a, Double b) { return m ? a : b; }
MSRNN_FN Double keep(bool m, Double x) { return m ? x : Double(0); }
MSRNN_FN Double drop(bool m, Double x) { return m ? Double(0) : x; }
MSRNN_FN Double add_where(bool m, Double a, Double b) { return m ? a + b : a; }
MSRNN_FN Double subtract_where(bool m, Double a, Double b) { return keep(m, a - b); }
MSRNN_FN Double reciprocal(Double x) { return Double(1 / x.v); }
MSRNN_FN Double exponential(Double x) { return Double(__builtin_exp(x.v)); }
MSRNN_FN Double exp_any(Double x) { return Double(__builtin_exp(x.v)); }
MSRNN_FN Double exp_difference(Double a, Double b) { return Double(__builtin_exp(a.v - b.v)); }
MSRNN_FN Double expm1_gentle(Double x) { return Double(__builtin_expm1(x.v)); }
MSRNN_FN Double log1p_unit(Double x) { return Double(__builtin_log1p(x.v)); }

}  // namespace MSRNN_ISA
}  // namespace msrnn
