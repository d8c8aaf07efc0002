// What a block of the step has at hand, whatever its arithmetic: its place in the grid, what it
// keeps in shared memory, and which of its slots hold a state. step.cuh puts the blocks to work.
#pragma once

#include "memory.h"
#include "multi_state.h"

namespace msrnn {
namespace gpu {

// 2^x is one instruction, so logits are in powers of 2.
constexpr float kPowersOf2 = 1.44269504f;

MSRNN_FN float negative_infinity() { return -kInfinity; }

// The larger of two, not NaN where one is a number.
MSRNN_FN float larger_of(float a, float b) { return fmaxf(a, b); }

MSRNN_FN float warp_sum(float x) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
  return x;
}
MSRNN_FN float warp_largest(float x) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) x = larger_of(x, __shfl_xor_sync(~0u, x, apart));
  return x;
}
MSRNN_FN Summary warp_summary(Summary x) {
#pragma unroll 1
  for (int apart = 16; apart > 0; apart /= 2) {
    Summary other;
    other.victim.score = __shfl_xor_sync(~0u, x.victim.score, apart);
    other.victim.position = __shfl_xor_sync(~0u, x.victim.position, apart);
    other.victim.slot = __shfl_xor_sync(~0u, x.victim.slot, apart);
    other.occupied = __shfl_xor_sync(~0u, x.occupied, apart);
    other.first_empty = __shfl_xor_sync(~0u, x.first_empty, apart);
    x.add(other);
  }
  return x;
}

// The factor of what was summed against `maximum`, where the largest of all is `largest`.
MSRNN_FN float rescale(float maximum, float largest) {
  return exp2_approximate(maximum - (largest == negative_infinity() ? 0 : largest));
}

struct StepBlock {
  const StepCall& call;
  const State& s;
  int batch_row, row, split;  // row: of the state

  MSRNN_FN explicit StepBlock(const StepCall& c)
      : call(c), s(c.state), batch_row(0), row(0), split(0) {}

  // [query head][padded slot]: logits, then weights, and in the end [group][padded slot]: scores.
  MSRNN_FN float* weights(int head) const {
    return in_shared<float>(call.shared.weights) + head * padded_slots();
  }
  // [query head], each: the maximum of this block's logits, and later the factor of its weights in
  // the softmax of the row; the maximum of the row's logits; and 1 / the row's sum.
  MSRNN_FN float* maxima() const { return in_shared<float>(call.shared.maxima); }
  MSRNN_FN float* totals() const { return in_shared<float>(call.shared.totals); }
  MSRNN_FN float* factors() const { return in_shared<float>(call.shared.factors); }
  // [group][padded slot / 32]: a bit for each slot that holds a state.
  MSRNN_FN uint32_t* occupied(int group) const {
    return in_shared<uint32_t>(call.shared.occupied) + group * (padded_slots() / 32);
  }
  // [query head][head_dim], while warps add up what they have of one output, or [warp][lane].
  MSRNN_FN float* staging() const { return in_shared<float>(call.shared.staging); }

  static MSRNN_FN int warp() { return threadIdx.x / 32; }
  static MSRNN_FN int lane() { return threadIdx.x % 32; }
  MSRNN_FN int block_slots() const { return static_cast<int>(call.plan.block_slots); }
  MSRNN_FN int padded_slots() const { return (block_slots() + 31) / 32 * 32; }
  MSRNN_FN int splits() const { return static_cast<int>(call.plan.splits); }
  MSRNN_FN int heads() const { return static_cast<int>(call.query_heads); }
  MSRNN_FN int kv_heads() const { return static_cast<int>(s.kv_heads); }
  MSRNN_FN int head_dim() const { return static_cast<int>(s.head_dim); }
  // Query heads that share keys and values.
  MSRNN_FN int sharing() const { return call.sharing; }
  MSRNN_FN int begin() const { return split * block_slots(); }  // the block's first slot
  MSRNN_FN int row_bytes() const { return static_cast<int>(s.row_bytes()); }
  MSRNN_FN int row_chunks() const { return row_bytes() / 16; }

  // Where this block's share of something of [batch row][split][count] starts.
  MSRNN_FN int64_t share(int other, int64_t count) const {
    return (static_cast<int64_t>(batch_row) * splits() + other) * count;
  }

  // 16 bytes of a row, or zeros where there are none.
  MSRNN_FN Chunk load_chunk(const char* row, int chunk, bool present) const {
    if (!present || chunk >= row_chunks()) return {};
    return reinterpret_cast<const Chunk*>(row)[chunk];
  }

  // Whether a slot of the row is among the `count` of this block.
  MSRNN_FN bool is_mine(int slot, int count) const {
    return slot >= begin() && slot - begin() < count;
  }
  // Stores the token of time t in the rows of `free` that are this block's.
  MSRNN_FN void store_token(int t, int count) const {
    const int per_head = row_chunks();
#pragma unroll 1
    for (int i = threadIdx.x; i < kv_heads() * per_head; i += kStepThreads) {
      const int head = i / per_head, chunk = i % per_head;
      const int slot = static_cast<int>(s.free_slot(row, s.group_of(head)));
      if (!is_mine(slot, count)) continue;
      const int64_t to = s.row_offset(row, head, slot);
      reinterpret_cast<Chunk*>(s.keys + to)[chunk] =
          reinterpret_cast<const Chunk*>(call.k.at(batch_row, head, t))[chunk];
      reinterpret_cast<Chunk*>(s.values + to)[chunk] =
          reinterpret_cast<const Chunk*>(call.v.at(batch_row, head, t))[chunk];
    }
#pragma unroll 1
    for (int g = threadIdx.x; g < s.groups; g += kStepThreads) {
      const int slot = static_cast<int>(s.free_slot(row, g));
      if (is_mine(slot, count)) {
        s.position[s.group(row, g) * s.slots + slot] = s.seen[row];
      }
    }
  }

  MSRNN_FN void mark_occupied(int count) const {
    const int words = padded_slots() / 32;
#pragma unroll 1
    for (int i = warp(); i < static_cast<int>(s.groups) * words; i += kStepWarps) {
      const int g = i / words, slot = i % words * 32 + lane();
      const bool there =
          slot < count && s.position[s.group(row, g) * s.slots + begin() + slot] >= 0;
      const uint32_t bits = __ballot_sync(~0u, there);
      if (lane() == 0) occupied(g)[i % words] = bits;
    }
  }
  // Which slots of this block hold a state, up to the next multiple of 32: bit i for slot + i.
  MSRNN_FN uint32_t occupied_from(int group, int slot) const {
    return occupied(group)[slot / 32] >> slot % 32;
  }
  MSRNN_FN bool is_occupied(int group, int slot) const { return occupied_from(group, slot) & 1; }

  // Warps that share the slots of a unit of work: more than one while there are few units.
  static MSRNN_FN int warps_of_unit(int units) {
    return units > kStepWarps / 2 ? 1 : units > kStepWarps / 4 ? 2 : units > 1 ? 4 : kStepWarps;
  }
  // Adds `count` neighbouring elements, from `at` on, to the block's output of a query head. Warps
  // that share a unit take turns, with a barrier between; the last one publishes the sum.
  template <int count>
  MSRNN_FN void add_to_output(const float (&x)[count], int turn, int turns, int head,
                              int at) const {
    const int64_t published = (share(split, heads()) + head) * head_dim() + at;
    float* const staged = staging() + head * head_dim() + at;
    float* const to = turn < turns - 1 ? staged : call.exchange.parts + published;
#pragma unroll
    for (int i = 0; i < count / 4; ++i) {
      Number<float> before[4] = {}, sum[4];
      if (turn > 0) Stored<float>::unpack(chunk_at(staged + 4 * i), before);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j].v = x[4 * i + j] + before[j].v;
      reinterpret_cast<Chunk*>(to)[i] = Stored<float>::pack(sum);
    }
  }
};

}  // namespace gpu
}  // namespace msrnn
