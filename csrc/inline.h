// Functions that host and device share.
#pragma once

#ifdef __CUDACC__
#define MSRNN_FN __host__ __device__ __forceinline__
#else
#define MSRNN_FN inline __attribute__((always_inline))
#endif
