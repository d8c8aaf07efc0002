// Multi-state attention on the CPU: one token for every row, attended and evicted in one launch.
//
// The slots of a row are cut into blocks of about kBlockSlots, by their number alone, so that every
// sum has one order whatever the number of threads. Tasks are taken in order from one ticket:
//
//   attend   a block of one key-value head, for all query heads that share it: logits of its keys,
//            exponentials against the block's own maximum, weighted sum of its values. Whoever
//            finishes the last block of a head rescales the blocks to one softmax, writes the
//            output, and sums the weights over the query heads.
//   decide   a block of a row, when all its heads are done: sum of the weights over heads, the
//            policy's scores, the block's candidate for eviction. Whoever finishes the last one
//            marks the victim free.
//
// A task waits only for tasks of lower tickets, which running threads hold: nothing can dead-lock.
//
// Traffic: keys and values once, and 4 bytes a slot and key-value head of weights out and in. Where
// there are many heads, one thread takes a whole one and its weights stay in that thread's cache;
// a head that threads share costs 4 bytes a slot and query head more (3 % of a bfloat16 state at 4
// query heads a key-value head of 128). One slot is written. Slots that no token has reached yet
// are not looked at.
//
// Measured, TOVA, 4 rows of 8192 slots, 8 key-value heads of 128, two threads: in float32 0.79, in
// bfloat16 0.72 of the rate at which the same bytes are read. Rejected: weights of all heads
// written to shared memory (Window was 10 % faster than TOVA in bfloat16, now 3 to 6 %);
// neighbouring blocks dealt to threads in turn (what one fetches ahead, the other needs).
#include "multi_state.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "../common.h"
#include "../eviction.h"
#include "runtime.h"

namespace msrnn {
namespace {

constexpr int64_t kBlockSlots = 512;
// A thread is worth waking for this many bytes of keys and values.
constexpr int64_t kBytesPerThread = int64_t{1} << 17;
// Tickets of attention a thread, at least, where there are as many blocks: they even out the end.
constexpr int64_t kTickets = 4;
// Of a prompt whose attention is accumulated: this many parts, each with sums of its own, and rows
// of logits that one pass over the keys serves.
constexpr int64_t kPromptParts = 8;
constexpr int64_t kPromptLogits = 16;

constexpr int64_t padded(int64_t count, int64_t to = 16) { return (count + to - 1) / to * to; }

AttentionKernels kernels_for(DType dtype) {
#if defined(__x86_64__)
  if (capability() >= Capability::avx512_bf16) return attention_kernels_avx512_bf16(dtype);
  if (capability() >= Capability::avx512) return attention_kernels_avx512(dtype);
  if (capability() >= Capability::avx2) return attention_kernels_avx2(dtype);
#endif
  return attention_kernels_baseline(dtype);
}

// Memory that a thread keeps from call to call: fresh pages would cost more than a small step.
class Workspace {
 public:
  ~Workspace() { ::operator delete(data_, kLine); }
  float* floats(int64_t count) {
    if (count > size_) {
      ::operator delete(data_, kLine);
      data_ = nullptr;
      size_ = 0;
      data_ = ::operator new(count * sizeof(float), kLine);
      size_ = count;
    }
    return static_cast<float*>(data_);
  }

 private:
  static constexpr std::align_val_t kLine{64};
  void* data_ = nullptr;
  int64_t size_ = 0;
};

struct State {
  char *keys, *values;  // (batch, kv_heads, slots, head_dim)
  int64_t* position;    // (batch, groups, slots); -1: empty
  float* score;         // likewise, or null
  int64_t* free;        // (batch, groups): the slot of the next token
  int64_t* last_evicted;
  int64_t* seen;  // (batch)
  int64_t batch, kv_heads, groups, slots, head_dim;
  DType dtype;

  int64_t row_bytes() const { return head_dim * size_of(dtype); }
  Rows rows(char* base, int64_t row, int64_t head, int64_t slot) const {
    return {base + ((row * kv_heads + head) * slots + slot) * row_bytes(), row_bytes()};
  }
  int64_t group_of(int64_t head) const { return groups == 1 ? 0 : head; }
  int64_t group(int64_t row, int64_t g) const { return row * groups + g; }
  // Slots that any token has reached: the lowest empty one is filled first.
  int64_t used(int64_t row) const {
    return seen[row] >= slots ? slots : std::max<int64_t>(seen[row], 0) + 1;
  }
};

// (batch, heads, time, head_dim) or, with time = 1, (batch, heads, head_dim); bytes.
struct Heads {
  char* data;
  int64_t row, head, time;

  char* at(int64_t b, int64_t h, int64_t t) const { return data + b * row + h * head + t * time; }
};

// Calls f(begin, count) for every run of occupied columns in [begin, end).
template <class F>
void for_runs(const int64_t* position, int64_t begin, int64_t end, F f) {
  int64_t any_empty = 0;  // its sign
  for (int64_t i = begin; i < end; ++i) any_empty |= position[i];
  if (any_empty >= 0) {
    if (begin < end) f(begin, end - begin);
    return;
  }
  for (int64_t i = begin; i < end;) {
    if (position[i] < 0) {
      ++i;
      continue;
    }
    int64_t last = i + 1;
    while (last < end && position[last] >= 0) ++last;
    f(i, last - i);
    i = last;
  }
}

constexpr float kMinusInfinity = -__builtin_inff();

// What a block, or a row, knows of its states.
struct Summary {
  Candidate victim{__builtin_inff(), 0, -1};
  int64_t occupied = 0;
  int64_t first_empty = -1;

  void add(const Summary& next) {  // of higher slots
    if (goes_before(next.victim, victim)) victim = next.victim;
    occupied += next.occupied;
    if (first_empty < 0) first_empty = next.first_empty;
  }
};

// Slots [begin, end) of a row and group, whose current attention is sums[slot - begin].
Summary summarize(const State& s, const Policy& policy, int64_t row, int64_t g, int64_t begin,
                  int64_t end, const float* sums) {
  const int64_t offset = s.group(row, g) * s.slots, now = s.seen[row];
  Summary found;
  for (int64_t slot = begin; slot < end; ++slot) {
    const int64_t position = s.position[offset + slot];
    if (position < 0) {
      if (found.first_empty < 0) found.first_empty = slot;
      continue;
    }
    ++found.occupied;
    float score = 0;
    if (policy.score == ScoreKind::attention) score = sums[slot - begin];
    if (policy.score == ScoreKind::accumulated) {
      score = s.score[offset + slot] += sums[slot - begin];
    }
    if (score > found.victim.score || is_protected(policy, position, now)) continue;
    const Candidate candidate{score, position, slot};
    if (goes_before(candidate, found.victim)) found.victim = candidate;
  }
  return found;
}

void evict_one(const State& s, int64_t row, int64_t g, const Summary& found) {
  const int64_t i = s.group(row, g), offset = i * s.slots;
  s.last_evicted[i] = -1;
  if (found.occupied == s.slots && found.victim.slot >= 0) {
    s.last_evicted[i] = found.victim.position;
    s.free[i] = found.victim.slot;
    s.position[offset + found.victim.slot] = -1;
    if (s.score) s.score[offset + found.victim.slot] = 0;
  } else {
    s.free[i] = found.first_empty >= 0 ? found.first_empty : s.used(row);
  }
}

// One token of the rows in `rows`: attention, and with `evicting` the policy.
struct Step {
  State state;
  Policy policy;
  float scale;
  bool evicting;
  int64_t query_heads;
  Heads q, k, v, out;
  float* scores;  // (batch, groups, slots), or null
};

void wait_for(const uint32_t& counter, uint32_t value) {
  std::atomic_ref<const uint32_t> shared(counter);
  for (int spins = 0; shared.load(std::memory_order_acquire) != value; ++spins) {
    if (spins >= 1000) sched_yield();
  }
}

bool is_last(uint32_t& counter, uint32_t count) {
  return std::atomic_ref<uint32_t>(counter).fetch_add(1, std::memory_order_acq_rel) + 1 == count;
}

class StepRun {
 public:
  StepRun(const Step& step, const std::vector<int64_t>& rows, int64_t time)
      : step_(step),
        s_(step.state),
        rows_(rows),
        time_(time),
        shared_(step.query_heads / s_.kv_heads),
        kernels_(kernels_for(s_.dtype)),
        keeping_(step.scores || (step.evicting && step.policy.score != ScoreKind::position)),
        ones_(s_.kv_heads, 1.0f) {
    const int64_t wanted = std::max<int64_t>(1, (s_.slots + kBlockSlots / 2) / kBlockSlots);
    block_ = padded((s_.slots + wanted - 1) / wanted);
    int64_t most = 0;
    for (const int64_t row : rows) {
      used_.push_back(s_.used(row));
      most = std::max(most, used_.back());
      bytes_ += 2 * used_.back() * s_.kv_heads * s_.row_bytes();
    }
    blocks_ = (most + block_ - 1) / block_;
    stride_ = blocks_ * block_;
  }

  void run() {
    const auto count = static_cast<int64_t>(rows_.size());
    const int64_t blocks = count * s_.kv_heads * blocks_;
    const int64_t threads =
        std::clamp<int64_t>(bytes_ / kBytesPerThread, 1, torch::stable::get_num_threads());
    // Neighbouring blocks go to one thread where there are enough of them: what one fetches beyond
    // its end, the next one needs.
    const int64_t row_blocks = s_.kv_heads * blocks_;
    const int64_t together = std::clamp<int64_t>(blocks / (kTickets * threads), 1, blocks_);
    const bool whole_heads = together == blocks_;
    static thread_local Workspace workspace;
    const int64_t parts = whole_heads ? 0 : blocks * shared_ * kLargestHeadDim;
    const int64_t sums = keeping_ ? count * s_.kv_heads * stride_ : 0;
    const int64_t weights = keeping_ && !whole_heads ? shared_ * sums : 0;
    float* memory = workspace.floats(parts + sums + weights + 2 * blocks * shared_);
    parts_ = whole_heads ? nullptr : memory;
    head_sums_ = memory + parts;
    weights_ = weights ? head_sums_ + sums : nullptr;
    maxima_ = head_sums_ + sums + weights;
    factors_ = maxima_ + blocks * shared_;
    blocks_done_.assign(count * s_.kv_heads, 0);
    heads_done_.assign(count, 0);
    decided_.assign(count, 0);
    summaries_.resize(count * blocks_ * s_.groups);

    for (const int64_t row : rows_) {
      for (int64_t g = 0; g < s_.groups; ++g) {
        const int64_t i = s_.group(row, g);
        s_.free[i] = std::clamp<int64_t>(s_.free[i], 0, s_.slots - 1);
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
      const int64_t width = keeping_ && whole_heads ? stride_ : block_;
      const int64_t own_parts = whole_heads ? blocks_ * kLargestHeadDim : 0;
      float* scratch = own.floats(shared_ * (kLargestHeadDim + width + own_parts) + block_);
      for (int64_t i; (i = ticket.fetch_add(1, std::memory_order_relaxed)) < tickets;) {
        // Row p is attended before row p-1 is decided: its weights are still in cache then, and
        // nobody waits for long.
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
  // Of the r-th row of this run.
  int64_t blocks_of(int64_t r) const { return (used_[r] + block_ - 1) / block_; }

  void attend(int64_t task, float* scratch) {
    const int64_t index = task / blocks_, j = task % blocks_;  // index: of (row, head)
    const int64_t r = index / s_.kv_heads, row = rows_[r], head = index % s_.kv_heads;
    if (j >= blocks_of(r)) return;
    const int64_t begin = j * block_, end = std::min(begin + block_, used_[r]);
    const int64_t i = s_.group(row, s_.group_of(head)), slot = s_.free[i];
    if (begin <= slot && slot < end) {
      std::memcpy(const_cast<char*>(s_.rows(s_.keys, row, head, slot).data),
                  step_.k.at(row, head, time_), s_.row_bytes());
      std::memcpy(const_cast<char*>(s_.rows(s_.values, row, head, slot).data),
                  step_.v.at(row, head, time_), s_.row_bytes());
    }

    const int64_t* position = s_.position + i * s_.slots;
    // Weights of the head: shared between threads, this thread's own, or of this block alone.
    float* kept =
        weights_ ? weights_ + index * shared_ * stride_ : scratch + shared_ * kLargestHeadDim;
    float* weights = keeping_ ? kept + begin : kept;
    const int64_t stride = keeping_ ? stride_ : block_;
    kernels_.load_queries(step_.q.at(row, head * shared_, time_), step_.q.head, shared_,
                          s_.head_dim, scratch);
    int64_t filled = begin;
    auto fill_until = [&](int64_t next) {
      for (int64_t h = 0; h < shared_ && filled < next; ++h) {
        std::fill(weights + h * stride + filled - begin, weights + h * stride + next - begin,
                  kMinusInfinity);
      }
      filled = next;
    };
    for_runs(position, begin, end, [&](int64_t first, int64_t count) {
      fill_until(first);
      kernels_.logits(scratch, shared_, s_.rows(s_.keys, row, head, first), count, s_.head_dim,
                      step_.scale, weights + first - begin, stride);
      filled = first + count;
    });
    fill_until(begin + padded(end - begin));

    float* maxima = maxima_ + task * shared_;
    float* sums = factors_ + task * shared_;
    for (int64_t h = 0; h < shared_; ++h) {
      kernels_.exponentials(weights + h * stride, padded(end - begin), maxima + h, sums + h);
    }
    const int64_t part_size = shared_ * kLargestHeadDim;
    float* parts = parts_ ? parts_ + index * blocks_ * part_size
                          : scratch + shared_ * (kLargestHeadDim + (keeping_ ? stride_ : block_));
    float* part = parts + j * part_size;
    for (int64_t h = 0; h < shared_; ++h) {
      std::fill_n(part + h * kLargestHeadDim, padded(s_.head_dim, 32), 0.0f);
    }
    for_runs(position, begin, end, [&](int64_t first, int64_t count) {
      kernels_.accumulate(part, shared_, weights + first - begin, stride,
                          s_.rows(s_.values, row, head, first), count, s_.head_dim);
    });
    if (is_last(blocks_done_[index], static_cast<uint32_t>(blocks_of(r)))) {
      finish_head(index, row, head, used_[r], parts, kept);
      std::atomic_ref<uint32_t>(heads_done_[r]).fetch_add(1, std::memory_order_acq_rel);
    }
  }

  // From each block's maximum and sum to its factor in the softmax over all of them.
  void finish_head(int64_t index, int64_t row, int64_t head, int64_t used, const float* parts,
                   const float* weights) {
    const int64_t blocks = (used + block_ - 1) / block_;
    const int64_t first = index * blocks_ * shared_;
    for (int64_t h = 0; h < shared_; ++h) {
      const float* maxima = maxima_ + first + h;
      float* factors = factors_ + first + h;
      float largest = maxima[0], total = 0;
      for (int64_t j = 1; j < blocks; ++j) largest = std::max(largest, maxima[j * shared_]);
      for (int64_t j = 0; j < blocks; ++j) {
        total += factors[j * shared_] * std::exp(maxima[j * shared_] - largest);
      }
      for (int64_t j = 0; j < blocks; ++j) {
        factors[j * shared_] = std::exp(maxima[j * shared_] - largest) / total;
      }
      kernels_.combine(step_.out.at(row, head * shared_ + h, time_), parts + h * kLargestHeadDim,
                       shared_ * kLargestHeadDim, factors, shared_, blocks, s_.head_dim);
    }
    if (!keeping_) return;
    float* sums = head_sums_ + index * stride_;
    std::fill_n(sums, blocks * block_, 0.0f);
    for (int64_t j = 0; j < blocks; ++j) {
      kernels_.add_weighted(sums + j * block_, factors_ + first + j * shared_, weights + j * block_,
                            stride_, shared_, padded(std::min(block_, used - j * block_)));
    }
  }

  void decide(int64_t task, float* sums) {
    const int64_t r = task / blocks_, j = task % blocks_, row = rows_[r];
    if (j >= blocks_of(r)) return;
    wait_for(heads_done_[r], static_cast<uint32_t>(s_.kv_heads));
    const int64_t begin = j * block_, end = std::min(begin + block_, used_[r]);
    const int64_t heads = s_.kv_heads / s_.groups;
    for (int64_t g = 0; g < s_.groups; ++g) {
      if (keeping_) {
        const float* from = head_sums_ + (r * s_.kv_heads + g * heads) * stride_ + begin;
        std::fill_n(sums, padded(end - begin), 0.0f);
        kernels_.add_weighted(sums, ones_.data(), from, stride_, heads, padded(end - begin));
      }
      if (step_.scores) {
        const int64_t offset = s_.group(row, g) * s_.slots;
        for (int64_t slot = begin; slot < end; ++slot) {
          const bool occupied = s_.position[offset + slot] >= 0;
          step_.scores[offset + slot] = occupied ? sums[slot - begin] : 0.0f;
        }
      }
      if (step_.evicting) {
        summaries_[(r * s_.groups + g) * blocks_ + j] =
            summarize(s_, step_.policy, row, g, begin, end, sums);
      }
    }
    if (!step_.evicting || !is_last(decided_[r], static_cast<uint32_t>(blocks_of(r)))) return;
    for (int64_t g = 0; g < s_.groups; ++g) {
      Summary found;
      for (int64_t b = 0; b < blocks_of(r); ++b) {
        found.add(summaries_[(r * s_.groups + g) * blocks_ + b]);
      }
      evict_one(s_, row, g, found);
    }
    ++s_.seen[row];
  }

  const Step& step_;
  const State& s_;
  const std::vector<int64_t>& rows_;
  const int64_t time_;
  const int64_t shared_;  // query heads of a key-value head
  const AttentionKernels kernels_;
  const bool keeping_;  // the weights are wanted after their block
  int64_t block_, blocks_, stride_, bytes_ = 0;
  float *parts_, *head_sums_, *weights_;
  float *maxima_, *factors_;  // of each block and query head; factors: first its sum
  const std::vector<float> ones_;
  std::vector<int64_t> used_;  // slots of each row
  std::vector<uint32_t> blocks_done_, heads_done_, decided_;
  std::vector<Summary> summaries_;
};

// The attention of a prompt's queries to every column: the slots, then the prompt's own tokens.
struct Prompt {
  State state;
  Policy policy;
  float scale;
  int64_t query_heads, time;
  Heads q, k, v;
  const bool* valid;  // (batch, time), or null: all
};

class PromptRow {
 public:
  PromptRow(const Prompt& prompt, int64_t row)
      : p_(prompt),
        s_(prompt.state),
        row_(row),
        shared_(prompt.query_heads / s_.kv_heads),
        columns_(s_.slots + prompt.time),
        kernels_(kernels_for(s_.dtype)) {
    for (int64_t t = 0; t < p_.time; ++t) {
      if (!p_.valid || p_.valid[row * p_.time + t]) times_.push_back(t);
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
      position[std::clamp<int64_t>(s_.free[s_.group(row_, g)], 0, s_.slots - 1)] = -1;  // replaced
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
    const int64_t together = std::max<int64_t>(1, kPromptLogits / shared_);
    const int64_t stride = padded(columns_);
    static thread_local Workspace own;
    float* queries = own.floats(together * shared_ * (kLargestHeadDim + stride + 1));
    float* logits = queries + together * shared_ * kLargestHeadDim;
    float* factors = logits + together * shared_ * stride;
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
    const int64_t stride = padded(columns_), heads = count * shared_;
    const int64_t seen = s_.slots + times_[first + count - 1] + 1;  // columns of the last of them
    const int64_t* position = position_.data() + s_.group_of(head) * columns_;
    for (int64_t i = 0; i < count; ++i) {
      kernels_.load_queries(p_.q.at(row_, head * shared_, times_[first + i]), p_.q.head, shared_,
                            s_.head_dim, queries + i * shared_ * kLargestHeadDim);
    }
    for (int64_t h = 0; h < heads; ++h) {
      std::fill_n(logits + h * stride, padded(seen), kMinusInfinity);
    }
    auto attend = [&](Rows rows, int64_t column, int64_t n) {
      kernels_.logits(queries, heads, rows, n, s_.head_dim, p_.scale, logits + column, stride);
    };
    for_runs(position, 0, s_.slots,
             [&](int64_t slot, int64_t n) { attend(s_.rows(s_.keys, row_, head, slot), slot, n); });
    for_runs(position, s_.slots, seen, [&](int64_t column, int64_t n) {
      attend({p_.k.at(row_, head, column - s_.slots), p_.k.time}, column, n);
    });
    for (int64_t h = 0; h < heads; ++h) {
      float* row = logits + h * stride;
      std::fill(row + s_.slots + times_[first + h / shared_] + 1, row + seen, kMinusInfinity);
      float maximum, sum;
      kernels_.exponentials(row, padded(seen), &maximum, &sum);
      factors[h] = 1 / sum;
      if (sum == sum) continue;
      // NaN goes to the columns that this query sees, and not by way of 0 * NaN to later ones.
      const int64_t own = s_.slots + times_[first + h / shared_] + 1;
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
      std::memcpy(const_cast<char*>(s_.rows(s_.keys, row_, head, slot).data),
                  p_.k.at(row_, head, t), s_.row_bytes());
      std::memcpy(const_cast<char*>(s_.rows(s_.values, row_, head, slot).data),
                  p_.v.at(row_, head, t), s_.row_bytes());
    }
  }

  const Prompt& p_;
  const State& s_;
  const int64_t row_;
  const int64_t shared_;
  const int64_t columns_;
  const AttentionKernels kernels_;
  std::vector<int64_t> times_;     // of the valid tokens
  std::vector<int64_t> position_;  // (groups, columns); -1: nothing there
  std::vector<float> scores_;      // (groups, columns), or empty
};

// Gradients of causal attention in which key j is visible to queries j <= t < expiry[j], for one
// key-value head of one row. It walks the tokens as the forward pass did, with the visible keys,
// their values and the gradients of both in slots: work and memory follow the slots, not T.
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

Heads heads_of(const Tensor& x) {
  const int64_t size = size_of(dtype_of(x));
  const int64_t time = x.dim() == 4 ? x.stride(2) * size : 0;
  return {static_cast<char*>(x.data_ptr()), x.stride(0) * size, x.stride(1) * size, time};
}

// Elements of head_dim adjacent.
Tensor packed(const Tensor& x) {
  return x.size(-1) == 1 || x.stride(-1) == 1 ? x : torch::stable::contiguous(x);
}

void check_heads(const Tensor& q, const Tensor& k, const Tensor& v, int64_t dimensions) {
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

void check_contiguous(const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType type) {
  STD_TORCH_CHECK(x.dim() == static_cast<int64_t>(sizes.size()) && x.is_contiguous() &&
                      x.scalar_type() == type &&
                      std::equal(sizes.begin(), sizes.end(), x.sizes().begin()),
                  "expected a contiguous state of one shape");
}

// The positions of a state without its keys and values.
State marks_of(const Tensor& position, const Tensor& score, const Tensor& free, const Tensor& seen,
               const Tensor& last_evicted, ScoreKind kind) {
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
  s.position = static_cast<int64_t*>(position.data_ptr());
  s.score = scored ? static_cast<float*>(score.data_ptr()) : nullptr;
  s.free = static_cast<int64_t*>(free.data_ptr());
  s.seen = static_cast<int64_t*>(seen.data_ptr());
  s.last_evicted = static_cast<int64_t*>(last_evicted.data_ptr());
  return s;
}

State state_of(const Tensor& k, const Tensor& keys, const Tensor& values, State s) {
  s.kv_heads = k.size(1);
  s.head_dim = k.size(k.dim() - 1);
  s.dtype = dtype_of(k);
  STD_TORCH_CHECK(k.size(0) == s.batch && (s.groups == 1 || s.groups == s.kv_heads),
                  "expected a state of the batch and heads of k");
  for (const Tensor* x : {&keys, &values}) {
    check_contiguous(*x, {s.batch, s.kv_heads, s.slots, s.head_dim}, k.scalar_type());
  }
  s.keys = static_cast<char*>(keys.data_ptr());
  s.values = static_cast<char*>(values.data_ptr());
  return s;
}

Policy policy_of(int64_t score, int64_t sinks, int64_t recent) {
  STD_TORCH_CHECK(0 <= score && score <= 2 && sinks >= 0 && recent >= 0, "expected a policy");
  return {static_cast<ScoreKind>(score), sinks, recent};
}

std::vector<int64_t> all_rows(int64_t batch) {
  std::vector<int64_t> rows(batch);
  for (int64_t b = 0; b < batch; ++b) rows[b] = b;
  return rows;
}

const bool* mask_of(const OptionalTensor& valid, const Tensor& q) {
  if (!valid) return nullptr;
  check_contiguous(*valid, {q.size(0), q.size(2)}, ScalarType::Bool);
  return static_cast<const bool*>(valid->data_ptr());
}

Tensor attend_evict(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& keys,
                    const Tensor& values, const Tensor& position, const Tensor& score,
                    const Tensor& free, const Tensor& seen, const Tensor& last_evicted,
                    int64_t kind, int64_t sinks, int64_t recent, double scale) {
  check_heads(q_in, k_in, v_in, 3);
  const Policy policy = policy_of(kind, sinks, recent);
  const Tensor q = packed(q_in), k = packed(k_in), v = packed(v_in);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  const State marks = marks_of(position, score, free, seen, last_evicted, policy.score);
  const Step step{state_of(k, keys, values, marks),
                  policy,
                  static_cast<float>(scale),
                  true,
                  q.size(1),
                  heads_of(q),
                  heads_of(k),
                  heads_of(v),
                  heads_of(out),
                  nullptr};
  if (step.state.batch > 0) StepRun(step, all_rows(step.state.batch), 0).run();
  return out;
}

std::tuple<Tensor, Tensor> attend_scores(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                         const Tensor& keys, const Tensor& values,
                                         const Tensor& position, const Tensor& free,
                                         const Tensor& seen, double scale) {
  check_heads(q_in, k_in, v_in, 3);
  const Tensor q = packed(q_in), k = packed(k_in), v = packed(v_in);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor scores = torch::stable::new_zeros(position, position.sizes(), ScalarType::Float);
  const Tensor none = torch::stable::new_empty(position, {position.size(0), position.size(1), 0},
                                               ScalarType::Float);
  const State marks = marks_of(position, none, free, seen, free, ScoreKind::attention);
  const Step step{state_of(k, keys, values, marks),
                  {},
                  static_cast<float>(scale),
                  false,
                  q.size(1),
                  heads_of(q),
                  heads_of(k),
                  heads_of(v),
                  heads_of(out),
                  static_cast<float*>(scores.data_ptr())};
  if (step.state.batch > 0) StepRun(step, all_rows(step.state.batch), 0).run();
  return {out, scores};
}

void evict(const Tensor& scores, const Tensor& position, const Tensor& score, const Tensor& free,
           const Tensor& seen, const Tensor& last_evicted, int64_t kind, int64_t sinks,
           int64_t recent) {
  const Policy policy = policy_of(kind, sinks, recent);
  const State s = marks_of(position, score, free, seen, last_evicted, policy.score);
  check_contiguous(scores, {s.batch, s.groups, s.slots}, ScalarType::Float);
  const auto* sums = static_cast<const float*>(scores.data_ptr());
  for (int64_t row = 0; row < s.batch; ++row) {
    bool waiting = false;
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t i = s.group(row, g);
      const int64_t slot = std::clamp<int64_t>(s.free[i], 0, s.slots - 1);
      if (s.position[i * s.slots + slot] < 0) continue;
      waiting = true;
      evict_one(s, row, g, summarize(s, policy, row, g, 0, s.used(row), sums + i * s.slots));
    }
    if (waiting) ++s.seen[row];
  }
}

void store_prompt(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, OptionalTensor valid,
                  const Tensor& keys, const Tensor& values, const Tensor& position,
                  const Tensor& score, const Tensor& free, const Tensor& seen,
                  const Tensor& last_evicted, int64_t kind, int64_t sinks, int64_t recent,
                  double scale) {
  check_heads(q_in, k_in, v_in, 4);
  const Policy policy = policy_of(kind, sinks, recent);
  const Tensor q = packed(q_in), k = packed(k_in), v = packed(v_in);
  const State marks = marks_of(position, score, free, seen, last_evicted, policy.score);
  const Prompt prompt{state_of(k, keys, values, marks),
                      policy,
                      static_cast<float>(scale),
                      q.size(1),
                      q.size(2),
                      heads_of(q),
                      heads_of(k),
                      heads_of(v),
                      mask_of(valid, q)};
  for (int64_t row = 0; row < prompt.state.batch; ++row) PromptRow(prompt, row).run();
}

std::tuple<Tensor, Tensor> attend_sequence(const Tensor& q_in, const Tensor& k_in,
                                           const Tensor& v_in, OptionalTensor valid, int64_t kept,
                                           bool per_head, int64_t kind, int64_t sinks,
                                           int64_t recent, double scale) {
  check_heads(q_in, k_in, v_in, 4);
  STD_TORCH_CHECK(kept >= 1, "expected at least one slot");
  const Policy policy = policy_of(kind, sinks, recent);
  const Tensor q = packed(q_in), k = packed(k_in), v = packed(v_in);
  const int64_t batch = q.size(0), time = q.size(2), kv_heads = k.size(1), head_dim = q.size(3);
  const int64_t groups = per_head ? kv_heads : 1;
  Tensor out = torch::stable::new_zeros(q, q.sizes());
  Tensor expiry = torch::stable::new_empty(q, {batch, groups, time}, ScalarType::Long);
  auto* gone = static_cast<int64_t*>(expiry.data_ptr());
  std::fill_n(gone, batch * groups * time, time);
  if (batch == 0 || time == 0) return {out, expiry};

  // A state of its own; never more slots than tokens.
  const int64_t slots = std::min(kept, time) + 1;
  Tensor keys = torch::stable::new_empty(k, {batch, kv_heads, slots, head_dim});
  Tensor values = torch::stable::new_empty(k, {batch, kv_heads, slots, head_dim});
  std::vector<int64_t> position(batch * groups * slots, -1), free(batch * groups, 0);
  std::vector<int64_t> last_evicted(batch * groups, -1), seen(batch, 0);
  std::vector<float> score(batch * groups * slots, 0.0f);
  const State state{static_cast<char*>(keys.data_ptr()),
                    static_cast<char*>(values.data_ptr()),
                    position.data(),
                    policy.score == ScoreKind::accumulated ? score.data() : nullptr,
                    free.data(),
                    last_evicted.data(),
                    seen.data(),
                    batch,
                    kv_heads,
                    groups,
                    slots,
                    head_dim,
                    dtype_of(k)};
  const Step step{state,       policy,      static_cast<float>(scale),
                  true,        q.size(1),   heads_of(q),
                  heads_of(k), heads_of(v), heads_of(out),
                  nullptr};
  const bool* mask = mask_of(valid, q);
  std::vector<std::vector<int64_t>> times(batch);  // of each row's positions
  std::vector<int64_t> rows;
  for (int64_t t = 0; t < time; ++t) {
    rows.clear();
    for (int64_t b = 0; b < batch; ++b) {
      if (!mask || mask[b * time + t]) {
        rows.push_back(b);
        times[b].push_back(t);
      } else {
        for (int64_t g = 0; g < groups; ++g) gone[(b * groups + g) * time + t] = t;
      }
    }
    if (rows.empty()) continue;
    StepRun(step, rows, t).run();
    for (const int64_t b : rows) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t evicted = last_evicted[b * groups + g];
        if (evicted >= 0) gone[(b * groups + g) * time + times[b][evicted]] = t + 1;
      }
    }
  }
  return {out, expiry};
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
  const auto* gone = static_cast<const int64_t*>(expiry.data_ptr());
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
  m.impl("attend_evict", TORCH_BOX(&attend_evict));
  m.impl("attend_scores", TORCH_BOX(&attend_scores));
  m.impl("evict", TORCH_BOX(&evict));
  m.impl("store_prompt", TORCH_BOX(&store_prompt));
  m.impl("attend_sequence", TORCH_BOX(&attend_sequence));
  m.impl("attend_sequence_backward", TORCH_BOX(&attend_sequence_backward));
}

}  // namespace msrnn
