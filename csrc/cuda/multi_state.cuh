// The step kernel: a token of every row stored, attended for, scored, and one state evicted.
//
// Level by level:
//   lane     16 bytes of a row of keys or values; 4 or 6 rows in flight. `lanes` neighbours have a
//   row. warp     some rows of one key-value head, for 4 of its query heads at once. Keys: products
//   with
//            the queries, summed over the lanes. Values: sums weighted by exp2(logit - maximum).
//   block    a range of slots of one row, all heads. Its logits, and then its weights, stay in
//            shared memory: they are what a slot's score is made of once the maxima and sums of all
//            blocks are known.
//   row      its blocks publish maximum, sum and partial output of every query head and wait for
//            each other. Each then combines its own slice of the output, in the order of the
//            blocks, finishes the scores of its own slots, and publishes its candidate. The last
//            one picks the victim, for which nobody waits: the launch ends.
//   grid     rows, in any order. A sequence repeats all this for every token in the same launch;
//            there a row's blocks do wait for the victim.
//
// Why it cannot dead-lock. A grid that fits the device as a whole is launched as a cooperative one:
// all of its blocks become resident, or none. Of a larger grid a row may take a quarter of the
// device, and blocks take tickets in the order in which they start, those of a row one after the
// other. Take the first row that is not done: blocks of later rows hold later tickets, so while one
// of its blocks has not started, only blocks of that row are there, fewer than can be even beside
// three other such grids, and one more starts. A row that is larger takes two launches, which do
// the same work: between them the weights lie in memory, 4 bytes a query head and slot, and no
// block waits for a later ticket. The bits are the same.
//
// Order. Sums over head_dim, slots, blocks and heads run in an order that the plan fixes, and a
// minimum over unique positions has none: the same bits in every run.
//
// Memory. Keys and values once, 16 bytes at a time, whatever the query heads that share them: up to
// 4 per pass over what was loaded; values of more are read again, from cache. The exchange, from
// L2: a partial output a block (3 % of the bytes of 256 slots at 8 heads of 128 in bfloat16, 25 %
// of 32), written and read once, and the maxima and sums of a row by each of its blocks.
#pragma once

#include <cstring>

#include "memory.h"
#include "multi_state.h"

namespace msrnn {
namespace gpu {

// 2^x is one instruction; logits are kept in powers of 2.
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
#pragma unroll
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

MSRNN_FN void round_to(float* to, float x) { *to = x; }
template <class Narrow>
MSRNN_FN void round_to(Narrow* to, float x) {
  to->bits = static_cast<uint16_t>(two_halves(Narrow{}, x, 0));
}

// One block at work. T is what tensors hold; `chunks`: 16-byte chunks of a row that a lane has.
template <class T, int chunks>
struct StepBlock {
  static constexpr int kElements = 16 / sizeof(T);
  // In flight of a lane; with more, registers spill. 16 KB of a block, 32 KB of a multiprocessor:
  // what 4.3 TB/s take in 1 us.
  static constexpr int kRows = (sizeof(T) == 2 ? 4 : 6) / chunks;
  static constexpr int kQueries = kStepQueries;

  // A lane's part of a row, as numbers.
  struct Piece {
    float x[chunks * kElements];
  };

  const StepCall& call;
  const State& s;
  int row, split;

  MSRNN_FN explicit StepBlock(const StepCall& c) : call(c), s(c.state), row(0), split(0) {}

  static StepShared lay_out_shared(const StepCall& call) {
    const auto heads = static_cast<int32_t>(call.query_heads);
    const auto slots = static_cast<int32_t>(call.plan.block_slots);
    int32_t at = 0;
    const auto take = [&](int32_t words) {
      const int32_t here = at;
      at += 4 * words;
      return here;
    };
    StepShared m{};
    const auto units = call.state.kv_heads * ((heads / call.state.kv_heads + 3) / kQueries);
    const auto staged = units > 4 ? 32 : kQueries * static_cast<int32_t>(call.state.head_dim);
    m.staging = take(kStepWarps * staged);  // of a warp: 32 outputs, or its part of 4 query heads
    m.weights = take(heads * slots);
    m.maxima = take(heads);
    m.totals = take(heads);
    m.factors = take(heads);
    m.occupied = take(static_cast<int32_t>(call.state.groups) * slots / 32);
    m.ticket = take(1);
    m.bytes = at;
    return m;
  }

  template <class X>
  static MSRNN_FN X* in_shared(int offset) {
    return reinterpret_cast<X*>(dynamic_shared() + offset);
  }
  // [query head][block slot]: logits, then weights; in the end [group][block slot]: scores.
  MSRNN_FN float* weights(int head) const {
    return in_shared<float>(call.shared.weights) + head * block_slots();
  }
  // [query head]: the maximum of this block's logits, then the factor of its weights in the softmax
  // of the row; the maximum of the row's logits; 1 / the row's sum.
  MSRNN_FN float* maxima() const { return in_shared<float>(call.shared.maxima); }
  MSRNN_FN float* totals() const { return in_shared<float>(call.shared.totals); }
  MSRNN_FN float* factors() const { return in_shared<float>(call.shared.factors); }
  // [group][block slot / 32]: a bit for each slot that holds a state.
  MSRNN_FN uint32_t* occupied(int group) const {
    return in_shared<uint32_t>(call.shared.occupied) + group * (block_slots() / 32);
  }
  // [warp][query of the warp][head_dim]
  MSRNN_FN float* staging() const { return in_shared<float>(call.shared.staging); }

  static MSRNN_FN int warp() { return threadIdx.x / 32; }
  static MSRNN_FN int lane() { return threadIdx.x % 32; }
  MSRNN_FN int block_slots() const { return static_cast<int>(call.plan.block_slots); }
  MSRNN_FN int splits() const { return static_cast<int>(call.plan.splits); }
  MSRNN_FN int heads() const { return static_cast<int>(call.query_heads); }
  MSRNN_FN int kv_heads() const { return static_cast<int>(s.kv_heads); }
  MSRNN_FN int head_dim() const { return static_cast<int>(s.head_dim); }
  // Query heads that share keys and values.
  MSRNN_FN int sharing() const { return heads() / kv_heads(); }
  MSRNN_FN int begin() const { return split * block_slots(); }  // the block's first slot
  MSRNN_FN int row_chunks() const { return head_dim() / kElements; }

  // Neighbouring lanes that have a row, a power of 2, and this lane's place among them.
  MSRNN_FN int lanes() const {
    int n = 4;
    while (n < 32 && n * chunks < row_chunks()) n *= 2;
    return n;
  }

  // Where this block's share of something of [row][split][count] starts.
  MSRNN_FN int64_t share(int other, int64_t count) const {
    return (static_cast<int64_t>(row) * splits() + other) * count;
  }

  static MSRNN_FN Piece unpack(const Chunk (&raw)[chunks], float factor = 1) {
    Piece piece;
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      typename Stored<T>::V x[kElements];
      Stored<T>::unpack(raw[i], x);
#pragma unroll
      for (int e = 0; e < kElements; ++e) piece.x[i * kElements + e] = factor * x[e].v;
    }
    return piece;
  }
  // A lane's chunks of a row; zeros where it has none.
  MSRNN_FN void load(const char* from, bool present, int place, int lanes,
                     Chunk (&raw)[chunks]) const {
#pragma unroll
    for (int i = 0; i < chunks; ++i) {
      const int chunk = i * lanes + place;
      raw[i] = {};
      if (present && chunk < row_chunks()) raw[i] = reinterpret_cast<const Chunk*>(from)[chunk];
    }
  }

  // Stores the token of time t in the rows of `free` that are this block's.
  MSRNN_FN void store_token(int t, int end) const {
    const int per_head = row_chunks();
    for (int i = threadIdx.x; i < kv_heads() * per_head; i += kStepThreads) {
      const int head = i / per_head, chunk = i % per_head;
      const int slot = static_cast<int>(s.free_slot(row, s.group_of(head)));
      if (slot < begin() || slot >= end) continue;
      const int64_t to = s.row_offset(row, head, slot);
      reinterpret_cast<Chunk*>(s.keys + to)[chunk] =
          reinterpret_cast<const Chunk*>(call.k.at(row, head, t))[chunk];
      reinterpret_cast<Chunk*>(s.values + to)[chunk] =
          reinterpret_cast<const Chunk*>(call.v.at(row, head, t))[chunk];
    }
    for (int g = threadIdx.x; g < s.groups; g += kStepThreads) {
      const int slot = static_cast<int>(s.free_slot(row, g));
      if (slot >= begin() && slot < end) {
        s.position[s.group(row, g) * s.slots + slot] = s.seen[row];
      }
    }
  }

  MSRNN_FN void mark_occupied(int end) const {
    const int words = block_slots() / 32;
    for (int i = warp(); i < static_cast<int>(s.groups) * words; i += kStepWarps) {
      const int g = i / words, slot = begin() + i % words * 32 + lane();
      const bool there = slot < end && s.position[s.group(row, g) * s.slots + slot] >= 0;
      const uint32_t bits = __ballot_sync(~0u, there);
      if (lane() == 0) occupied(g)[i % words] = bits;
    }
  }
  MSRNN_FN bool is_occupied(int group, int slot) const {  // a slot of this block
    return occupied(group)[slot / 32] >> slot % 32 & 1;
  }

  // Sums four numbers over `lanes` lanes; lane i * lanes / 4 of them has the i-th sum.
  static MSRNN_FN float sum_each(const float (&x)[kQueries], int place, int lanes) {
    const bool high = place & (lanes / 2), odd = place & (lanes / 4);
    const float a = (high ? x[2] : x[0]) + __shfl_xor_sync(~0u, high ? x[0] : x[2], lanes / 2);
    const float b = (high ? x[3] : x[1]) + __shfl_xor_sync(~0u, high ? x[1] : x[3], lanes / 2);
    float sum = (odd ? b : a) + __shfl_xor_sync(~0u, odd ? a : b, lanes / 4);
    for (int apart = lanes / 8; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
    return sum;
  }

  // From the keys to logits, some rows of one head a warp at a time.
  MSRNN_FN void multiply_keys(int t, int end) const {
    const int lanes = this->lanes(), place = lane() % lanes, sub_row = lane() / lanes;
    const int at_once = 32 / lanes, tile = kRows * at_once;
    const int tiles = (end - begin() + tile - 1) / tile;
    const float factor = call.scale * kPowersOf2;
#pragma unroll 1
    for (int i = warp(); i < tiles * kv_heads(); i += kStepWarps) {
      const int head = i % kv_heads(), first = i / kv_heads() * tile;  // slot of this block
      Chunk raw[kRows][chunks];
      const char* from = s.keys + s.row_offset(row, head, begin() + first + sub_row);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const bool present = begin() + first + r * at_once + sub_row < end;
        load(from + r * at_once * s.row_bytes(), present, place, lanes, raw[r]);
      }
#pragma unroll 1
      for (int q = 0; q < sharing(); q += kQueries) {
        Piece query[kQueries];
#pragma unroll
        for (int k = 0; k < kQueries; ++k) {
          Chunk chunk[chunks];
          const bool present = q + k < sharing();
          const int query_head = head * sharing() + (present ? q + k : q);
          load(call.q.at(row, query_head, t), present, place, lanes, chunk);
          query[k] = unpack(chunk, factor);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const Piece key = unpack(raw[r]);
          float dot[kQueries];
#pragma unroll
          for (int k = 0; k < kQueries; ++k) {
            dot[k] = 0;
#pragma unroll
            for (int e = 0; e < chunks * kElements; ++e) {
              dot[k] = fmaf(query[k].x[e], key.x[e], dot[k]);
            }
          }
          const float sum = sum_each(dot, place, lanes);
          const int slot = first + r * at_once + sub_row, k = place / (lanes / 4);
          if (place % (lanes / 4) == 0 && q + k < sharing() && slot < block_slots()) {
            weights(head * sharing() + q + k)[slot] = sum;
          }
        }
      }
    }
  }

  // From logits to weights against the block's own maximum; their maximum and sum to the row.
  MSRNN_FN void exponentiate(int end) const {
    const int count = end - begin();
#pragma unroll 1
    for (int head = warp(); head < heads(); head += kStepWarps) {
      const int g = static_cast<int>(s.group_of(head / sharing()));
      float* const w = weights(head);
      float largest = negative_infinity();
      for (int i = lane(); i < count; i += 32) {
        if (is_occupied(g, i)) largest = larger_of(largest, w[i]);
      }
      largest = warp_largest(largest);
      float sum = 0;
      for (int i = lane(); i < block_slots(); i += 32) {
        const bool there = i < count && is_occupied(g, i);
        w[i] = there ? rescale(w[i], largest) : 0;
        sum += w[i];
      }
      sum = warp_sum(sum);
      if (lane() == 0) {
        maxima()[head] = largest;
        const int64_t at = share(split, heads()) + head;
        call.exchange.maxima[at] = largest;
        call.exchange.sums[at] = sum;
      }
    }
  }

  // Weighted sums of the values: a warp takes 4 query heads of a key-value head; with few of those,
  // several warps share the slots, in turn.
  MSRNN_FN void add_values(int end) const {
    const int lanes = this->lanes(), place = lane() % lanes, sub_row = lane() / lanes;
    const int at_once = 32 / lanes, tile = kRows * at_once;
    const int quads = (sharing() + kQueries - 1) / kQueries, units = kv_heads() * quads;
    const int parts = units > 4 ? 1 : units > 2 ? 2 : units > 1 ? 4 : 8, part = warp() % parts;
    float* const to_row = call.exchange.parts + share(split, heads()) * head_dim();
#pragma unroll 1
    for (int unit = warp() / parts; unit < units; unit += kStepWarps / parts) {
      const int head = unit / quads, q = unit % quads * kQueries;
      const int group = static_cast<int>(s.group_of(head)), query_head = head * sharing() + q;
      const int present = sharing() - q < kQueries ? sharing() - q : kQueries;
      Piece sum[kQueries] = {};
#pragma unroll 1
      for (int first = part * tile; begin() + first < end; first += parts * tile) {
        Chunk raw[kRows][chunks];
        const char* from = s.values + s.row_offset(row, head, begin() + first + sub_row);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int slot = first + r * at_once + sub_row;  // an empty one may hold anything
          const bool there = begin() + slot < end && is_occupied(group, slot);
          load(from + r * at_once * s.row_bytes(), there, place, lanes, raw[r]);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int slot = first + r * at_once + sub_row;
          const Piece value = unpack(raw[r]);
#pragma unroll
          for (int k = 0; k < kQueries; ++k) {
            const bool has = k < present && slot < block_slots();
            const float weight = has ? weights(query_head + k)[slot] : 0;
#pragma unroll
            for (int e = 0; e < chunks * kElements; ++e) {
              sum[k].x[e] = fmaf(weight, value.x[e], sum[k].x[e]);
            }
          }
        }
      }
      for (int apart = lanes; apart < 32; apart *= 2) {
#pragma unroll
        for (int k = 0; k < kQueries; ++k) {
#pragma unroll
          for (float& x : sum[k].x) x += __shfl_xor_sync(~0u, x, apart);
        }
      }
      float* const to =
          parts > 1 ? staging() + warp() * kQueries * head_dim() : to_row + query_head * head_dim();
#pragma unroll
      for (int k = 0; k < kQueries; ++k) {
#pragma unroll
        for (int i = 0; i < chunks; ++i) {
          const int chunk = i * lanes + place;
          if (sub_row > 0 || k >= present || chunk >= row_chunks()) continue;
          auto* const at = reinterpret_cast<Chunk*>(to + k * head_dim() + chunk * kElements);
#pragma unroll
          for (int j = 0; j < kElements / 4; ++j) {
            memcpy(&at[j], &sum[k].x[i * kElements + 4 * j], sizeof(Chunk));
          }
        }
      }
    }
    if (parts == 1) return;
    __syncthreads();
    for (int i = threadIdx.x; i < heads() * head_dim(); i += kStepThreads) {
      const int query_head = i / head_dim(), d = i % head_dim();
      const int unit = query_head / sharing() * quads + query_head % sharing() / kQueries;
      const int k = query_head % sharing() % kQueries;
      float sum = 0;
      for (int p = 0; p < parts; ++p) {
        sum += staging()[((unit * parts + p) * kQueries + k) * head_dim() + d];
      }
      to_row[i] = sum;
    }
  }

  // Waits for blocks [0, count) of this row.
  MSRNN_FN void await(const uint32_t* flags, int count, uint32_t token) const {
    for (int i = threadIdx.x; i < count; i += kStepThreads) {
      while (load_acquire(flags + i) < token) spin_pause();
    }
    __syncthreads();
  }
  // After everything that this block has written.
  MSRNN_FN void tell(uint32_t* flag, uint32_t token) const {
    __syncthreads();
    if (threadIdx.x == 0) store_release(flag, token);
  }

  // The softmax over the row: for every query head its maximum and 1 / its sum.
  MSRNN_FN void find_totals(int active) const {
#pragma unroll 1
    for (int head = warp(); head < heads(); head += kStepWarps) {
      const float* const m = call.exchange.maxima + share(0, heads()) + head;
      const float* const sums = call.exchange.sums + share(0, heads()) + head;
      float largest = negative_infinity(), sum = 0;
      for (int i = lane(); i < active; i += 32) {
        largest = larger_of(largest, load_coherent(m + i * heads()));
      }
      largest = warp_largest(largest);
      for (int i = lane(); i < active; i += 32) {
        sum = fmaf(load_coherent(sums + i * heads()),
                   rescale(load_coherent(m + i * heads()), largest), sum);
      }
      sum = warp_sum(sum);
      if (lane() == 0) {
        totals()[head] = largest;
        factors()[head] = 1 / sum;
        maxima()[head] = rescale(maxima()[head], largest) / sum;
      }
    }
  }

  // This block's slice of the output: the partial ones of all blocks in order. Warps share the
  // blocks, lanes the elements.
  MSRNN_FN void combine_outputs(int t, int active) const {
    const int size = heads() * head_dim();
    const int slice = (size + active - 1) / active;
    const int from = split * slice, to = from + slice < size ? from + slice : size;
    const float* const parts = call.exchange.parts + share(0, size);
    const float* const m = call.exchange.maxima + share(0, heads());
#pragma unroll 1
    for (int first = from; first < to; first += 32) {
      const int i = first + lane(), head = i / head_dim();
      float sum = 0;
      if (i < to) {
        const float largest = totals()[head];
#pragma unroll 4
        for (int p = warp(); p < active; p += kStepWarps) {
          const float factor = rescale(load_coherent(m + p * heads() + head), largest);
          sum = fmaf(load_coherent(parts + static_cast<int64_t>(p) * size + i), factor, sum);
        }
      }
      staging()[warp() * 32 + lane()] = sum;
      __syncthreads();
      if (warp() == 0 && i < to) {
        for (int w = 1; w < kStepWarps; ++w) sum += staging()[w * 32 + lane()];
        T* const out = reinterpret_cast<T*>(call.out.at(row, head, t)) + i % head_dim();
        round_to(out, sum * factors()[head]);
      }
      __syncthreads();
    }
  }

  // The attention that each slot of this block got, summed over the query heads of its group; in
  // place of the group's first weights.
  MSRNN_FN void add_heads(int count) const {
    const int groups = static_cast<int>(s.groups), each = heads() / groups;
    for (int i = threadIdx.x; i < groups * count; i += kStepThreads) {
      const int g = i / count, slot = i % count;
      float sum = 0;
      for (int head = g * each; head < (g + 1) * each; ++head) {
        sum = fmaf(weights(head)[slot], maxima()[head], sum);
      }
      weights(g * each)[slot] = sum;
    }
  }

  // Scores of this block's slots, and what goes of them: to the row.
  MSRNN_FN void summarize(int count) const {
    const int groups = static_cast<int>(s.groups), each = heads() / groups;
    const int64_t now = s.seen[row];
#pragma unroll 1
    for (int g = warp(); g < groups; g += kStepWarps) {
      const int64_t offset = s.group(row, g) * s.slots + begin();
      Summary found;
      for (int i = lane(); i < count; i += 32) {
        const bool there = is_occupied(g, i);
        const float sum = weights(g * each)[i];
        if (call.scores) call.scores[offset + i] = there ? sum : 0;
        if (!call.evicting) continue;
        float score = 0;
        if (there && call.policy.score == ScoreKind::attention) score = sum;
        if (there && call.policy.score == ScoreKind::accumulated) {
          score = s.score[offset + i] + sum;
          s.score[offset + i] = score;
        }
        found.look_at(call.policy, begin() + i, there ? s.position[offset + i] : -1, score, now);
      }
      if (!call.evicting) continue;
      found = warp_summary(found);
      if (lane() == 0) call.exchange.summaries[share(split, groups) + g] = found;
    }
  }

  // The last block of a row: what goes of the row.
  MSRNN_FN void evict(int t, int active) const {
    const int groups = static_cast<int>(s.groups);
#pragma unroll 1
    for (int g = warp(); g < groups; g += kStepWarps) {
      Summary found;
      for (int i = lane(); i < active; i += 32) {
        found.add(call.exchange.summaries[share(i, groups) + g]);
      }
      found = warp_summary(found);
      if (lane() > 0) continue;
      s.evict(row, g, found);
      const int64_t evicted = s.last_evicted[s.group(row, g)];
      if (!call.expiry) continue;
      int64_t* const expiry = call.expiry + s.group(row, g) * call.time;
      expiry[t] = call.time;
      if (evicted >= 0) {
        const bool own = evicted == s.seen[row];
        expiry[own ? t : call.times[row * call.time + evicted]] = t + 1;
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      if (call.times) call.times[row * call.time + s.seen[row]] = t;
      ++s.seen[row];
    }
  }

  MSRNN_FN void run_token(int t, uint32_t token) {
    const StepExchange& exchange = call.exchange;
    const int64_t first = share(0, 1);
    const int used = static_cast<int>(s.used(row));
    const int active = (used + block_slots() - 1) / block_slots();  // blocks with a slot in use
    if (split < active) {
      const int end = begin() + block_slots() < used ? begin() + block_slots() : used;
      if (call.attends) {
        attend(t, end);
        if (!call.finishes) return pass_weights(true);
        tell(exchange.attended + first + split, token);
        await(exchange.attended + first, active, token);
      } else {
        mark_occupied(end);
        pass_weights(false);
        __syncthreads();
      }
      finish(t, end, active);
    }
    if (!call.evicting || !call.finishes) return;
    if (split < splits() - 1) {
      tell(exchange.decided + first + split, token);
    } else {  // nobody reads the row's marks any more
      __syncthreads();
      await(exchange.decided + first, splits() - 1, token);
      evict(t, active);
      if (call.last - call.first > 1) tell(exchange.finished + row, token);
    }
    if (call.last - call.first > 1) await(exchange.finished + row, 1, token);
  }
  MSRNN_FN void attend(int t, int end) const {
    store_token(t, end);
    __syncthreads();
    mark_occupied(end);
    multiply_keys(t, end);
    __syncthreads();
    exponentiate(end);
    __syncthreads();
    add_values(end);
  }
  MSRNN_FN void finish(int t, int end, int active) const {
    find_totals(active);
    __syncthreads();
    combine_outputs(t, active);
    if (call.scores || call.policy.score != ScoreKind::position) add_heads(end - begin());
    __syncthreads();
    if (call.scores || call.evicting) summarize(end - begin());
  }

  // Between two launches, the weights and their maxima.
  MSRNN_FN void pass_weights(bool out) const {
    float* const memory = call.exchange.weights + share(split, heads()) * block_slots();
    for (int i = threadIdx.x; i < heads() * block_slots(); i += kStepThreads) {
      if (out) {
        memory[i] = weights(0)[i];
      } else {
        weights(0)[i] = memory[i];
      }
    }
    if (out) return;
    for (int head = threadIdx.x; head < heads(); head += kStepThreads) {
      maxima()[head] = call.exchange.maxima[share(split, heads()) + head];
    }
  }

  MSRNN_FN void run() {
    uint32_t* const ticket = in_shared<uint32_t>(call.shared.ticket);
    if (threadIdx.x == 0) *ticket = atomicAdd(call.exchange.ticket, 1u);
    __syncthreads();
    row = static_cast<int>(*ticket / splits());
    split = static_cast<int>(*ticket % splits());
    uint32_t token = 0;
#pragma unroll 1
    for (int t = call.first; t < call.last; ++t) {
      if (!call.valid || call.valid[row * call.time + t]) {
        run_token(t, ++token);
      } else if (split == 0) {
        for (int g = threadIdx.x; g < s.groups; g += kStepThreads) {
          call.expiry[s.group(row, g) * call.time + t] = t;
        }
      }
    }
  }
};

template <class T, int chunks>
__global__ void __launch_bounds__(kStepThreads, 2)
    step_kernel(const __grid_constant__ StepCall call) {
  StepBlock<T, chunks>(call).run();
}

// Calls `with` for the kernel of a call: what both functions below share.
template <class T, class With>
cudaError_t with_step_kernel(StepCall& call, const With& with) {
  const auto of = [&]<int chunks>(std::integral_constant<int, chunks>) {
    call.shared = StepBlock<T, chunks>::lay_out_shared(call);
    const auto bytes = static_cast<size_t>(call.shared.bytes);
    if (auto e = allow_shared(step_kernel<T, chunks>, bytes)) return e;
    return with(step_kernel<T, chunks>, bytes);
  };
  constexpr int64_t kOnePiece = 32 * sizeof(Chunk) / sizeof(T);  // elements of a row
  if constexpr (kLargestHeadDim > kOnePiece) {
    if (call.state.head_dim > kOnePiece) return of(std::integral_constant<int, 2>{});
  }
  return of(std::integral_constant<int, 1>{});
}

// Whether the blocks of a row can all be resident; and the launch. Defined once for each dtype, in
// multi_state_<dtype>.cu.
template <class T>
cudaError_t step_fits_of(StepCall call, Fits* fits) {
  return with_step_kernel<T>(call, [&](auto kernel, size_t shared) {
    int most = 0;
    const cudaError_t error = resident_blocks(&most, kernel, kStepThreads, shared);
    *fits = call.state.batch * call.plan.splits <= most ? Fits::whole
            : 4 * call.plan.splits <= most              ? Fits::by_rows
                                                        : Fits::not_at_all;
    return error;
  });
}

template <class T>
cudaError_t launch_step_of(StepCall call, cudaStream_t stream) {
  const StepExchange& exchange = call.exchange;
  const int64_t cleared =
      reinterpret_cast<char*>(exchange.summaries) - reinterpret_cast<char*>(exchange.ticket);
  const auto blocks = static_cast<uint32_t>(call.state.batch * call.plan.splits);
  return with_step_kernel<T>(call, [&](auto kernel, size_t shared) {
    const auto launch_half = [&](bool attends, bool finishes, int64_t first, int64_t last) {
      call.attends = attends;
      call.finishes = finishes;
      call.first = first;
      call.last = last;
      if (auto e = cudaMemsetAsync(exchange.ticket, 0, cleared, stream)) return e;
      const bool together = call.plan.one_launch && call.fits == Fits::whole;
      return launch(kernel, blocks, kStepThreads, shared, stream, call, together);
    };
    const int64_t first = call.first, last = call.last;
    if (call.plan.one_launch) return launch_half(true, true, first, last);
    for (int64_t t = first; t < last; ++t) {
      if (auto e = launch_half(true, false, t, t + 1)) return e;
      if (auto e = launch_half(false, true, t, t + 1)) return e;
    }
    return cudaSuccess;
  });
}

}  // namespace gpu
}  // namespace msrnn
