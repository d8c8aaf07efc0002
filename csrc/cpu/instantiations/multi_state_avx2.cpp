// Multi-state attention for AVX2; multi_state_kernel.h has the kernels.
#include "../multi_state.h"

#if defined(__x86_64__)

#define MSRNN_AVX2
#include "begin_target.h"
#define MSRNN_ISA avx2
#include "../multi_state_kernel.h"

namespace msrnn {

AttentionKernels attention_kernels_avx2(DType dtype) { return avx2::attention_kernels(dtype); }

}  // namespace msrnn

#include "end_target.h"

#endif
