// The scans for AVX2; scan_kernel.h has the kernels.
#include "../scan.h"

#if defined(__x86_64__)

#define MSRNN_AVX2
#include "begin_target.h"
#define MSRNN_ISA avx2
#include "../scan_kernel.h"

namespace msrnn {

ScanKernels scan_kernels_avx2(DType) {
  using namespace avx2;
  return {run_tile<ForwardPass, Float>, run_tile<BackwardPass, Float>};
}

}  // namespace msrnn

#include "end_target.h"

#endif
