// Runs the source of CUDA kernels on the CPU: what that source sees.
//
// A kernel is compiled by an ordinary C++20 compiler against this header instead of by nvcc against
// the CUDA toolkit, and linked with runtime.cpp. No GPU and no toolkit is needed.
//
// The model. Each CUDA thread is a fiber: a stack of its own on the one host thread that launches.
// A few blocks are resident at once; a block that ends makes room for the next. A fiber runs until
// it waits (barrier, shuffle, vote) or reaches a scheduling point (atomic, ordered load or store,
// pause of a poll). There a seeded random choice decides who runs next, so that a run can be
// repeated, and many seeds try many schedules.
//
// What is noticed:
//   by the runtime        dead-lock, divergent barriers, contradictory masks, early exits
//   by wrong results      reads of what was never written: shared memory, asynchronous copies not
//                         waited for and lanes that take no part all read as 0xFF bytes (NaN)
//   by AddressSanitizer   accesses out of bounds of shared or global memory
//   by ThreadSanitizer    data races: every CUDA thread is a thread to it, and only barriers, the
//                         operations of a warp, and release with acquire order memory
//
// What is not modelled: static __shared__ variables, fences, scopes narrower than the device,
// streams (a launch returns when its grid has ended), and hardware that reorders what the source
// leaves unordered: for that, there is ThreadSanitizer. Stricter than CUDA: all threads of a block
// must take part in every __syncthreads, and by the same source line.
//
// Settings, read from the environment at every launch:
//   EMULATION_SEED          seed of the schedule, default 1
//   EMULATION_SHUFFLE       0: blocks and threads in order; 1 (default): random threads;
//                           2: blocks become resident in random order, too;
//                           3: and warps starve while those before them do not wait
//   EMULATION_RESIDENT      blocks resident at once, default 4
//   EMULATION_CLAIMED       blocks that a kernel is told can be resident, default as many as are
//   EMULATION_SPINS         polls without progress that count as dead-lock, default 20 million
//   EMULATION_POISON        the byte that fills what nobody has written, default 255: NaN
//   EMULATION_STRICT_WARPS  1: shuffles and votes order no memory, as CUDA documents it, only
//                           __syncwarp does; default 0. Matters to ThreadSanitizer only.
#pragma once

#include <bit>
#include <cfloat>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

using emulated::dim3;
using emulated::uint3;
inline constexpr int warpSize = 32;

#define threadIdx (::emulated::runtime::running->thread)
#define blockIdx (::emulated::runtime::running->block)
#define blockDim (::emulated::runtime::running->block_dim)
#define gridDim (::emulated::runtime::running->grid_dim)

// What CUDA and the project's own shim have in the global namespace.
namespace emulated::cuda {

// The block's dynamic shared memory, aligned to 128 bytes.
inline void* msrnn_dynamic_shared() { return runtime::running->dynamic_shared; }

inline void __syncthreads(Where where = Where::current()) { runtime::sync_block(where); }

inline void __syncwarp(unsigned mask = ~0u, Where where = Where::current()) {
  runtime::sync_warp(mask, where);
}

// Shuffles. A lane whose source lies outside its segment of `width` lanes keeps its own value.

template <class T>
T shuffle_value(unsigned mask, T value, int source_lane, Where where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = runtime::shuffle(mask, bits, source_lane, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int first_of_segment(int width) { return runtime::running->lane & ~(width - 1); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source_lane, int width = warpSize,
              Where where = Where::current()) {
  const int source = first_of_segment(width) + (source_lane & (width - 1));
  return shuffle_value(mask, value, source, where);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 Where where = Where::current()) {
  const int lane = runtime::running->lane;
  const int source = lane - static_cast<int>(delta);
  const bool inside = source >= first_of_segment(width);
  return shuffle_value(mask, value, inside ? source : lane, where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   Where where = Where::current()) {
  const int lane = runtime::running->lane;
  const int source = lane + static_cast<int>(delta);
  const bool inside = source < first_of_segment(width) + width;
  return shuffle_value(mask, value, inside ? source : lane, where);
}

// Earlier segments may be read, too: so CUDA defines it.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  Where where = Where::current()) {
  const int lane = runtime::running->lane;
  const int source = lane ^ lane_mask;
  const bool readable = source < first_of_segment(width) + width;
  return shuffle_value(mask, value, readable ? source : lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, Where where = Where::current()) {
  return runtime::ballot(mask, predicate != 0, where);
}

inline int __any_sync(unsigned mask, int predicate, Where where = Where::current()) {
  return runtime::ballot(mask, predicate != 0, where) != 0;
}

inline int __all_sync(unsigned mask, int predicate, Where where = Where::current()) {
  return runtime::ballot(mask, predicate == 0, where) == 0;
}

// Tensor cores: sum += left * right, 16 x 16 times 16 x 8 numbers of 16 bits, in the layout that
// PTX documents. Products are exact; their sum is rounded towards zero, once, which is about the
// worst that hardware does.
template <class Value>
void mma_m16n8k16(float (&sum)[4], const uint32_t (&left)[4], const uint32_t (&right)[2],
                  Value value, Where where = Where::current()) {
  runtime::Factors mine;
  std::memcpy(mine.left, left, sizeof mine.left);
  std::memcpy(mine.right, right, sizeof mine.right);
  const runtime::Factors* const lanes = runtime::bring(mine, where);
  const auto half = [&](uint32_t word, int i) {
    return value(static_cast<uint16_t>(word >> 16 * i));
  };
  const int lane = runtime::running->lane;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double total = sum[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t a = lanes[row % 8 * 4 + k % 8 / 2].left[row / 8 + k / 8 * 2];
      const uint32_t b = lanes[column * 4 + k % 8 / 2].right[k / 8];
      total += half(a, k % 2) * half(b, k % 2);
    }
    sum[i] = static_cast<float>(total);
    if (std::fabs(sum[i]) > std::fabs(total)) sum[i] = std::nextafter(sum[i], 0.0f);
  }
}

// Bits and fast math.

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

// ex2.approx.ftz: no subnormal results.
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0.0f : y;
}

inline float log2_approx(float x) { return std::log2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }

// Asynchronous copies (cp.async). The copy happens as late as CUDA allows, in the wait that covers
// its group, and until then its destination is poison.

using CopyWord = uint64_t __attribute__((may_alias));

inline bool aligned_to_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline void copy_async_16(void* shared, const void* global, Where where = Where::current()) {
  if (!aligned_to_16(shared)) runtime::fail("copy_async_16: destination not aligned to 16", where);
  if (!aligned_to_16(global)) runtime::fail("copy_async_16: source not aligned to 16", where);
  auto* words = static_cast<CopyWord*>(shared);
  words[0] = words[1] = ~uint64_t{0};
  runtime::queue_copy({shared, global, 16, 16, 0}, where);
}

inline void copy_async_commit() { runtime::commit_copies(); }

// Waits until at most n groups of this thread are pending.
template <int n>
void copy_async_wait() {
  runtime::AsyncCopy copy;
  while (runtime::take_copy(n, &copy)) {
    auto* to = static_cast<CopyWord*>(copy.shared);
    auto* from = static_cast<const CopyWord*>(copy.global);
    to[0] = from[0];
    to[1] = from[1];
  }
}

}  // namespace emulated::cuda

// Atomics and ordered accesses, made of the compiler's builtins, which ThreadSanitizer models.

namespace emulated {

template <class T>
concept Word = std::unsigned_integral<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <Word T>
T load_acquire(const T* p) {
  runtime::scheduling_point();
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

template <Word T>
T load_relaxed(const T* p) {
  runtime::scheduling_point();
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}

template <Word T>
void store_release(T* p, std::type_identity_t<T> value) {
  runtime::scheduling_point();
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
  runtime::progress();
}

template <Word T>
void store_relaxed(T* p, std::type_identity_t<T> value) {
  runtime::scheduling_point();
  __atomic_store_n(p, value, __ATOMIC_RELAXED);
  runtime::progress();
}

// ld.global.cg: not cached in L1, but as unordered as any other load.
template <class T>
T load_plain_coherent(const T* p) {
  return *p;
}

// Every turn of a loop that polls calls this: it lets others run, and notices that none can help.
inline void spin_pause(Where where = Where::current()) { runtime::poll(where); }

namespace cuda {

// Replaces *p by update(*p), relaxed as CUDA's atomics are.
template <Word T, class Update>
T atomic_update(T* p, Update update) {
  runtime::scheduling_point();
  T before = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &before, update(before), /*weak=*/false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  // An atomic that changes nothing (a lock that is taken) is a poll in disguise.
  if (update(before) != before) runtime::progress();
  return before;
}

template <Word T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  return atomic_update(p, [=](T old) { return old + value; });
}

template <Word T>
T atomicExch(T* p, std::type_identity_t<T> value) {
  return atomic_update(p, [=](T) { return value; });
}

template <Word T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return atomic_update(p, [=](T old) { return old == expected ? value : old; });
}

template <Word T>
T atomicMin(T* p, std::type_identity_t<T> value) {
  return atomic_update(p, [=](T old) { return old < value ? old : value; });
}

template <Word T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  return atomic_update(p, [=](T old) { return old > value ? old : value; });
}

}  // namespace cuda
}  // namespace emulated

using namespace emulated::cuda;

// Host side.

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

namespace emulated {

// Runs the whole grid before it returns.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   A&&... arguments) {
  const std::tuple<P...> parameters(std::forward<A>(arguments)...);
  auto thread = [&] { std::apply(kernel, parameters); };
  auto call = [](void* thread_body) { (*static_cast<decltype(thread)*>(thread_body))(); };
  const bool ran = runtime::launch(grid, block, shared_bytes, call, &thread);
  return ran ? cudaSuccess : cudaErrorInvalidConfiguration;
}

}  // namespace emulated
