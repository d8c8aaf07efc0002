#include "scan.h"

#if defined(__x86_64__)

// After the standard headers: nothing of theirs may be compiled for this target.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define MSRNN_AVX2
#define MSRNN_ISA avx2
#include "scan_kernel.h"

namespace msrnn {

ScanKernels scan_kernels_avx2(DType) {
  using namespace avx2;
  return {run_tile<ForwardPass, Float>, run_tile<BackwardPass, Float>};
}

}  // namespace msrnn

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
