// How numbers lie in memory, how 16 bytes of them become numbers that a kernel computes with, and
// which row of a state is whose.
#pragma once

#include <cstring>

#include "../rows.h"
#include "number.h"

namespace msrnn {
namespace gpu {

// A dtype in memory: 16 bytes of it at a time.
struct alignas(16) Chunk {
  uint32_t word[4];
};

template <class T>
struct Stored {  // float and double
  static constexpr int count = 16 / sizeof(T);
  using V = Number<T, true>;

  static MSRNN_FN void unpack(const Chunk& chunk, V (&x)[count]) {
    memcpy(static_cast<void*>(x), &chunk, 16);
  }
  static MSRNN_FN Chunk pack(const V (&x)[count]) {
    Chunk chunk;
    memcpy(&chunk, static_cast<const void*>(x), 16);
    return chunk;
  }
};

// What lies at an offset of shared memory, in bytes.
template <class X>
MSRNN_FN X* in_shared(int offset) {
  return reinterpret_cast<X*>(dynamic_shared() + offset);
}

// The row of the state that a row of the batch uses, or -1, as RowIndex::of finds it: the lanes of
// a warp look at the earlier rows together.
MSRNN_FN int64_t find_row(const RowIndex& rows, int64_t batch_row) {
  const int64_t row = rows.named(batch_row);
  if (!rows.data || row < 0) return row;
  bool taken = false;
#pragma unroll 4
  for (int64_t i = threadIdx.x % 32; i < batch_row; i += 32) taken |= rows.named(i) == row;
  return __ballot_sync(~0u, taken) ? -1 : row;
}

// 16 bytes from an aligned address, in registers. A reference to them would be copied by bytes.
MSRNN_FN Chunk chunk_at(const void* p) { return *static_cast<const Chunk*>(p); }
// 16 bytes that no cache of this multiprocessor answers.
MSRNN_FN Chunk load_coherent_chunk(const void* p) {
  const auto* const halves = static_cast<const unsigned long long*>(p);
#if defined(__CUDACC__)
  const ulonglong2 x = __ldcg(reinterpret_cast<const ulonglong2*>(halves));
#else
  const unsigned long long x[2] = {load_coherent(halves), load_coherent(halves + 1)};
#endif
  Chunk chunk;
  memcpy(&chunk, &x, sizeof chunk);
  return chunk;
}
// The low halves of two words as a pair, and their high halves.
MSRNN_FN uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xFFFF) | b << 16; }
MSRNN_FN uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xFFFF0000u); }

#if defined(__CUDACC__)
MSRNN_FN float low_half(BFloat16, uint32_t w) { return __uint_as_float(w << 16); }
MSRNN_FN float high_half(BFloat16, uint32_t w) { return __uint_as_float(w & 0xFFFF0000u); }
MSRNN_FN uint32_t two_halves(BFloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
MSRNN_FN float low_half(Half, uint32_t w) {
  return __low2float(reinterpret_cast<const __half2&>(w));
}
MSRNN_FN float high_half(Half, uint32_t w) {
  return __high2float(reinterpret_cast<const __half2&>(w));
}
MSRNN_FN uint32_t two_halves(Half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
#else
template <class Narrow>
float low_half(Narrow, uint32_t w) {
  return to_float(Narrow{static_cast<uint16_t>(w)});
}
template <class Narrow>
float high_half(Narrow, uint32_t w) {
  return to_float(Narrow{static_cast<uint16_t>(w >> 16)});
}
inline uint32_t two_halves(BFloat16, float low, float high) {
  return to_bfloat16(low).bits | static_cast<uint32_t>(to_bfloat16(high).bits) << 16;
}
inline uint32_t two_halves(Half, float low, float high) {
  return to_half(low).bits | static_cast<uint32_t>(to_half(high).bits) << 16;
}
#endif

template <class Narrow>
struct StoredNarrow {
  static constexpr int count = 8;
  using V = Brief;

  static MSRNN_FN void unpack(const Chunk& chunk, V (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = V(low_half(Narrow{}, chunk.word[i]));
      x[2 * i + 1] = V(high_half(Narrow{}, chunk.word[i]));
    }
  }
  static MSRNN_FN Chunk pack(const V (&x)[8]) {
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) chunk.word[i] = two_halves(Narrow{}, x[2 * i].v, x[2 * i + 1].v);
    return chunk;
  }
};
template <>
struct Stored<BFloat16> : StoredNarrow<BFloat16> {};
template <>
struct Stored<Half> : StoredNarrow<Half> {};

}  // namespace gpu
}  // namespace msrnn
