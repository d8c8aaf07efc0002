#include "multi_state.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define MSRNN_AVX512
#define MSRNN_ISA avx512
#include "multi_state_kernel.h"

namespace msrnn {

AttentionKernels attention_kernels_avx512(DType dtype) { return avx512::attention_kernels(dtype); }

}  // namespace msrnn

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
