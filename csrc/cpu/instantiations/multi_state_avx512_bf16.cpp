// Multi-state attention for AVX-512 with products of bfloat16; multi_state_kernel.h has the
// kernels.
#include "../multi_state.h"

#if defined(__x86_64__)

#define MSRNN_AVX512
#define MSRNN_AVX512_BF16
#include "begin_target.h"
#define MSRNN_ISA avx512_bf16
#include "../multi_state_kernel.h"

namespace msrnn {

AttentionKernels attention_kernels_avx512_bf16(DType dtype) {
  return avx512_bf16::attention_kernels(dtype);
}

}  // namespace msrnn

#include "end_target.h"

#endif
