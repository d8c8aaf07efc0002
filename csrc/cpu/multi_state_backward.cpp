// The backward pass of attend_sequence on the CPU, one key-value head of one row at a time.
//
// It walks the tokens forwards as the op did, computes each query's weights over the slots again,
// and adds to the gradients of the keys and values that lie there. A key's gradient is written when
// the key expires. Each query and slot take five products of head_dim: two for logits and three for
// gradients.
#include <cstring>
#include <vector>

#include "multi_state_call.h"

namespace msrnn {
namespace {

// The gradients of causal attention in which key j is visible to queries j <= t < expiry[j], for
// one key-value head of one row. The visible keys, their values and the gradients of both lie in
// slots, so that work and memory follow the number of slots and not T.
struct SequenceBackward {
  DType dtype;
  float scale;
  int64_t time, head_dim, shared;
  Heads q, k, v, grad_out, grad_q, grad_k, grad_v;
  const bool* valid;  // of the row, or null
};

void walk_back(const SequenceBackward& c, const int64_t* expiry, int64_t row, int64_t head) {
  FlushDenormals flush(true);
  const AttentionKernels kernels = kernels_for(c.dtype);
  const int64_t row_bytes = c.head_dim * size_of(c.dtype), query = head * c.shared;
  std::vector<std::vector<int64_t>> leaving(c.time + 1);  // columns by their expiry
  int64_t visible = 0, slots = 0;
  for (int64_t t = 0; t < c.time; ++t) {
    const bool stored = (!c.valid || c.valid[t]) && expiry[t] > t;
    if (stored) {
      leaving[std::min(expiry[t], c.time)].push_back(t);
      slots = std::max(slots, ++visible);
    }
    visible -= static_cast<int64_t>(leaving[t + 1].size());
  }

  const int64_t stride = padded(slots), wide = kLargestHeadDim;
  std::vector<char> keys(slots * row_bytes), values(slots * row_bytes);
  std::vector<float> grad_keys(slots * wide), grad_values(slots * wide);
  std::vector<float> weights(c.shared * stride), grad_weights(c.shared * stride);
  std::vector<float> queries(c.shared * wide), grad_rows(c.shared * wide);
  std::vector<float> wide_queries(c.shared * wide), wide_grads(c.shared * wide);
  std::vector<float> grad_queries(c.shared * wide);
  std::vector<int64_t> column(slots, -1), free;
  for (int64_t slot = slots; slot-- > 0;) free.push_back(slot);
  std::vector<int64_t> slot_of(c.time, -1);
  const float one = 1;

  for (int64_t t = 0; t < c.time; ++t) {
    const bool real = !c.valid || c.valid[t];
    if (real && expiry[t] > t) {
      const int64_t slot = slot_of[t] = free.back();
      free.pop_back();
      column[slot] = t;
      std::memcpy(keys.data() + slot * row_bytes, c.k.at(row, head, t), row_bytes);
      std::memcpy(values.data() + slot * row_bytes, c.v.at(row, head, t), row_bytes);
      std::fill_n(grad_keys.data() + slot * wide, wide, 0.0f);
      std::fill_n(grad_values.data() + slot * wide, wide, 0.0f);
    }
    if (real) {
      kernels.load_queries(c.q.at(row, query, t), c.q.head, c.shared, c.head_dim, queries.data());
      kernels.load_queries(c.grad_out.at(row, query, t), c.grad_out.head, c.shared, c.head_dim,
                           grad_rows.data());
      for (int64_t h = 0; h < c.shared; ++h) {
        kernels.widen_row(c.q.at(row, query + h, t), c.head_dim, wide_queries.data() + h * wide);
        kernels.widen_row(c.grad_out.at(row, query + h, t), c.head_dim,
                          wide_grads.data() + h * wide);
      }
      std::fill(weights.begin(), weights.end(), kMinusInfinity);
      std::fill(grad_weights.begin(), grad_weights.end(), 0.0f);
      std::fill(grad_queries.begin(), grad_queries.end(), 0.0f);
      for_runs(column.data(), 0, slots, [&](int64_t slot, int64_t n) {
        kernels.logits(queries.data(), c.shared, {keys.data() + slot * row_bytes, row_bytes}, n,
                       c.head_dim, c.scale, weights.data() + slot, stride);
        kernels.logits(grad_rows.data(), c.shared, {values.data() + slot * row_bytes, row_bytes}, n,
                       c.head_dim, 1.0f, grad_weights.data() + slot, stride);
      });
      for (int64_t h = 0; h < c.shared; ++h) {
        float *p = weights.data() + h * stride, *g = grad_weights.data() + h * stride;
        float maximum, sum, mean = 0;
        kernels.exponentials(p, stride, &maximum, &sum);
        for (int64_t i = 0; i < stride; ++i) p[i] /= sum;
        for (int64_t i = 0; i < stride; ++i) mean += p[i] * g[i];
        for (int64_t i = 0; i < stride; ++i) g[i] = p[i] * (g[i] - mean) * c.scale;
      }
      for_runs(column.data(), 0, slots, [&](int64_t slot, int64_t n) {
        kernels.accumulate(grad_queries.data(), c.shared, grad_weights.data() + slot, stride,
                           {keys.data() + slot * row_bytes, row_bytes}, n, c.head_dim);
        kernels.add_outer(grad_keys.data() + slot * wide, grad_weights.data() + slot, stride,
                          wide_queries.data(), c.shared, n, c.head_dim);
        kernels.add_outer(grad_values.data() + slot * wide, weights.data() + slot, stride,
                          wide_grads.data(), c.shared, n, c.head_dim);
      });
      for (int64_t h = 0; h < c.shared; ++h) {
        kernels.combine(c.grad_q.at(row, query + h, t), grad_queries.data() + h * wide, 0, &one, 0,
                        1, c.head_dim);
      }
    }
    for (const int64_t j : leaving[t + 1]) {
      const int64_t slot = slot_of[j];
      kernels.combine(c.grad_k.at(row, head, j), grad_keys.data() + slot * wide, 0, &one, 0, 1,
                      c.head_dim);
      kernels.combine(c.grad_v.at(row, head, j), grad_values.data() + slot * wide, 0, &one, 0, 1,
                      c.head_dim);
      column[slot] = -1;
      free.push_back(slot);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> attend_sequence_backward(const Tensor& grad_out_in,
                                                            const Tensor& q_in, const Tensor& k_in,
                                                            const Tensor& v_in,
                                                            const Tensor& expiry,
                                                            OptionalTensor valid, double scale) {
  check_heads(q_in, k_in, v_in, 4);
  const Tensor q = packed(q_in), k = packed(k_in), v = packed(v_in);
  check_heads(grad_out_in, k, v, 4);
  STD_TORCH_CHECK(grad_out_in.size(1) == q.size(1), "expected grad_out in the shape of q");
  const Tensor grad_out = packed(grad_out_in);
  const int64_t batch = q.size(0), time = q.size(2), kv_heads = k.size(1);
  STD_TORCH_CHECK(expiry.dim() == 3, "expected expiry of shape (B, 1 or Hkv, T)");
  const int64_t groups = expiry.size(1);
  STD_TORCH_CHECK(groups == 1 || groups == kv_heads, "expected expiry of shape (B, 1 or Hkv, T)");
  check_contiguous(expiry, {batch, groups, time}, ScalarType::Long);
  const bool* mask = mask_of(valid, q);
  Tensor grad_q = torch::stable::new_zeros(q, q.sizes());
  Tensor grad_k = torch::stable::new_zeros(k, k.sizes());
  Tensor grad_v = torch::stable::new_zeros(v, v.sizes());
  const auto* gone = memory_of<const int64_t>(expiry);
  SequenceBackward call{dtype_of(q),
                        static_cast<float>(scale),
                        time,
                        q.size(3),
                        q.size(1) / kv_heads,
                        heads_of(q),
                        heads_of(k),
                        heads_of(v),
                        heads_of(grad_out),
                        heads_of(grad_q),
                        heads_of(grad_k),
                        heads_of(grad_v),
                        nullptr};
  torch::stable::parallel_for(0, batch * kv_heads, 1, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      const int64_t row = i / kv_heads, head = i % kv_heads;
      SequenceBackward mine = call;
      mine.valid = mask ? mask + row * time : nullptr;
      walk_back(mine, gone + (row * groups + (groups == 1 ? 0 : head)) * time, row, head);
    }
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(msrnn_ops, CPU, m) {
  m.impl("attend_sequence_backward", TORCH_BOX(&attend_sequence_backward));
}

}  // namespace msrnn
