// The products of the step by fused multiply-adds. They serve float32, and any dtype where there
// are no tensor cores for it; step_mma.h is for the others.
//
// `lanes` neighbours of a warp share a row, with 16 or 32 bytes each, and a lane has 4 or 6 rows in
// flight. A warp works for 4 query heads at once on the keys and values that it holds. It
// multiplies keys with the queries and sums over the lanes. It weights values by the attention and
// sums over the rows that it holds, and then over the warps that share the slots.
//
// Cost in float32 on sm_90 (`python -m bench estimates`): a warp takes 69 instructions for a KB at
// one query head and 103 at 4, which is 28 and 41 % of what the schedulers issue while an H200
// reads it.
#pragma once

#include <cstring>

#include "step_block.h"

namespace msrnn {
namespace gpu {

// T is what tensors hold. A lane has `chunks` pieces of a row, of 16 bytes each.
template <class T, int chunks>
struct FmaProducts : StepBlock {
  static constexpr int kElements = 16 / sizeof(T);
  // Rows that a lane has in flight. With more, registers would spill. A block has 16 KB and a
  // multiprocessor 32 KB in flight, which is what 4.3 TB/s take in 1 us.
  static constexpr int kRows = (sizeof(T) == 2 ? 4 : 6) / chunks;
  static constexpr int kQueries = 4;  // query heads that a warp works for at once

  // A lane's part of a row, as numbers.
  struct Piece {
    float x[chunks * kElements];
  };

  MSRNN_FN explicit FmaProducts(const StepBlock& block) : StepBlock(block) {}

  // Neighbouring lanes that have a row, a power of 2, and this lane's place among them.
  MSRNN_FN int lanes() const {
    int n = 4;
    while (n < 32 && n * chunks < row_chunks()) n *= 2;
    return n;
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
  // A lane's chunks of a row.
  MSRNN_FN void load(const char* from, bool present, int place, int lanes,
                     Chunk (&raw)[chunks]) const {
#pragma unroll
    for (int i = 0; i < chunks; ++i) raw[i] = load_chunk(from, i * lanes + place, present);
  }

  // Sums four numbers over `lanes` lanes. Lane i * lanes / 4 of them has the i-th sum.
  static MSRNN_FN float sum_each(const float (&x)[kQueries], int place, int lanes) {
    const bool high = place & (lanes / 2), odd = place & (lanes / 4);
    const float a = (high ? x[2] : x[0]) + __shfl_xor_sync(~0u, high ? x[0] : x[2], lanes / 2);
    const float b = (high ? x[3] : x[1]) + __shfl_xor_sync(~0u, high ? x[1] : x[3], lanes / 2);
    float sum = (odd ? b : a) + __shfl_xor_sync(~0u, odd ? a : b, lanes / 4);
    for (int apart = lanes / 8; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
    return sum;
  }

  // From the keys to logits, some rows of one head a warp at a time.
  MSRNN_FN void multiply_keys(int t, int count) const {
    const int lanes = this->lanes(), place = lane() % lanes, sub_row = lane() / lanes;
    const int at_once = 32 / lanes, tile = kRows * at_once;
    const int tiles = (count + tile - 1) / tile;
    const float factor = call.scale * kPowersOf2;
#pragma unroll 1
    for (int i = warp(); i < tiles * kv_heads(); i += kStepWarps) {
      const int head = i % kv_heads(), first = i / kv_heads() * tile;  // slot of this block
      Chunk raw[kRows][chunks];
      const char* from = s.keys + s.row_offset(row, head, begin() + first + sub_row);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const bool present = first + r * at_once + sub_row < count;
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
          load(call.q.at(batch_row, query_head, t), present, place, lanes, chunk);
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
          if (place % (lanes / 4) == 0 && q + k < sharing() && slot < padded_slots()) {
            weights(head * sharing() + q + k)[slot] = sum;
          }
        }
      }
    }
  }

  // Weighted sums of the values. A unit is 4 query heads of a key-value head.
  MSRNN_FN void add_values(int count) const {
    const int lanes = this->lanes(), place = lane() % lanes, sub_row = lane() / lanes;
    const int at_once = 32 / lanes, tile = kRows * at_once;
    const int quads = (sharing() + kQueries - 1) / kQueries, units = kv_heads() * quads;
    const int warps = warps_of_unit(units), part = warp() % warps;
#pragma unroll 1
    for (int first_unit = 0; first_unit < units; first_unit += kStepWarps / warps) {
      const int unit = first_unit + warp() / warps, slots = unit < units ? count : 0;
      const int head = unit / quads, q = unit % quads * kQueries;
      const int group = static_cast<int>(s.group_of(head)), query_head = head * sharing() + q;
      const int present = sharing() - q < kQueries ? sharing() - q : kQueries;
      Piece sum[kQueries] = {};
#pragma unroll 1
      for (int first = part * tile; first < slots; first += warps * tile) {
        Chunk raw[kRows][chunks];
        const char* from = s.values + s.row_offset(row, head, begin() + first + sub_row);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int slot = first + r * at_once + sub_row;  // an empty one may hold anything
          const bool there = slot < slots && is_occupied(group, slot);
          load(from + r * at_once * s.row_bytes(), there, place, lanes, raw[r]);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int slot = first + r * at_once + sub_row;
          const Piece value = unpack(raw[r]);
#pragma unroll
          for (int k = 0; k < kQueries; ++k) {
            const bool has = k < present && slot < padded_slots();
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
#pragma unroll 1
      for (int turn = 0; turn < warps; ++turn) {
        if (turn > 0) __syncthreads();
        if (turn != part || unit >= units || sub_row > 0) continue;
#pragma unroll
        for (int k = 0; k < kQueries; ++k) {
#pragma unroll
          for (int i = 0; i < chunks; ++i) {
            const int chunk = i * lanes + place;
            if (k >= present || chunk >= row_chunks()) continue;
            float x[kElements];
            memcpy(x, sum[k].x + i * kElements, sizeof x);
            add_to_output(x, turn, warps, query_head + k, chunk * kElements);
          }
        }
      }
    }
  }
};

}  // namespace gpu
}  // namespace msrnn
