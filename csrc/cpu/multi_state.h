// What multi-state attention is made of on the CPU: raw pointers and strides, and no torch.
//
// Each function serves the query heads that share one key-value head, over consecutive rows of that
// head's keys or values. The order of every sum depends on the arguments alone.
#pragma once

#include "../multi_state.h"

namespace msrnn {

// Keys or values of one head, a row each; head_dim elements of a row are adjacent.
struct Rows {
  const char* data;
  int64_t step;  // bytes from one row to the next
};

struct AttentionKernels {
  // Copies `heads` rows of head_dim elements, `step` bytes apart, into the form that `logits`
  // reads; a head's starts every kLargestHeadDim floats.
  void (*load_queries)(const char* from, int64_t step, int64_t heads, int64_t head_dim, void* to);

  // logits[h * stride + r] = scale * <query h, row r>.
  void (*logits)(const void* queries, int64_t heads, Rows rows, int64_t count, int64_t head_dim,
                 float scale, float* logits, int64_t stride);

  // e_r = exp(logit_r - maximum) in place, for a multiple of 16 logits; -inf gives exactly 0.
  void (*exponentials)(float* logits, int64_t count, float* maximum, float* sum);

  // out[h * kLargestHeadDim + d] += sum_r weights[h * stride + r] * row_r[d], in the order of r.
  void (*accumulate)(float* out, int64_t heads, const float* weights, int64_t stride, Rows rows,
                     int64_t count, int64_t head_dim);

  // sums[r] += sum_h factors[h] * weights[h * stride + r], for a multiple of 16 rows.
  void (*add_weighted)(float* sums, const float* factors, const float* weights, int64_t stride,
                       int64_t heads, int64_t count);

  // rows[r * kLargestHeadDim + d] += sum_h weights[h * stride + r] * x[h * kLargestHeadDim + d].
  void (*add_outer)(float* rows, const float* weights, int64_t stride, const float* x,
                    int64_t heads, int64_t count, int64_t head_dim);

  // out[d] = sum_b factors[b * factor_step] * parts[b * part_step + d], rounded to the dtype.
  void (*combine)(char* out, const float* parts, int64_t part_step, const float* factors,
                  int64_t factor_step, int64_t count, int64_t head_dim);

  // to[d] = from[d] as float, for d < head_dim.
  void (*widen_row)(const char* from, int64_t head_dim, float* to);
};

// float32, bfloat16 or float16.
AttentionKernels attention_kernels_baseline(DType);
#if defined(__x86_64__)
AttentionKernels attention_kernels_avx2(DType);
AttentionKernels attention_kernels_avx512(DType);
AttentionKernels attention_kernels_avx512_bf16(DType);
#endif

}  // namespace msrnn
