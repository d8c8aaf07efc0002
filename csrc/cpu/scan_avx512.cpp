#include "scan.h"

#if defined(__x86_64__)

// After the standard headers: nothing of theirs may be compiled for this target.
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define MSRNN_AVX512
#define MSRNN_ISA avx512
#include "scan_kernel.h"

namespace msrnn {

ScanKernels scan_kernels_avx512(DType) {
  using namespace avx512;
  return {run_tile<ForwardPass, Float>, run_tile<BackwardPass, Float>};
}

}  // namespace msrnn

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
