// Multi-state attention for any processor; multi_state_kernel.h has the kernels.
#define MSRNN_ISA baseline
#include "../multi_state_kernel.h"

namespace msrnn {

AttentionKernels attention_kernels_baseline(DType dtype) {
  return baseline::attention_kernels(dtype);
}

}  // namespace msrnn
