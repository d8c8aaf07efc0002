// A prompt on the CPU: which of the states so far and of its own tokens stay. (PyTorch's attention
// computes its output, in msrnn_ops/operators/prompt.py.)
//
// The columns of a row are its slots and then the prompt's tokens. The last query scores them, in
// one pass over the keys, or all queries do, some at a time. That takes T*T products but never T*T
// weights: each part of the queries adds up columns of its own, in a fixed order. Then all but N
// columns go, and the tokens that survive are copied into empty slots.
#include <cstring>
#include <vector>

#include "multi_state_call.h"

namespace msrnn {
namespace {

// If attention is accumulated, a prompt's queries come in this many parts, each with sums of its
// own, and one pass over the keys serves this many rows of logits.
constexpr int64_t kPromptParts = 8;
constexpr int64_t kPromptLogits = 16;

// The attention of a prompt's queries to every column: the slots, then the prompt's own tokens.
struct Prompt {
  State state;
  RowIndex rows;
  Policy policy;
  float scale;
  int64_t query_heads, time;
  Heads q, k, v;
  const bool* valid;  // (batch, time), or null: all
};

class PromptRow {
 public:
  PromptRow(const Prompt& prompt, int64_t index, int64_t row)
      : p_(prompt),
        s_(prompt.state),
        index_(index),
        row_(row),
        sharing_(prompt.query_heads / s_.kv_heads),
        columns_(s_.slots + prompt.time),
        kernels_(kernels_for(s_.dtype)) {
    for (int64_t t = 0; t < p_.time; ++t) {
      if (!p_.valid || p_.valid[index * p_.time + t]) times_.push_back(t);
    }
  }

  void run() {
    for (int64_t g = 0; g < s_.groups; ++g) s_.last_evicted[s_.group(row_, g)] = -1;
    if (times_.empty()) return;
    const auto count = static_cast<int64_t>(times_.size());
    position_.assign(s_.groups * columns_, -1);
    int64_t most = 0;
    for (int64_t g = 0; g < s_.groups; ++g) {
      int64_t* position = position_.data() + g * columns_;
      std::copy_n(s_.position + s_.group(row_, g) * s_.slots, s_.slots, position);
      position[s_.free_slot(row_, g)] = -1;  // replaced
      most = std::max<int64_t>(
          most, std::count_if(position, position + s_.slots, [](int64_t p) { return p >= 0; }));
      for (int64_t i = 0; i < count; ++i) position[s_.slots + times_[i]] = s_.seen[row_] + i;
    }
    const bool every_query = p_.policy.score == ScoreKind::accumulated;
    const bool last_query = p_.policy.score == ScoreKind::attention && most + count > s_.slots - 1;
    if (every_query || last_query) score(every_query);
    for (int64_t g = 0; g < s_.groups; ++g) keep(g);
    s_.seen[row_] += count;
  }

 private:
  // scores_[g][column]: attention of the last query, or of all, summed over the group's heads.
  void score(bool every_query) {
    const int64_t width = padded(columns_), parts = every_query ? kPromptParts : 1;
    std::vector<float> sums(s_.kv_heads * parts * width, 0.0f);
    torch::stable::parallel_for(0, s_.kv_heads * parts, 1, [&](int64_t i, int64_t end) {
      FlushDenormals flush(true);
      for (; i < end; ++i) score_part(i / parts, i % parts, every_query, sums.data() + i * width);
    });
    scores_.assign(s_.groups * columns_, 0.0f);
    for (int64_t head = 0; head < s_.kv_heads; ++head) {
      float* to = scores_.data() + s_.group_of(head) * columns_;
      for (int64_t part = 0; part < parts; ++part) {
        const float* from = sums.data() + (head * parts + part) * width;
        for (int64_t c = 0; c < columns_; ++c) to[c] += from[c];
      }
    }
  }

  void score_part(int64_t head, int64_t part, bool every_query, float* sums) const {
    const auto count = static_cast<int64_t>(times_.size());
    const int64_t together = std::max<int64_t>(1, kPromptLogits / sharing_);
    const int64_t stride = padded(columns_);
    static thread_local Workspace own;
    float* queries = own.floats(together * sharing_ * (kLargestHeadDim + stride + 1));
    float* logits = queries + together * sharing_ * kLargestHeadDim;
    float* factors = logits + together * sharing_ * stride;
    if (!every_query) {
      score_queries(head, count - 1, 1, queries, logits, factors, sums);
      return;
    }
    for (int64_t i = part * together; i < count; i += kPromptParts * together) {
      score_queries(head, i, std::min(together, count - i), queries, logits, factors, sums);
    }
  }

  // `count` valid queries from the first-th on.
  void score_queries(int64_t head, int64_t first, int64_t count, float* queries, float* logits,
                     float* factors, float* sums) const {
    const int64_t stride = padded(columns_), heads = count * sharing_;
    const int64_t seen = s_.slots + times_[first + count - 1] + 1;  // columns of the last of them
    const int64_t* position = position_.data() + s_.group_of(head) * columns_;
    for (int64_t i = 0; i < count; ++i) {
      kernels_.load_queries(p_.q.at(index_, head * sharing_, times_[first + i]), p_.q.head,
                            sharing_, s_.head_dim, queries + i * sharing_ * kLargestHeadDim);
    }
    for (int64_t h = 0; h < heads; ++h) {
      std::fill_n(logits + h * stride, padded(seen), kMinusInfinity);
    }
    auto attend = [&](Rows rows, int64_t column, int64_t n) {
      kernels_.logits(queries, heads, rows, n, s_.head_dim, p_.scale, logits + column, stride);
    };
    for_runs(position, 0, s_.slots, [&](int64_t slot, int64_t n) {
      attend(rows_of(s_, s_.keys, row_, head, slot), slot, n);
    });
    for_runs(position, s_.slots, seen, [&](int64_t column, int64_t n) {
      attend({p_.k.at(index_, head, column - s_.slots), p_.k.time}, column, n);
    });
    for (int64_t h = 0; h < heads; ++h) {
      float* row = logits + h * stride;
      std::fill(row + s_.slots + times_[first + h / sharing_] + 1, row + seen, kMinusInfinity);
      float maximum, sum;
      kernels_.exponentials(row, padded(seen), &maximum, &sum);
      factors[h] = 1 / sum;
      if (sum == sum) continue;
      // NaN goes to the columns that this query sees, and not by way of 0 * NaN to later ones.
      const int64_t own = s_.slots + times_[first + h / sharing_] + 1;
      std::fill(sums, sums + own, sum);
      std::fill(row, row + padded(seen), 0.0f);
      factors[h] = 0;
    }
    kernels_.add_weighted(sums, factors, logits, stride, heads, padded(seen));
  }

  // Drops the lowest columns until N are left, and moves the surviving tokens into empty slots.
  void keep(int64_t g) {
    const int64_t group = s_.group(row_, g), offset = group * s_.slots;
    const auto count = static_cast<int64_t>(times_.size());
    int64_t* position = position_.data() + g * columns_;
    float* scores = scores_.empty() ? nullptr : scores_.data() + g * columns_;
    if (s_.score) {
      for (int64_t slot = 0; slot < s_.slots; ++slot) scores[slot] += s_.score[offset + slot];
    }
    std::vector<Candidate> candidates;
    int64_t total = 0;
    for (int64_t c = 0; c < columns_; ++c) {
      if (position[c] < 0) continue;
      ++total;
      if (is_protected(p_.policy, position[c], s_.seen[row_] + count - 1)) continue;
      candidates.push_back({scores ? scores[c] : 0.0f, position[c], c});
    }
    const int64_t dropped = std::min<int64_t>(std::max<int64_t>(total - (s_.slots - 1), 0),
                                              static_cast<int64_t>(candidates.size()));
    if (dropped > 0) {
      const auto last = candidates.begin() + dropped - 1;
      std::nth_element(candidates.begin(), last, candidates.end(), goes_before);
      s_.last_evicted[group] = last->position;
      for (auto it = candidates.begin(); it <= last; ++it) position[it->slot] = -1;
    }
    for (int64_t slot = 0; slot < s_.slots; ++slot) {
      s_.position[offset + slot] = position[slot];
      if (s_.score) s_.score[offset + slot] = position[slot] < 0 ? 0 : scores[slot];
    }
    int64_t slot = 0;
    auto next_empty = [&] {
      while (slot < s_.slots && s_.position[offset + slot] >= 0) ++slot;
      return slot;
    };
    for (const int64_t t : times_) {
      const int64_t column = s_.slots + t;
      if (position[column] < 0 || next_empty() == s_.slots) continue;
      store(g, slot, t);
      s_.position[offset + slot] = position[column];
      if (s_.score) s_.score[offset + slot] = scores[column];
    }
    s_.free[group] = std::min(next_empty(), s_.slots - 1);
  }

  void store(int64_t g, int64_t slot, int64_t t) const {
    const int64_t heads = s_.kv_heads / s_.groups;
    for (int64_t head = g * heads; head < (g + 1) * heads; ++head) {
      std::memcpy(s_.keys + s_.row_offset(row_, head, slot), p_.k.at(index_, head, t),
                  s_.row_bytes());
      std::memcpy(s_.values + s_.row_offset(row_, head, slot), p_.v.at(index_, head, t),
                  s_.row_bytes());
    }
  }

  const Prompt& p_;
  const State& s_;
  const int64_t index_, row_;  // of the batch, and of the state
  const int64_t sharing_;
  const int64_t columns_;
  const AttentionKernels kernels_;
  std::vector<int64_t> times_;     // of the valid tokens
  std::vector<int64_t> position_;  // (groups, columns); -1: nothing there
  std::vector<float> scores_;      // (groups, columns), or empty
};

void store_prompt(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                  const OptionalTensor& valid, const OptionalTensor& rows, const Tensor& keys,
                  const Tensor& values, const Tensor& position, const Tensor& score,
                  const Tensor& free, const Tensor& seen, const Tensor& last_evicted, int64_t kind,
                  int64_t sinks, int64_t recent, double scale) {
  check_heads(q_in, k_in, v_in, 4);
  const Policy policy = policy_of(kind, sinks, recent);
  const Tensor q = packed(q_in), k = packed(k_in), v = packed(v_in);
  const State marks = marks_of(position, score, free, seen, last_evicted, policy.score);
  const State state = state_of(k, keys, values, marks);
  const Prompt prompt{state,       row_index_of(rows, k.size(0), state),
                      policy,      static_cast<float>(scale),
                      q.size(1),   q.size(2),
                      heads_of(q), heads_of(k),
                      heads_of(v), mask_of(valid, q)};
  for (int64_t b = 0; b < k.size(0); ++b) {
    if (const int64_t row = prompt.rows.of(b); row >= 0) PromptRow(prompt, b, row).run();
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(msrnn_ops, CPU, m) { m.impl("store_prompt", TORCH_BOX(&store_prompt)); }

}  // namespace msrnn
