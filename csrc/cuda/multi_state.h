// The CUDA step of multi-state attention as the host sees it: the plan of a call, which is a pure
// function of its shape, and the call itself, with raw pointers and no torch. step.cuh has the
// kernel.
#pragma once

#include <cstddef>
#include <type_traits>

#include "../multi_state.h"

namespace msrnn {

constexpr int kStepThreads = 256;
constexpr int kStepWarps = kStepThreads / 32;
// A block with so few units of work that its warps share them adds up its output in shared memory,
// which then holds at most this many numbers.
constexpr int64_t kStepStaged = 4096;

// How a row is cut up: a block takes `block_slots` neighbouring slots of all heads, so that their
// attention weights, which every head adds to a slot's score, never leave it.
//
// Results depend on the plan, so the plan depends on the shape alone, never on the GPU.
struct StepPlan {
  int64_t block_slots, splits;  // splits: blocks of a row
  // Whether the blocks of a row may wait for each other: there are few enough of them to be
  // resident at once on a large GPU. On one where they are not (step_fits), two launches do the
  // same.
  bool one_launch;

  // Slots that a block has room for.
  int64_t padded_slots() const { return padded(block_slots, 32); }
};

inline StepPlan step_plan(int64_t rows, int64_t query_heads, int64_t kv_heads, int64_t slots,
                          int64_t head_dim, int64_t element_size) {
  // What a block keeps must fit the 64 KiB of the smallest GPU. With fewer than 32 slots it would
  // spend its time on the exchange.
  constexpr int64_t kProcessors = 132, kFewest = 32;  // multiprocessors of a large GPU
  const int64_t room = (int64_t{12} * 1024 - kStepStaged) / query_heads / kFewest * kFewest;
  const int64_t most = room > kFewest ? room : kFewest;
  const int64_t least_splits = (slots + most - 1) / most;
  const int64_t most_splits = (slots + kFewest - 1) / kFewest;
  const int64_t row = 2 * kv_heads * head_dim * element_size;  // bytes of a slot
  StepPlan best{};
  double least = 0;
  // We try as many blocks as fill the multiprocessors once, twice and so on.
  for (int64_t fill = 1; fill <= 16; ++fill) {
    int64_t splits = fill * kProcessors / (rows > 0 ? rows : 1);
    splits = splits < least_splits ? least_splits : splits > most_splits ? most_splits : splits;
    const int64_t block_slots = (slots + splits - 1) / splits;
    splits = (slots + block_slots - 1) / block_slots;
    // Bytes that a multiprocessor moves; those of the exchange, from L2, count half. All blocks of
    // a row read the sums of all, and write and read one output.
    const int64_t exchanged = query_heads * (8 * splits + 8 * head_dim);
    // One block alone is not twice as fast as two beside each other, since it waits more for
    // memory.
    const int64_t blocks = rows * splits, pairs = blocks / (2 * kProcessors);
    const int64_t rest = blocks % (2 * kProcessors);
    const double last = rest == 0 ? 0 : rest <= kProcessors ? 1.15 : 2;
    const double cost = (2 * static_cast<double>(pairs) + last) *
                        static_cast<double>(block_slots * row + exchanged / 2);
    if (fill == 1 || cost < least) {
      best = {block_slots, splits, splits <= 2 * kProcessors};
      least = cost;
    }
  }
  return best;
}

// What of a grid is resident for sure while blocks wait for each other: all of it, a quarter of the
// device for every row, or less.
enum class Fits : int32_t { whole, by_rows, not_at_all };

// Of some logits in powers of 2: the largest, and the sum of their weights 2^(logit - largest).
struct alignas(8) LogitSum {
  float largest, sum;
};

// A flag between blocks: the token of the last thing that is done. Tokens are numbers that no
// other launch has and that no other memory holds but by an accident of 1 in 2^64: the launch of
// one token need not clear the flags beforehand, which would take longer than any of its phases. A
// CUDA graph repeats a launch, token and all: the last block of a row clears them afterwards.
using Flag = unsigned long long;

// What the blocks of a row of the batch share, in global memory.
struct StepExchange {
  uint32_t* ticket;    // the next block to start: those of a row follow each other
  Flag* attended;      // [row][split]: sums and outputs of a token are there
  Flag* decided;       // [row][split]: summaries of a token are there
  Flag* finished;      // [row]: a token is done
  Summary* summaries;  // [row][split][group]
  LogitSum* sums;      // [row][split][query head]
  float* parts;        // [row][split][query head][head_dim]: values summed with those weights
  float* weights;      // [row][split][query head][block slot]: two launches only
};

// Bytes of the exchange, and of the ticket and the flags, with which it begins.
struct StepWorkspace {
  int64_t bytes, flags;
};

// Lays the exchange out at `memory`. To learn the size, `memory` may be null.
inline StepWorkspace lay_out(const StepPlan& p, const State& s, int64_t batch, int64_t query_heads,
                             char* memory, StepExchange* exchange) {
  const int64_t blocks = batch * p.splits;
  int64_t at = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    using X = std::remove_reference_t<decltype(*pointer)>;
    if (memory) pointer = reinterpret_cast<X*>(memory + at);
    at = padded(at + count * static_cast<int64_t>(sizeof(X)));
  };
  StepExchange unused;
  StepExchange& e = exchange ? *exchange : unused;
  take(e.ticket, 1);
  take(e.attended, blocks);
  take(e.decided, blocks);
  take(e.finished, batch);
  const int64_t flags = at;
  take(e.summaries, blocks * s.groups);
  take(e.sums, blocks * query_heads);
  take(e.parts, blocks * query_heads * s.head_dim);
  take(e.weights, p.one_launch ? 0 : blocks * query_heads * p.padded_slots());
  return {at, flags};
}

// Where a block keeps what in shared memory, in bytes. step_block.h says what each is.
struct StepShared {
  int32_t weights, maxima, totals, factors, occupied, staging, ticket;
  int32_t bytes;
};

// One call: tokens [first, last) of every row, one after the other.
struct StepCall {
  StepPlan plan;  // one_launch only if the grid fits
  Fits fits;
  State state;
  int64_t batch;
  RowIndex rows;
  Policy policy;
  float scale;
  int64_t query_heads;
  int64_t first, last;
  Heads q, k, v, out;
  bool evicting;
  float* scores;  // (batch, groups, slots): the attention that each slot got; or null

  // A sequence of `time` tokens. A row skips those that are not valid.
  int64_t time;
  const bool* valid;  // (batch, time), or null
  int64_t* expiry;    // (batch, groups, time)
  int64_t* times;     // (batch, time): of each position

  Flag token;  // of the first token; 0: a new one
  StepExchange exchange;
  StepShared shared;       // filled in by the launch, like these:
  int32_t sharing;         // query heads of a key-value head
  bool attends, finishes;  // which halves this launch does
  bool ticketed;           // blocks of later rows may have to wait for room
};

inline StepShared lay_out_shared(const StepCall& call) {
  const auto heads = static_cast<int32_t>(call.query_heads);
  const auto slots = static_cast<int32_t>(call.plan.padded_slots());
  const int64_t outputs = heads * call.state.head_dim;
  const bool staged = call.state.kv_heads <= kStepWarps / 2 && outputs <= kStepStaged;
  int32_t at = 0;
  const auto take = [&](int32_t words) {
    const int32_t here = at;
    at += 4 * words;
    return here;
  };
  StepShared m{};
  m.staging =
      take(staged && outputs > 4 * kStepThreads ? static_cast<int32_t>(outputs) : 4 * kStepThreads);
  m.weights = take(heads * slots);
  m.maxima = take(heads);
  m.totals = take(heads);
  m.factors = take(heads);
  m.occupied = take(static_cast<int32_t>(call.state.groups) * slots / 32);
  m.ticket = take(1);
  m.bytes = at;
  return m;
}

// How this device holds the blocks of a call.
const char* step_fits(const StepCall& call, Fits* fits);

// Launches one kernel, or, without `plan.one_launch`, two for each token. Returns what the CUDA
// runtime says is wrong, or null.
const char* launch_step(const StepCall& call, void* stream);

// Drops the lowest unprotected state of every row and group in which a token waits.
const char* launch_evict(const State& state, int64_t batch, const RowIndex& rows,
                         const Policy& policy, const float* scores, void* stream);

}  // namespace msrnn
