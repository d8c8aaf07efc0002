// The scans for any processor, and those of float64; scan_kernel.h has the kernels.
#define MSRNN_ISA baseline
#include "../scan_kernel.h"

namespace msrnn {

ScanKernels scan_kernels_baseline(DType dtype) {
  using namespace baseline;
  if (dtype == DType::float64) {
    return {run_tile<ForwardPass, Double>, run_tile<BackwardPass, Double>};
  }
  return {run_tile<ForwardPass, Float>, run_tile<BackwardPass, Float>};
}

}  // namespace msrnn
