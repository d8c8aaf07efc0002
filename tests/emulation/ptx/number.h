// The arithmetic of the PTX ISA, as functions of numbers. Its text decides, case by case.
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "forms.h"

namespace ptx {

// What operations return that have no number to return.
inline const float kNan = std::bit_cast<float>(0x7FFFFFFFu);

template <class T>
constexpr bool is_floating = std::is_floating_point_v<T>;
template <class T>
constexpr bool is_narrow = std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>;
template <class T>
constexpr bool is_signed_integer = std::is_integral_v<T> && std::is_signed_v<T>;

// Numbers of 16 bits.

inline float value_of(float x) { return x; }
inline double value_of(double x) { return x; }
inline float value_of(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline float value_of(Tf32 x) { return std::bit_cast<float>(x.bits & ~0x1FFFu); }
inline float value_of(Half x) {
  const int exponent = x.bits >> 10 & 31;
  const auto fraction = static_cast<float>(x.bits & 1023);
  const float size = exponent == 31  ? (fraction != 0 ? kNan : HUGE_VALF)
                     : exponent != 0 ? std::ldexp(1024 + fraction, exponent - 25)
                                     : std::ldexp(fraction, -24);
  return x.bits >> 15 ? -size : size;
}
inline BFloat16 part(BFloat162 x, int i) { return {static_cast<uint16_t>(x.bits >> 16 * i)}; }
inline Half part(Half2 x, int i) { return {static_cast<uint16_t>(x.bits >> 16 * i)}; }

// To the nearest, and of two that are as near to the even one.
template <class Narrow>
Narrow nearest(float x);
template <>
inline BFloat16 nearest(float x) {
  if (x != x) return {0x7FFF};
  const auto bits = std::bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Half nearest(float x) {
  if (x != x) return {0x7FFF};
  const int sign = std::signbit(x) << 15;
  const float size = std::fabs(x);
  int bits;
  if (size >= 65520) {  // halfway between the largest and what would follow
    bits = 0x7C00;
  } else if (size < 0x1p-14f) {
    bits = static_cast<int>(std::nearbyint(size * 0x1p24f));
  } else {
    const uint32_t all = std::bit_cast<uint32_t>(size) - (112u << 23);  // the exponent of a half
    bits = static_cast<int>((all + 0xFFF + (all >> 13 & 1)) >> 13);
  }
  return {static_cast<uint16_t>(sign | bits)};
}

// .ftz: subnormal numbers become zeros of their sign.
inline float flush(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }
inline double flush(double x) { return std::fabs(x) < DBL_MIN ? std::copysign(0.0, x) : x; }
template <auto f>
inline constexpr auto flushed = [](auto... x) { return flush(f(flush(x)...)); };

// Integers wrap around.

template <class T>
using Unsigned = std::make_unsigned_t<T>;
// The integer of twice the bits, for T of 16 or 32.
template <class T>
using Twice =
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                       std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>>;

inline constexpr auto sum = []<class T>(T a, T b) -> T {
  if constexpr (is_floating<T>)
    return a + b;
  else
    return static_cast<T>(uint64_t(a) + uint64_t(b));
};
inline constexpr auto difference = []<class T>(T a, T b) -> T {
  if constexpr (is_floating<T>)
    return a - b;
  else
    return static_cast<T>(uint64_t(a) - uint64_t(b));
};
inline constexpr auto product = []<class T>(T a, T b) -> T {
  if constexpr (is_floating<T>)
    return a * b;
  else
    return static_cast<T>(uint64_t(a) * uint64_t(b));
};
inline constexpr auto whole_product = []<class T>(T a, T b) {
  return static_cast<Twice<T>>(a) * b;
};
inline constexpr auto high_product = []<class T>(T a, T b) -> T {
  return static_cast<T>(whole_product(a, b) >> 8 * sizeof(T));
};
inline constexpr auto product_and_sum = []<class T>(T a, T b, T c) {
  return sum(product(a, b), c);
};
// Integers by zero: the ISA leaves the quotient open.
inline constexpr auto quotient = []<class T>(T a, T b) -> T {
  if constexpr (std::is_integral_v<T>) {
    if (b == 0) return static_cast<T>(-1);
    if (is_signed_integer<T> && b == static_cast<T>(-1)) return difference(T{0}, a);
  }
  return static_cast<T>(a / b);
};
inline constexpr auto remainder = []<class T>(T a, T b) -> T {
  if (b == 0) return a;
  if (is_signed_integer<T> && b == static_cast<T>(-1)) return 0;
  return static_cast<T>(a % b);
};

// Of two numbers, NaN is neither the larger nor the smaller, and +0 is larger than -0.
template <bool larger>
inline constexpr auto extreme = []<class T>(T a, T b) -> T {
  if constexpr (is_floating<T>) {
    if (a != a && b != b) return static_cast<T>(kNan);
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) != larger ? a : b;
  }
  return (a < b) != larger ? a : b;
};
inline constexpr auto smaller = extreme<false>;
inline constexpr auto larger = extreme<true>;
template <auto of>
inline constexpr auto propagating =
    [](float a, float b) { return a != a || b != b ? kNan : of(a, b); };

inline constexpr auto negative = []<class T>(T x) -> T {
  if constexpr (is_floating<T>)
    return -x;
  else
    return difference(T{0}, x);
};
inline constexpr auto absolute = []<class T>(T x) -> T {
  if constexpr (is_floating<T>)
    return std::fabs(x);
  else
    return x < 0 ? negative(x) : x;
};
inline constexpr auto absolute_narrow = []<class T>(T x) -> T {
  return {static_cast<uint16_t>(x.bits & 0x7FFF)};
};
inline constexpr auto absolute_pair = []<class T>(T x) -> T { return {x.bits & 0x7FFF7FFF}; };
inline constexpr auto sign_of_first = []<class T>(T a, T b) -> T { return std::copysign(b, a); };
inline constexpr auto fused = []<class T>(T a, T b, T c) -> T { return std::fma(a, b, c); };

// Towards zero: the sum that was rounded to the nearest goes back if it went away from zero. What
// it lacks is exact, a double too (Knuth), and has the other sign then.
inline constexpr auto sum_towards_zero = [](float a, float b) -> float {
  const double x = a, y = b, sum = x + y;
  const double rounded_y = sum - x;
  const double rest = (x - (sum - rounded_y)) + (y - rounded_y);
  const auto near = static_cast<float>(sum);
  const double lacking = double{near} == sum ? rest : sum - near;
  return (near > 0 ? lacking < 0 : lacking > 0) ? std::nextafter(near, 0.0f) : near;
};

// Special functions: the exact value, rounded.
inline constexpr auto power_of_two = [](float x) {
  return static_cast<float>(std::exp2(double{x}));
};
inline constexpr auto logarithm = [](float x) { return static_cast<float>(std::log2(double{x})); };
inline constexpr auto reciprocal = []<class T>(T x) -> T { return 1 / x; };
inline constexpr auto square_root = []<class T>(T x) -> T { return std::sqrt(x); };
// Reads and writes the upper 32 bits of a double alone.
inline constexpr auto gross_reciprocal = [](double x) {
  const auto upper = [](double y) {
    return std::bit_cast<double>(std::bit_cast<uint64_t>(y) & ~uint64_t{0xFFFFFFFF});
  };
  return upper(1 / upper(x));
};

// Comparisons. If a number is NaN, those with a u in their name are true, and the others false.
template <class T>
bool ordered(T a, T b) {
  return a == a && b == b;
}
inline constexpr auto equal = [](auto a, auto b) { return a == b; };
inline constexpr auto unequal = [](auto a, auto b) { return ordered(a, b) && a != b; };
inline constexpr auto less = [](auto a, auto b) { return a < b; };
inline constexpr auto at_most = [](auto a, auto b) { return a <= b; };
inline constexpr auto greater = [](auto a, auto b) { return a > b; };
inline constexpr auto at_least = [](auto a, auto b) { return a >= b; };
inline constexpr auto both_numbers = [](auto a, auto b) { return ordered(a, b); };
inline constexpr auto one_is_nan = [](auto a, auto b) { return !ordered(a, b); };
template <auto of>
inline constexpr auto or_nan = [](auto a, auto b) { return !ordered(a, b) || of(a, b); };

// Bits.

inline constexpr auto bits_of_both = []<class T>(T a, T b) -> T { return static_cast<T>(a & b); };
inline constexpr auto bits_of_either = []<class T>(T a, T b) -> T { return static_cast<T>(a | b); };
inline constexpr auto bits_of_one = []<class T>(T a, T b) -> T { return static_cast<T>(a ^ b); };
inline constexpr auto inverted = []<class T>(T x) -> T {
  if constexpr (std::is_same_v<T, bool>)
    return !x;
  else
    return static_cast<T>(~x);
};
// Shifts by more than the width leave zeros, or signs.
template <class T>
T shift_left(T x, uint32_t n) {
  return n >= 8 * sizeof(T) ? T{0} : static_cast<T>(uint64_t(x) << n);
}
template <class T>
T shift_right(T x, uint32_t n) {
  if (n >= 8 * sizeof(T)) n = 8 * sizeof(T) - 1, x = static_cast<T>(x < 0 ? -1 : 0);
  return static_cast<T>(x >> n);
}
// 32 of the 64 bits of high and low.
inline uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t n) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) << n >> 32);
}
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t n) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> n);
}
// Bit i of the table is the result where the bits of a, b, c are the binary digits of i.
inline uint32_t logical_operation(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t r = 0;
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return r;
}
// Four of the eight bytes of b and a. A selector with its highest bit repeats the sign of a byte.
inline constexpr auto permuted = [](uint32_t a, uint32_t b, uint32_t selectors) -> uint32_t {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t selector = selectors >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (selector & 7) & 255;
    if (selector & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << 8 * i;
  }
  return r;
};
// The low bits of a in place of `length` bits of b.
template <class T>
T insert_bits(T a, T b, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  for (uint32_t i = 0; i < length && position + i < 8 * sizeof(T); ++i) {
    const T bit = T{1} << (position + i);
    b = i < 8 * sizeof(T) && (a >> i & 1) ? b | bit : b & ~bit;
  }
  return b;
}
// `length` bits of a. Beyond them: zeros, or the last of them if T has a sign.
template <class T>
T extract_bits(T a, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  constexpr uint32_t last = 8 * sizeof(T) - 1;
  const uint32_t end = std::min(position + length - 1, last);
  const bool sign = is_signed_integer<T> && length != 0 && (a >> end & 1);
  Unsigned<T> r = 0;
  for (uint32_t i = 0; i <= last; ++i) {
    const bool inside = i < length && position + i <= last;
    const bool bit = inside ? Unsigned<T>(a) >> (position + i) & 1 : sign;
    r |= Unsigned<T>(bit) << i;
  }
  return static_cast<T>(r);
}

// Conversions.

// Towards zero, to the nearest that To has. NaN is 0, or, where 64 bits take part, the integer of
// the highest bit alone.
template <class To, class From>
To to_integer(From x) {
  using Limits = std::numeric_limits<To>;
  if (x != x) {
    constexpr bool wide = sizeof(From) == 8 || sizeof(To) == 8;
    return wide ? static_cast<To>(Unsigned<To>{1} << (8 * sizeof(To) - 1)) : To{0};
  }
  const From whole = std::trunc(x);
  if (whole <= static_cast<From>(Limits::min())) return Limits::min();
  if (whole >= static_cast<From>(Limits::max())) return Limits::max();
  return static_cast<To>(whole);
}

}  // namespace ptx
