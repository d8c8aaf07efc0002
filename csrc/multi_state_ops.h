// The multi-state operators as every backend registers them. We check the tensors of a call and see
// them as raw pointers.
#pragma once

#include <algorithm>
#include <utility>

#include "common.h"
#include "multi_state.h"

namespace msrnn {

inline Heads heads_of(const Tensor& x) {
  const int64_t size = size_of(dtype_of(x));
  const int64_t time = x.dim() == 4 ? x.stride(2) * size : 0;
  return {memory_of(x), x.stride(0) * size, x.stride(1) * size, time};
}

// The tensor with the elements of head_dim adjacent, a copy if need be.
inline Tensor packed(const Tensor& x) {
  return x.size(-1) == 1 || x.stride(-1) == 1 ? x : torch::stable::contiguous(x);
}

inline void check_heads(const Tensor& q, const Tensor& k, const Tensor& v, int64_t dimensions) {
  STD_TORCH_CHECK(q.dim() == dimensions && k.dim() == dimensions && v.dim() == dimensions,
                  "expected q, k and v with ", dimensions, " dimensions");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                  "expected q, k and v of one dtype");
  STD_TORCH_CHECK(dtype_of(q) != DType::float64, "expected float32, bfloat16 or float16");
  for (int64_t d = 0; d < dimensions; ++d) {
    STD_TORCH_CHECK(k.size(d) == v.size(d), "expected k and v of one shape");
    STD_TORCH_CHECK(d == 1 || k.size(d) == q.size(d), "expected q, k and v of one shape");
  }
  STD_TORCH_CHECK(k.size(1) > 0 && q.size(1) > 0 && q.size(1) % k.size(1) == 0,
                  "expected a multiple of the key-value heads as query heads");
  const int64_t head_dim = q.size(dimensions - 1);
  STD_TORCH_CHECK(head_dim > 0 && head_dim % 8 == 0 && head_dim <= kLargestHeadDim,
                  "expected a head_dim that is a multiple of 8, up to 256");
}

inline void check_contiguous(const Tensor& x, std::initializer_list<int64_t> sizes,
                             ScalarType type) {
  STD_TORCH_CHECK(x.dim() == static_cast<int64_t>(sizes.size()) && x.is_contiguous() &&
                      x.scalar_type() == type &&
                      std::equal(sizes.begin(), sizes.end(), x.sizes().begin()),
                  "expected a contiguous state of one shape");
}

// The positions of a state without its keys and values.
inline State marks_of(const Tensor& position, const Tensor& score, const Tensor& free,
                      const Tensor& seen, const Tensor& last_evicted, ScoreKind kind) {
  STD_TORCH_CHECK(position.dim() == 3 && position.size(2) >= 2,
                  "expected positions of shape (B, 1 or Hkv, slots + 1)");
  State s{};
  s.batch = position.size(0);
  s.groups = position.size(1);
  s.slots = position.size(2);
  const bool scored = kind == ScoreKind::accumulated;
  check_contiguous(position, {s.batch, s.groups, s.slots}, ScalarType::Long);
  check_contiguous(score, {s.batch, s.groups, scored ? s.slots : 0}, ScalarType::Float);
  check_contiguous(free, {s.batch, s.groups}, ScalarType::Long);
  check_contiguous(seen, {s.batch}, ScalarType::Long);
  check_contiguous(last_evicted, {s.batch, s.groups}, ScalarType::Long);
  s.position = memory_of<int64_t>(position);
  s.score = scored ? memory_of<float>(score) : nullptr;
  s.free = memory_of<int64_t>(free);
  s.seen = memory_of<int64_t>(seen);
  s.last_evicted = memory_of<int64_t>(last_evicted);
  return s;
}

inline State state_of(const Tensor& k, const Tensor& keys, const Tensor& values, State s) {
  s.kv_heads = k.size(1);
  s.head_dim = k.size(k.dim() - 1);
  s.dtype = dtype_of(k);
  STD_TORCH_CHECK(s.groups == 1 || s.groups == s.kv_heads, "expected a state of the heads of k");
  for (const Tensor* x : {&keys, &values}) {
    check_contiguous(*x, {s.batch, s.kv_heads, s.slots, s.head_dim}, k.scalar_type());
  }
  s.keys = memory_of(keys);
  s.values = memory_of(values);
  return s;
}

// How the rows of a batch use those of a state.
inline RowIndex row_index_of(const OptionalTensor& rows, int64_t batch, const State& s) {
  if (!rows) {
    STD_TORCH_CHECK(batch == s.batch, "expected a state of the batch of k");
    return {nullptr, false, s.batch};
  }
  const ScalarType type = rows->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long,
                  "expected int32 or int64 rows");
  check_contiguous(*rows, {batch}, type);
  return {memory_of(*rows), type == ScalarType::Long, s.batch};
}

inline Policy policy_of(int64_t score, int64_t sinks, int64_t recent) {
  STD_TORCH_CHECK(0 <= score && score <= 2 && sinks >= 0 && recent >= 0, "expected a policy");
  return {static_cast<ScoreKind>(score), sinks, recent};
}

inline const bool* mask_of(const OptionalTensor& valid, const Tensor& q) {
  if (!valid) return nullptr;
  check_contiguous(*valid, {q.size(0), q.size(2)}, ScalarType::Bool);
  return memory_of<const bool>(*valid);
}

inline TokenStep step_of(const State& state, const RowIndex& rows, const Policy& policy,
                         double scale, bool evicting, const Tensor& q, const Tensor& k,
                         const Tensor& v, const Tensor& out, float* scores) {
  return {state,         q.size(0), rows,        policy,      static_cast<float>(scale),
          evicting,      q.size(1), heads_of(q), heads_of(k), heads_of(v),
          heads_of(out), scores};
}

// The ops of one token. A backend makes tensors `readable` for its kernels, runs a step, and
// evicts.
template <class Backend>
struct StepOps {
  static Tensor attend_evict(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                             const OptionalTensor& rows, const Tensor& keys, const Tensor& values,
                             const Tensor& position, const Tensor& score, const Tensor& free,
                             const Tensor& seen, const Tensor& last_evicted, int64_t kind,
                             int64_t sinks, int64_t recent, double scale) {
    // Decoders have (B, H, 1, Dh) and want (B, 1, H, Dh) back, and a view of each tensor would cost
    // them host time.
    const bool with_time = q_in.dim() == 4 && q_in.size(2) == 1;
    check_heads(q_in, k_in, v_in, with_time ? 4 : 3);
    const Policy policy = policy_of(kind, sinks, recent);
    const Tensor q = Backend::readable(q_in), k = Backend::readable(k_in),
                 v = Backend::readable(v_in);
    const State marks = marks_of(position, score, free, seen, last_evicted, policy.score);
    const State state = state_of(k, keys, values, marks);
    const RowIndex index = row_index_of(rows, q.size(0), state);
    Tensor out =
        with_time ? allocate(q, {q.size(0), 1, q.size(1), q.size(3)}) : allocate(q, q.sizes());
    TokenStep step = step_of(state, index, policy, scale, true, q, k, v, out, nullptr);
    if (with_time) std::swap(step.out.head, step.out.time);
    Backend::run(step, q);
    return out;
  }

  static std::tuple<Tensor, Tensor> attend_scores(const Tensor& q_in, const Tensor& k_in,
                                                  const Tensor& v_in, const OptionalTensor& rows,
                                                  const Tensor& keys, const Tensor& values,
                                                  const Tensor& position, const Tensor& free,
                                                  const Tensor& seen, double scale) {
    check_heads(q_in, k_in, v_in, 3);
    const Tensor q = Backend::readable(q_in), k = Backend::readable(k_in),
                 v = Backend::readable(v_in);
    const Tensor none =
        allocate(position, {position.size(0), position.size(1), 0}, ScalarType::Float);
    const State marks = marks_of(position, none, free, seen, free, ScoreKind::attention);
    const State state = state_of(k, keys, values, marks);
    const RowIndex index = row_index_of(rows, q.size(0), state);
    Tensor scores = torch::stable::new_zeros(position, {q.size(0), state.groups, state.slots},
                                             ScalarType::Float);
    Tensor out = allocate(q, q.sizes());
    auto* sums = static_cast<float*>(scores.data_ptr());
    Backend::run(step_of(state, index, {}, scale, false, q, k, v, out, sums), q);
    return {out, scores};
  }

  static void evict(const Tensor& scores, const OptionalTensor& rows, const Tensor& position,
                    const Tensor& score, const Tensor& free, const Tensor& seen,
                    const Tensor& last_evicted, int64_t kind, int64_t sinks, int64_t recent) {
    const Policy policy = policy_of(kind, sinks, recent);
    const State s = marks_of(position, score, free, seen, last_evicted, policy.score);
    const int64_t batch = scores.size(0);
    check_contiguous(scores, {batch, s.groups, s.slots}, ScalarType::Float);
    Backend::evict(s, row_index_of(rows, batch, s), policy, scores);
  }
};

// The op of a sequence. A backend runs the steps of all its tokens.
template <class Backend>
struct SequenceOps {
  static std::tuple<Tensor, Tensor> attend_sequence(const Tensor& q_in, const Tensor& k_in,
                                                    const Tensor& v_in, OptionalTensor valid,
                                                    int64_t capacity, bool per_head, int64_t kind,
                                                    int64_t sinks, int64_t recent, double scale) {
    check_heads(q_in, k_in, v_in, 4);
    STD_TORCH_CHECK(capacity >= 1, "expected at least one slot");
    const Policy policy = policy_of(kind, sinks, recent);
    const Tensor q = Backend::readable(q_in), k = Backend::readable(k_in),
                 v = Backend::readable(v_in);
    const int64_t batch = q.size(0), time = q.size(2), kv_heads = k.size(1), head_dim = q.size(3);
    const int64_t groups = per_head ? kv_heads : 1;
    Tensor out = torch::stable::new_zeros(q, q.sizes());
    Tensor expiry = allocate(q, {batch, groups, time}, ScalarType::Long);
    if (batch == 0 || time == 0) return {out, expiry};

    // The state starts empty, and never needs more slots than there are tokens. Keys and
    // values share a tensor, and its marks share two, one of -1 and one of zeros: each tensor takes
    // a small call a microsecond.
    const int64_t slots = std::min(capacity, time) + 1;
    const int64_t rows = batch * groups, marks = rows * slots;
    Tensor kept = allocate(k, {2, batch, kv_heads, slots, head_dim});
    Tensor nothing = allocate(q, {marks + rows + batch * time}, ScalarType::Long);
    torch::stable::fill_(nothing, -1);
    Tensor zeros = torch::stable::new_zeros(q, {marks + rows + batch}, ScalarType::Long);
    auto* position = static_cast<int64_t*>(nothing.data_ptr());
    auto* score = static_cast<int64_t*>(zeros.data_ptr());
    const State state{
        .keys = static_cast<char*>(kept.data_ptr()),
        .values = static_cast<char*>(kept.data_ptr()) + kept.numel() / 2 * kept.element_size(),
        .position = position,
        .score = policy.score == ScoreKind::accumulated ? reinterpret_cast<float*>(score) : nullptr,
        .free = score + marks,
        .last_evicted = position + marks,
        .seen = score + marks + rows,
        .batch = batch,
        .kv_heads = kv_heads,
        .groups = groups,
        .slots = slots,
        .head_dim = head_dim,
        .dtype = dtype_of(k)};
    const TokenSequence sequence{time, mask_of(valid, q), static_cast<int64_t*>(expiry.data_ptr()),
                                 position + marks + rows};
    const RowIndex own{nullptr, false, batch};
    Backend::run(step_of(state, own, policy, scale, true, q, k, v, out, nullptr), sequence, q);
    return {out, expiry};
  }
};

template <class Backend>
void register_multi_state(torch::stable::detail::StableLibrary& m) {
  m.impl("attend_evict", TORCH_BOX(&StepOps<Backend>::attend_evict));
  m.impl("attend_scores", TORCH_BOX(&StepOps<Backend>::attend_scores));
  m.impl("evict", TORCH_BOX(&StepOps<Backend>::evict));
  m.impl("attend_sequence", TORCH_BOX(&SequenceOps<Backend>::attend_sequence));
}

}  // namespace msrnn
