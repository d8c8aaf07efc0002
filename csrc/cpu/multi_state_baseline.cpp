#define MSRNN_ISA baseline
#include "multi_state_kernel.h"

namespace msrnn {

AttentionKernels attention_kernels_baseline(DType dtype) {
  return baseline::attention_kernels(dtype);
}

}  // namespace msrnn
