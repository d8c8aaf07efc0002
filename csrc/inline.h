// Marks functions that the CPU and the GPU share. Each compiler makes them for its own side.
#pragma once

#ifdef __CUDACC__
#define MSRNN_FN __device__ __forceinline__
#else
#define MSRNN_FN inline __attribute__((always_inline))
#endif
