// What the kernels need of a GPU: CUDA, or the emulator of tests/emulation if a C++ compiler reads
// them. Kernels use these names and nothing else of CUDA beyond thread indices, barriers, shuffles,
// ballots and atomics, so that the same source runs on both.
#pragma once

#include "../dtype.h"

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace msrnn {

// Flags between blocks. What was written before a release is seen after an acquire of its value.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
__device__ __forceinline__ void store_release(uint32_t* p, uint32_t x) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
__device__ __forceinline__ unsigned long long load_acquire(const unsigned long long* p) {
  unsigned long long x;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
  return x;
}
__device__ __forceinline__ void store_release(unsigned long long* p, unsigned long long x) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
}
// A plain load that no cache of this multiprocessor answers.
template <class T>
__device__ __forceinline__ T load_coherent(const T* p) {
  return __ldcg(p);
}
__device__ __forceinline__ void spin_pause() { __nanosleep(32); }

// Copies 16 aligned bytes from global to shared memory. They are there when copies_done() returns.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  *static_cast<uint4*>(shared) = __ldcg(static_cast<const uint4*>(global));
#endif
}
__device__ __forceinline__ void copies_done() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Special functions: 2^x, log2 x and 1/x. Each is one instruction and off by an ulp or two.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approximate(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The larger of two numbers, or NaN if one of them is NaN.
__device__ __forceinline__ float larger_propagating(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a > b || a != a ? a : b;
#endif
}

// Tensor cores for 16-bit numbers, in the shape and layout of m16n8k16: sum += left * right.
#if __CUDA_ARCH__ >= 800
constexpr bool kTensorCores = true;
#else
constexpr bool kTensorCores = false;
#endif
#define MSRNN_MMA(type)                                                                 \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                   \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"   \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                 \
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), \
                 "r"(right[1]))
__device__ __forceinline__ void multiply_add(BFloat16, float (&sum)[4], const uint32_t (&left)[4],
                                             const uint32_t (&right)[2]) {
#if __CUDA_ARCH__ >= 800
  MSRNN_MMA("bf16");
#endif
}
__device__ __forceinline__ void multiply_add(Half, float (&sum)[4], const uint32_t (&left)[4],
                                             const uint32_t (&right)[2]) {
#if __CUDA_ARCH__ >= 800
  MSRNN_MMA("f16");
#endif
}
#undef MSRNN_MMA

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char msrnn_shared[];
  return msrnn_shared;
}

// Blocks that can be resident on this device at once.
template <class Kernel>
cudaError_t resident_blocks(int* count, Kernel kernel, int threads, size_t shared) {
  int device, processors, each;
  if (auto e = cudaGetDevice(&device)) return e;
  if (auto e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) {
    return e;
  }
  if (auto e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared)) {
    return cudaGetLastError();
  }
  *count = processors * each;
  return each ? cudaSuccess : cudaErrorLaunchOutOfResources;
}

template <class Kernel>
cudaError_t allow_shared(Kernel kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(bytes));
  if (error) cudaGetLastError();  // we report it here, so the next launch must not
  return error;
}

// If `together`, all blocks become resident at once or the launch fails.
template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), uint32_t blocks, uint32_t threads, size_t shared,
                   cudaStream_t stream, const Arguments& arguments, bool together = false) {
  if (!together) {
    kernel<<<blocks, threads, shared, stream>>>(arguments);
    return cudaGetLastError();
  }
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments);
  if (error) cudaGetLastError();
  return error;
}

}  // namespace msrnn

#else

#include <cmath>

#include "cuda_on_cpu.h"

namespace msrnn {

using emulated::spin_pause;
inline uint32_t load_acquire(const uint32_t* p) { return emulated::load_acquire(p); }
inline void store_release(uint32_t* p, uint32_t x) { emulated::store_release(p, x); }
inline unsigned long long load_acquire(const unsigned long long* p) {
  return emulated::load_acquire(p);
}
inline void store_release(unsigned long long* p, unsigned long long x) {
  emulated::store_release(p, x);
}
template <class T>
T load_coherent(const T* p) {
  return emulated::load_plain_coherent(p);
}
inline void copy_async(void* shared, const void* global) { ::copy_async_16(shared, global); }
inline void copies_done() {
  ::copy_async_commit();
  ::copy_async_wait<0>();
}
inline float exp2_approximate(float x) { return ::exp2_approx(x); }
inline float log2_approximate(float x) { return ::log2_approx(x); }
inline float reciprocal_approximate(float x) { return ::reciprocal_approx(x); }
inline float larger_propagating(float a, float b) { return a > b || a != a ? a : b; }
#if defined(EMULATED_WITHOUT_TENSOR_CORES)
constexpr bool kTensorCores = false;
#else
constexpr bool kTensorCores = true;
#endif
template <class Narrow>
void multiply_add(Narrow, float (&sum)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  const auto value = [](uint16_t bits) { return double{to_float(Narrow{bits})}; };
  ::mma_m16n8k16(sum, left, right, value);
}
inline char* dynamic_shared() { return static_cast<char*>(msrnn_dynamic_shared()); }

template <class Kernel>
cudaError_t resident_blocks(int* count, Kernel, int, size_t) {
  *count = emulated::runtime::resident_blocks();
  return cudaSuccess;
}
template <class Kernel>
cudaError_t allow_shared(Kernel, size_t) {
  return cudaSuccess;
}
template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), uint32_t blocks, uint32_t threads, size_t shared,
                   cudaStream_t stream, const Arguments& arguments, bool = false) {
  return emulated::launch(kernel, dim3{blocks, 1, 1}, dim3{threads, 1, 1}, shared, stream,
                          arguments);
}

}  // namespace msrnn

#endif
