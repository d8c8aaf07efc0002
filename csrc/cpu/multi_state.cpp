// Multi-state attention on the CPU: one token of every row is attended for, and one state of every
// row evicted, in one launch.
//
// The slots of a row are cut into blocks of about kBlockSlots, by their number alone, so that every
// sum has one order whatever the number of threads. Threads take tasks in order, by one ticket:
//
//   attend   A block of one key-value head, for all query heads that share it: the logits of its
//            keys, exponentials against the block's own maximum, and the weighted sum of its
//            values. Whoever finishes the last block of a head rescales the blocks to one softmax,
//            writes the output, and sums the weights over the query heads.
//   decide   A block of a row, when all its heads are done: the sum of the weights over the heads,
//            the policy's scores, and the block's candidate for eviction. Whoever finishes the last
//            block marks the victim's slot as free.
//
// A task waits only for tasks of lower tickets, which running threads hold, so nothing can
// dead-lock.
//
// Traffic. Keys and values are read once, and 4 bytes of weights for each slot and key-value head
// are written and read. Where there are many heads, one thread takes a whole one, and the weights
// stay in that thread's cache. A head that threads share costs 4 bytes more for each slot and query
// head: 3 % of a bfloat16 state at 4 query heads on each key-value head of 128. One slot is
// written. Slots that no token has reached yet are not looked at.
//
// Measured with TOVA, 4 rows of 8192 slots, 8 key-value heads of 128 and two threads, a step runs
// at 0.79 (float32) and 0.72 (bfloat16) of the rate at which the same bytes are read. We rejected
// two variants. If the weights of all heads go to shared memory, Window is 10 % faster than TOVA in
// bfloat16; now it is 3 to 6 %. If neighbouring blocks are dealt to threads in turn, what one
// thread fetches ahead is what the other needs.
#include <sched.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "multi_state_call.h"

namespace msrnn {
namespace {

constexpr int64_t kBlockSlots = 512;
// This many bytes of keys and values are worth waking a thread for.
constexpr int64_t kBytesPerThread = int64_t{1} << 17;
// A thread has at least this many tickets of attention, if there are as many blocks, to even out
// the end.
constexpr int64_t kTickets = 4;

// Slots [begin, end) of a row and group, whose current attention is sums[slot - begin].
Summary summarize(const State& s, const Policy& policy, int64_t row, int64_t g, int64_t begin,
                  int64_t end, const float* sums) {
  const int64_t offset = s.group(row, g) * s.slots, now = s.seen[row];
  Summary summary;
  for (int64_t slot = begin; slot < end; ++slot) {
    const int64_t position = s.position[offset + slot];
    float score = 0;
    if (position >= 0) {
      if (policy.score == ScoreKind::attention) score = sums[slot - begin];
      if (policy.score == ScoreKind::accumulated) {
        score = s.score[offset + slot] += sums[slot - begin];
      }
    }
    summary.look_at(policy, slot, position, score, now);
  }
  return summary;
}

void wait_for(uint32_t& counter, uint32_t value) {
  std::atomic_ref<uint32_t> shared(counter);
  for (int spins = 0; shared.load(std::memory_order_acquire) != value; ++spins) {
    if (spins >= 1000) sched_yield();
  }
}

bool is_last(uint32_t& counter, uint32_t count) {
  return std::atomic_ref<uint32_t>(counter).fetch_add(1, std::memory_order_acq_rel) + 1 == count;
}

// A row of a batch, and the row of the state that it uses.
struct BatchRow {
  int64_t index, row;
};

class StepRun {
 public:
  StepRun(const TokenStep& step, const std::vector<BatchRow>& rows, int64_t time)
      : step_(step),
        s_(step.state),
        rows_(rows),
        time_(time),
        sharing_(step.query_heads / s_.kv_heads),
        kernels_(kernels_for(s_.dtype)),
        keeps_weights_(step.scores || (step.evicting && step.policy.score != ScoreKind::position)),
        ones_(s_.kv_heads, 1.0f) {
    const int64_t wanted = std::max<int64_t>(1, (s_.slots + kBlockSlots / 2) / kBlockSlots);
    block_ = padded((s_.slots + wanted - 1) / wanted);
    int64_t most = 0;
    for (const auto [index, row] : rows) {
      used_.push_back(s_.used(row));
      most = std::max(most, used_.back());
      bytes_ += 2 * used_.back() * s_.kv_heads * s_.row_bytes();
    }
    blocks_ = (most + block_ - 1) / block_;
    stride_ = blocks_ * block_;
  }

  void run(int64_t most_threads) {
    const auto count = static_cast<int64_t>(rows_.size());
    const int64_t blocks = count * s_.kv_heads * blocks_;
    const int64_t threads = std::clamp<int64_t>(bytes_ / kBytesPerThread, 1, most_threads);
    // If there are enough blocks, neighbouring ones go to one thread: what one of them fetches
    // beyond its end, the next one needs.
    const int64_t row_blocks = s_.kv_heads * blocks_;
    const int64_t together = std::clamp<int64_t>(blocks / (kTickets * threads), 1, blocks_);
    const bool whole_heads = together == blocks_;
    static thread_local Workspace workspace;
    const int64_t parts = whole_heads ? 0 : blocks * sharing_ * kLargestHeadDim;
    const int64_t sums = keeps_weights_ ? count * s_.kv_heads * stride_ : 0;
    const int64_t weights = keeps_weights_ && !whole_heads ? sharing_ * sums : 0;
    float* memory = workspace.floats(parts + sums + weights + 2 * blocks * sharing_);
    parts_ = whole_heads ? nullptr : memory;
    head_sums_ = memory + parts;
    weights_ = weights ? head_sums_ + sums : nullptr;
    maxima_ = head_sums_ + sums + weights;
    factors_ = maxima_ + blocks * sharing_;
    blocks_done_.assign(count * s_.kv_heads, 0);
    heads_done_.assign(count, 0);
    decided_.assign(count, 0);
    summaries_.resize(count * blocks_ * s_.groups);

    for (const auto [index, row] : rows_) {
      for (int64_t g = 0; g < s_.groups; ++g) {
        const int64_t i = s_.group(row, g);
        s_.free[i] = s_.free_slot(row, g);
        s_.position[i * s_.slots + s_.free[i]] = s_.seen[row];
      }
    }
    const int64_t attending = (row_blocks + together - 1) / together;  // tickets of a row
    const int64_t deciding = step_.evicting || step_.scores ? blocks_ : 0;
    const int64_t tickets = count * (attending + deciding);
    std::atomic<int64_t> ticket{0};
    auto work = [&](int64_t, int64_t) {
      FlushDenormals flush(true);
      static thread_local Workspace own;
      const int64_t width = keeps_weights_ && whole_heads ? stride_ : block_;
      const int64_t own_parts = whole_heads ? blocks_ * kLargestHeadDim : 0;
      float* scratch = own.floats(sharing_ * (kLargestHeadDim + width + own_parts) + block_);
      for (int64_t i; (i = ticket.fetch_add(1, std::memory_order_relaxed)) < tickets;) {
        // Row p is attended before row p-1 is decided. The weights of row p-1 are still in cache
        // then, and nobody waits for long.
        const int64_t row = i < attending ? 0 : 1 + (i - attending) / (attending + deciding);
        const int64_t rest = i < attending ? i : (i - attending) % (attending + deciding);
        if (row == count || rest >= attending) {
          decide((row - 1) * blocks_ + rest - (row == count ? 0 : attending), scratch);
          continue;
        }
        const int64_t first = rest * together;
        const int64_t end = std::min(first + together, row_blocks);
        for (int64_t j = first; j < end; ++j) attend(row * row_blocks + j, scratch);
      }
    };
    if (threads <= 1) {
      work(0, 1);
    } else {
      torch::stable::parallel_for(0, threads, 1, work);
    }
  }

 private:
  // How many blocks the r-th row of this run has.
  int64_t blocks_of(int64_t r) const { return (used_[r] + block_ - 1) / block_; }

  void attend(int64_t task, float* scratch) {
    const int64_t index = task / blocks_, j = task % blocks_;  // index: of (row, head)
    const int64_t r = index / s_.kv_heads, head = index % s_.kv_heads;
    const auto [token, row] = rows_[r];
    if (j >= blocks_of(r)) return;
    const int64_t begin = j * block_, end = std::min(begin + block_, used_[r]);
    const int64_t i = s_.group(row, s_.group_of(head)), slot = s_.free[i];
    if (begin <= slot && slot < end) {
      std::memcpy(s_.keys + s_.row_offset(row, head, slot), step_.k.at(token, head, time_),
                  s_.row_bytes());
      std::memcpy(s_.values + s_.row_offset(row, head, slot), step_.v.at(token, head, time_),
                  s_.row_bytes());
    }

    const int64_t* position = s_.position + i * s_.slots;
    // The weights of the head may be shared between threads, belong to this thread, or be those of
    // this block alone.
    float* head_weights =
        weights_ ? weights_ + index * sharing_ * stride_ : scratch + sharing_ * kLargestHeadDim;
    float* weights = keeps_weights_ ? head_weights + begin : head_weights;
    const int64_t stride = keeps_weights_ ? stride_ : block_;
    kernels_.load_queries(step_.q.at(token, head * sharing_, time_), step_.q.head, sharing_,
                          s_.head_dim, scratch);
    int64_t filled = begin;
    auto fill_until = [&](int64_t next) {
      for (int64_t h = 0; h < sharing_ && filled < next; ++h) {
        std::fill(weights + h * stride + filled - begin, weights + h * stride + next - begin,
                  kMinusInfinity);
      }
      filled = next;
    };
    for_runs(position, begin, end, [&](int64_t first, int64_t count) {
      fill_until(first);
      kernels_.logits(scratch, sharing_, rows_of(s_, s_.keys, row, head, first), count, s_.head_dim,
                      step_.scale, weights + first - begin, stride);
      filled = first + count;
    });
    fill_until(begin + padded(end - begin));

    float* maxima = maxima_ + task * sharing_;
    float* sums = factors_ + task * sharing_;
    for (int64_t h = 0; h < sharing_; ++h) {
      kernels_.exponentials(weights + h * stride, padded(end - begin), maxima + h, sums + h);
    }
    const int64_t part_size = sharing_ * kLargestHeadDim;
    float* parts =
        parts_ ? parts_ + index * blocks_ * part_size
               : scratch + sharing_ * (kLargestHeadDim + (keeps_weights_ ? stride_ : block_));
    float* part = parts + j * part_size;
    for (int64_t h = 0; h < sharing_; ++h) {
      std::fill_n(part + h * kLargestHeadDim, padded(s_.head_dim, 32), 0.0f);
    }
    for_runs(position, begin, end, [&](int64_t first, int64_t count) {
      kernels_.accumulate(part, sharing_, weights + first - begin, stride,
                          rows_of(s_, s_.values, row, head, first), count, s_.head_dim);
    });
    if (is_last(blocks_done_[index], static_cast<uint32_t>(blocks_of(r)))) {
      finish_head(index, token, head, used_[r], parts, head_weights);
      std::atomic_ref<uint32_t>(heads_done_[r]).fetch_add(1, std::memory_order_acq_rel);
    }
  }

  // From each block's maximum and sum to its factor in the softmax over all of them.
  void finish_head(int64_t index, int64_t token, int64_t head, int64_t used, const float* parts,
                   const float* weights) {
    const int64_t blocks = (used + block_ - 1) / block_;
    const int64_t first = index * blocks_ * sharing_;
    for (int64_t h = 0; h < sharing_; ++h) {
      const float* maxima = maxima_ + first + h;
      float* factors = factors_ + first + h;
      float largest = maxima[0], total = 0;
      for (int64_t j = 1; j < blocks; ++j) largest = std::max(largest, maxima[j * sharing_]);
      for (int64_t j = 0; j < blocks; ++j) {
        total += factors[j * sharing_] * std::exp(maxima[j * sharing_] - largest);
      }
      for (int64_t j = 0; j < blocks; ++j) {
        factors[j * sharing_] = std::exp(maxima[j * sharing_] - largest) / total;
      }
      kernels_.combine(step_.out.at(token, head * sharing_ + h, time_), parts + h * kLargestHeadDim,
                       sharing_ * kLargestHeadDim, factors, sharing_, blocks, s_.head_dim);
    }
    if (!keeps_weights_) return;
    float* sums = head_sums_ + index * stride_;
    std::fill_n(sums, blocks * block_, 0.0f);
    for (int64_t j = 0; j < blocks; ++j) {
      kernels_.add_weighted(sums + j * block_, factors_ + first + j * sharing_,
                            weights + j * block_, stride_, sharing_,
                            padded(std::min(block_, used - j * block_)));
    }
  }

  void decide(int64_t task, float* sums) {
    const int64_t r = task / blocks_, j = task % blocks_;
    const auto [token, row] = rows_[r];
    if (j >= blocks_of(r)) return;
    wait_for(heads_done_[r], static_cast<uint32_t>(s_.kv_heads));
    const int64_t begin = j * block_, end = std::min(begin + block_, used_[r]);
    const int64_t heads = s_.kv_heads / s_.groups;
    for (int64_t g = 0; g < s_.groups; ++g) {
      if (keeps_weights_) {
        const float* from = head_sums_ + (r * s_.kv_heads + g * heads) * stride_ + begin;
        std::fill_n(sums, padded(end - begin), 0.0f);
        kernels_.add_weighted(sums, ones_.data(), from, stride_, heads, padded(end - begin));
      }
      if (step_.scores) {
        const int64_t* position = s_.position + s_.group(row, g) * s_.slots;
        float* scores = step_.scores + s_.group(token, g) * s_.slots;
        for (int64_t slot = begin; slot < end; ++slot) {
          scores[slot] = position[slot] >= 0 ? sums[slot - begin] : 0.0f;
        }
      }
      if (step_.evicting) {
        summaries_[(r * s_.groups + g) * blocks_ + j] =
            summarize(s_, step_.policy, row, g, begin, end, sums);
      }
    }
    if (!step_.evicting || !is_last(decided_[r], static_cast<uint32_t>(blocks_of(r)))) return;
    for (int64_t g = 0; g < s_.groups; ++g) {
      Summary summary;
      for (int64_t b = 0; b < blocks_of(r); ++b) {
        summary.add(summaries_[(r * s_.groups + g) * blocks_ + b]);
      }
      s_.evict(row, g, summary);
    }
    ++s_.seen[row];
  }

  const TokenStep& step_;
  const State& s_;
  const std::vector<BatchRow>& rows_;
  const int64_t time_;
  const int64_t sharing_;  // query heads of a key-value head
  const AttentionKernels kernels_;
  const bool keeps_weights_;  // whether anybody wants the weights after their block
  int64_t block_, blocks_, stride_, bytes_ = 0;
  float *parts_, *head_sums_, *weights_;
  float *maxima_, *factors_;  // of each block and query head; factors: first its sum
  const std::vector<float> ones_;
  std::vector<int64_t> used_;  // slots of each row
  std::vector<uint32_t> blocks_done_, heads_done_, decided_;
  std::vector<Summary> summaries_;
};

// The rows of a batch that use one of the state.
std::vector<BatchRow> rows_in_use(const RowIndex& rows, int64_t batch) {
  std::vector<BatchRow> used;
  used.reserve(batch);
  for (int64_t b = 0; b < batch; ++b) {
    if (const int64_t row = rows.of(b); row >= 0) used.push_back({b, row});
  }
  return used;
}

struct Cpu {
  static Tensor readable(const Tensor& x) { return packed(x); }
  static void run(const TokenStep& step, const Tensor&) {
    for (int64_t b = 0; step.rows.data && b < step.batch; ++b) {
      if (step.rows.of(b) >= 0) continue;
      for (int64_t h = 0; h < step.query_heads; ++h) {
        std::memset(step.out.at(b, h, 0), 0, step.state.row_bytes());
      }
    }
    const std::vector<BatchRow> rows = rows_in_use(step.rows, step.batch);
    if (!rows.empty()) StepRun(step, rows, 0).run(torch::stable::get_num_threads());
  }
  static void run(const TokenStep& step, const TokenSequence& sequence, const Tensor&) {
    const int64_t batch = step.state.batch, threads = torch::stable::get_num_threads();
    // Threads that have whole rows never wait for each other; those that share one do at each
    // token.
    if (batch < threads || 4 * batch < 3 * threads * ((batch + threads - 1) / threads)) {
      run_rows(step, sequence, 0, batch, threads);
      return;
    }
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      for (int64_t row; (row = next.fetch_add(1, std::memory_order_relaxed)) < batch;) {
        run_rows(step, sequence, row, row + 1, 1);
      }
    });
  }
  // All tokens of rows [begin, end).
  static void run_rows(const TokenStep& step, const TokenSequence& sequence, int64_t begin,
                       int64_t end, int64_t threads) {
    const State& s = step.state;
    const int64_t time = sequence.time;
    std::vector<BatchRow> rows;
    for (int64_t t = 0; t < time; ++t) {
      rows.clear();
      for (int64_t row = begin; row < end; ++row) {
        const bool valid = !sequence.valid || sequence.valid[row * time + t];
        if (valid) {
          rows.push_back({row, row});
          sequence.times[row * time + s.seen[row]] = t;
        }
        for (int64_t g = 0; g < s.groups; ++g) {
          sequence.expiry[s.group(row, g) * time + t] = valid ? time : t;
        }
      }
      if (rows.empty()) continue;
      StepRun(step, rows, t).run(threads);
      for (const auto [index, row] : rows) {
        for (int64_t g = 0; g < s.groups; ++g) {
          const int64_t i = s.group(row, g), evicted = s.last_evicted[i];
          if (evicted >= 0) {
            sequence.expiry[i * time + sequence.times[row * time + evicted]] = t + 1;
          }
        }
      }
    }
  }
  static void evict(const State& s, const RowIndex& index, const Policy& policy,
                    const Tensor& scores) {
    const auto* sums = memory_of<const float>(scores);
    for (const auto [b, row] : rows_in_use(index, scores.size(0))) {
      bool waiting = false;
      for (int64_t g = 0; g < s.groups; ++g) {
        const int64_t i = s.group(row, g);
        if (s.position[i * s.slots + s.free_slot(row, g)] < 0) continue;
        waiting = true;
        const float* of_group = sums + s.group(b, g) * s.slots;
        s.evict(row, g, summarize(s, policy, row, g, 0, s.used(row), of_group));
      }
      if (waiting) ++s.seen[row];
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(msrnn_ops, CPU, m) { register_multi_state<Cpu>(m); }

}  // namespace msrnn
