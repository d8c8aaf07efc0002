// The CUDA step of multi-state attention from the host: the plan of a call, a pure function of its
// shape, and the call itself, raw pointers and no torch. multi_state.cuh has the kernel.
#pragma once

#include <cstddef>
#include <type_traits>

#include "../multi_state.h"

namespace msrnn {

constexpr int kStepThreads = 256;
constexpr int kStepWarps = kStepThreads / 32;
constexpr int kStepQueries = 4;  // query heads that a warp attends for at once

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
};

inline StepPlan step_plan(int64_t rows, int64_t query_heads, int64_t slots, int64_t head_dim) {
  // Two blocks for each of the 132 multiprocessors of a large GPU; below 32 slots a block spends
  // its time on the exchange. What a block keeps must fit the 64 KiB of the smallest GPU.
  constexpr int64_t kEnoughBlocks = 264, kWord = 32;
  const int64_t staging = kStepWarps * kStepQueries * head_dim * 4;
  const int64_t most = (int64_t{48} * 1024 - staging) / (4 * query_heads) / kWord * kWord;
  const int64_t wanted = (kEnoughBlocks + rows - 1) / (rows > 0 ? rows : 1);
  StepPlan p{};
  p.block_slots = padded((slots + wanted - 1) / wanted, kWord);
  if (p.block_slots > most) p.block_slots = most;
  if (p.block_slots < kWord) p.block_slots = kWord;
  p.splits = (slots + p.block_slots - 1) / p.block_slots;
  p.one_launch = p.splits <= kEnoughBlocks;
  return p;
}

// What of a grid is resident for sure while blocks wait for each other: all of it, a quarter of the
// device for every row, or less.
enum class Fits : int32_t { whole, by_rows, not_at_all };

// What the blocks of a row share, in global memory.
struct StepExchange {
  uint32_t* ticket;    // the next block to start: those of a row follow each other
  uint32_t* attended;  // [row][split]: tokens whose partial outputs are there
  uint32_t* decided;   // [row][split]: tokens whose summaries are there
  uint32_t* finished;  // [row]: tokens that are done
  Summary* summaries;  // [row][split][group]
  float* maxima;       // [row][split][query head]: of the logits, in powers of 2
  float* sums;         // [row][split][query head]: of the weights against that maximum
  float* parts;        // [row][split][query head][head_dim]: values summed with those weights
  float* weights;      // [row][split][query head][block slot]: two launches only
};

// Bytes of the exchange, and how many of them must be zero before a launch.
struct StepWorkspace {
  int64_t bytes, cleared;
};

// Lays the exchange out at `memory`, which may be null to learn the size.
inline StepWorkspace lay_out(const StepPlan& p, const State& s, int64_t query_heads, char* memory,
                             StepExchange* exchange) {
  const int64_t blocks = s.batch * p.splits;
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
  take(e.finished, s.batch);
  const int64_t cleared = at;
  take(e.summaries, blocks * s.groups);
  take(e.maxima, blocks * query_heads);
  take(e.sums, blocks * query_heads);
  take(e.parts, blocks * query_heads * s.head_dim);
  take(e.weights, p.one_launch ? 0 : blocks * query_heads * p.block_slots);
  return {at, cleared};
}

// Where a block keeps what in shared memory, in bytes; StepBlock says what each is.
struct StepShared {
  int32_t weights, maxima, totals, factors, occupied, staging, ticket;
  int32_t bytes;
};

// One call: tokens [first, last) of every row, one after the other.
struct StepCall {
  StepPlan plan;  // one_launch only if the grid fits
  Fits fits;
  State state;
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

  StepExchange exchange;
  StepShared shared;       // filled in by the launch, like these:
  bool attends, finishes;  // which halves this launch does
};

// How this device holds the blocks of a call.
const char* step_fits(const StepCall& call, Fits* fits);

// Launches one kernel, or, without `plan.one_launch`, two for each token. Returns what the CUDA
// runtime says is wrong, or null.
const char* launch_step(const StepCall& call, void* stream);

// Drops the lowest unprotected state of every row and group in which a token waits.
const char* launch_evict(const State& state, const Policy& policy, const float* scores,
                         void* stream);

}  // namespace msrnn
