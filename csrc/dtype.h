// The dtypes that tensors are stored in, for kernels that know no torch, and how they round.
#pragma once

#include <cstdint>

// These come here, ahead of the target of any instruction set, since nothing of theirs may be
// compiled for one.
#if defined(__CUDACC__)
#elif defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define MSRNN_SCALAR inline __attribute__((always_inline))

namespace msrnn {

enum class DType : int32_t { float32, float64, bfloat16, float16 };

// The next multiple; by default, a whole number of the widest vectors.
MSRNN_SCALAR int64_t padded(int64_t count, int64_t to = 16) { return (count + to - 1) / to * to; }

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

MSRNN_SCALAR float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
MSRNN_SCALAR uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
MSRNN_SCALAR float to_float(float x) { return x; }
MSRNN_SCALAR float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
MSRNN_SCALAR BFloat16 to_bfloat16(float x) {  // to nearest, ties to even
  uint32_t u = bits_of(x);
  if (x != x) return {0x7FC0};
  return {static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16)};
}
MSRNN_SCALAR float to_float(Half x) {
  uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7FFFu) << 13;
  if (magnitude >= 0x0F800000u) return float_of(sign | magnitude | 0x70000000u);  // inf, NaN
  // The bias of the exponent differs by 112. A denormal half is made from its integer, which a
  // float holds as a normal number, since the processor may flush denormals.
  if (magnitude < 0x00800000u) {
    float scaled = static_cast<float>(magnitude >> 13) * 5.9604644775390625e-8f;  // 2^-24
    return float_of(sign | bits_of(scaled));
  }
  return float_of(sign | (magnitude + 0x38000000u));
}
MSRNN_SCALAR Half to_half(float x) {  // to nearest, ties to even
  uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};
  if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};
  if (magnitude < 0x38800000u) {  // the result is denormal, and adding 1/2 rounds at 2^-24
    uint32_t rounded = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
    return {static_cast<uint16_t>(sign | rounded)};
  }
  uint32_t rounded = magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

}  // namespace msrnn
