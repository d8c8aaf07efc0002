// The products of the step by tensor cores, for 16-bit states.
//
// The instruction m16n8k16 multiplies 16 x 16 numbers with 16 x 8 and adds up in float32. Lane
// 4 g + c holds rows g and g + 8 of the left factor, column g of the right one, and columns 2 c and
// 2 c + 1 of the sum; along k it holds the pairs 2 c and 2 c + 8. Which element of a row or which
// slot a `k` stands for is ours to choose, as long as both factors agree. We choose it so that
// every lane reads 16 bytes at a time and multiplies what it has read. Nothing but the logits and
// weights passes through shared memory.
//
//   keys    Rows are 16 slots, k elements of head_dim, and columns 8 query heads. Lane (g, c) reads
//           16 bytes, 8 elements, of rows g and g + 8. Pairs 0 and 1 belong to one product, 2 and 3
//           to the next. It reads its query likewise.
//   values  Rows are 16 elements of head_dim, k 16 slots, and columns 4 query heads. Lane (g, c)
//           reads 8 elements, from 8 g on, of slots 4 c to 4 c + 3, and pairs them up by slots with
//           a byte permutation each.
//
// A weight is the sum of two 16-bit numbers, in columns g and g + 4. Four heads leave half of the 8
// columns empty, and the second number there makes a weight exact to 2^-17 in bfloat16, where one
// rounding would cost 2^-9.
//
// Cost on sm_90 (`python -m bench estimates`): a warp takes 41 instructions for a KB at up to 4
// query heads and 47 at 8, which is 17 and 19 % of what the schedulers issue while an H200 reads
// it. Fused multiply-adds would take 42 % at 4 heads and 75 % at 8, by an estimate. We rejected 16
// query heads at once, and 128 instead of 64 bytes of values in flight at 8: both spill registers.
#pragma once

#include "step_block.h"

namespace msrnn {
namespace gpu {

template <class T>
struct MmaProducts : StepBlock {
  MSRNN_FN explicit MmaProducts(const StepBlock& block) : StepBlock(block) {}

  static MSRNN_FN int g() { return lane() / 4; }
  static MSRNN_FN int c() { return lane() % 4; }

  // From the keys to logits. A lane has 128 bytes in flight, so of narrow rows twice the slots.
  MSRNN_FN void multiply_keys(int t, int count) const {
    if (head_dim() <= 64) {
      multiply_keys<2>(t, count);
    } else {
      multiply_keys<4>(t, count);
    }
  }

  // `blocks` of 32 elements at once, of 64 / blocks slots.
  template <int blocks>
  MSRNN_FN void multiply_keys(int t, int count) const {
    constexpr int kTiles = 4 / blocks;  // of 16 slots
    const int tiles = (count + 16 * kTiles - 1) / (16 * kTiles);
    const float factor = call.scale * kPowersOf2;
#pragma unroll 1
    for (int i = warp(); i < tiles * kv_heads(); i += kStepWarps) {
      const int head = i % kv_heads(), first = i / kv_heads() * 16 * kTiles;
      const char* const keys = s.keys + s.row_offset(row, head, begin());
#pragma unroll 1
      for (int q = 0; q < sharing(); q += 8) {  // keys for more than 8 queries: again, from cache
        const bool present = q + g() < sharing();
        const char* const query =
            call.q.at(batch_row, head * sharing() + (present ? q + g() : 0), t);
        float sum[kTiles][4] = {};
#pragma unroll 1
        for (int chunk = c(); chunk - c() < row_chunks(); chunk += 4 * blocks) {
          Chunk key[kTiles][2][blocks];
#pragma unroll
          for (int r = 0; r < 2 * kTiles; ++r) {
            const int slot = first + 8 * r + g();
            const char* const from = keys + slot * row_bytes();
#pragma unroll
            for (int b = 0; b < blocks; ++b) {
              key[r / 2][r % 2][b] = load_chunk(from, chunk + 4 * b, slot < count);
            }
          }
#pragma unroll
          for (int b = 0; b < blocks; ++b) {
            const Chunk x = load_chunk(query, chunk + 4 * b, present);
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
              const Chunk &low = key[tile][0][b], &high = key[tile][1][b];
#pragma unroll
              for (int w = 0; w < 4; w += 2) {
                const uint32_t rows[] = {low.word[w], high.word[w], low.word[w + 1],
                                         high.word[w + 1]};
                const uint32_t column[] = {x.word[w], x.word[w + 1]};
                multiply_add(T{}, sum[tile], rows, column);
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 4 * kTiles; ++i) {
          const int mine = q + 2 * c() + i % 2, slot = first + 16 * (i / 4) + i % 4 / 2 * 8 + g();
          if (mine >= sharing() || slot >= padded_slots()) continue;
          weights(head * sharing() + mine)[slot] = factor * sum[i / 4][i % 4];
        }
      }
    }
  }

  // Weighted sums of the values, for 4 or 8 query heads at once.
  MSRNN_FN void add_values(int count) const {
    if (sharing() <= 4) {
      add_values<1>(count);
    } else {
      add_values<2>(count);
    }
  }

  // The weights of 4 slots, from `slot` on, as a lane's part of the right factor.
  MSRNN_FN void load_weights(int head, int slot, bool present, uint32_t (&pairs)[2]) const {
    Number<float> w[4] = {};
    if (present) Stored<float>::unpack(chunk_at(weights(head) + slot), w);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float low = w[2 * i].v, high = w[2 * i + 1].v;
      const uint32_t rounded = two_halves(T{}, low, high);
      const uint32_t rest =
          two_halves(T{}, low - low_half(T{}, rounded), high - high_half(T{}, rounded));
      pairs[i] = g() < 4 ? rounded : rest;
    }
  }

  // A unit is 64 elements of a key-value head, for `quads` times 4 query heads. Warps beside each
  // other take the query heads that share values: one reads memory, the other its cache.
  template <int quads>
  MSRNN_FN void add_values(int count) const {
    constexpr int kTiles = 3 - quads;  // of 16 slots, in flight
    const int blocks = (row_chunks() + 7) / 8;
    const int passes = (sharing() + 4 * quads - 1) / (4 * quads);
    const int units = kv_heads() * passes * blocks;
    const int warps = warps_of_unit(units), part = warp() % warps;
#pragma unroll 1
    for (int first_unit = 0; first_unit < units; first_unit += kStepWarps / warps) {
      const int unit = first_unit + warp() / warps, slots = unit < units ? count : 0;
      const int head = unit / (passes * blocks), q = unit % passes * 4 * quads;
      const int group = static_cast<int>(s.group_of(head)), query_head = head * sharing() + q;
      const int chunk = unit / passes % blocks * 8 + g();
      const char* const values = s.values + s.row_offset(row, head, begin());
      float sum[quads][4][4] = {};
#pragma unroll 1
      for (int first = 16 * kTiles * part; first < slots; first += 16 * kTiles * warps) {
        Chunk value[kTiles][4];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const int slot = first + 16 * tile + 4 * c();
          const uint32_t there = occupied_from(group, slot);  // an empty one may hold anything
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const char* const from = values + (slot + r) * row_bytes();
            value[tile][r] = load_chunk(from, chunk, there >> r & 1);
          }
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const Chunk(&v)[4] = value[tile];
          uint32_t rows[4][4];
#pragma unroll
          for (int w = 0; w < 4; ++w) {
            rows[w][0] = low_halves(v[0].word[w], v[1].word[w]);
            rows[w][1] = high_halves(v[0].word[w], v[1].word[w]);
            rows[w][2] = low_halves(v[2].word[w], v[3].word[w]);
            rows[w][3] = high_halves(v[2].word[w], v[3].word[w]);
          }
#pragma unroll
          for (int k = 0; k < quads; ++k) {
            const int mine = 4 * k + g() % 4;
            uint32_t weight[2];
            load_weights(query_head + mine, first + 16 * tile + 4 * c(), q + mine < sharing(),
                         weight);
#pragma unroll
            for (int w = 0; w < 4; ++w) multiply_add(T{}, sum[k][w], rows[w], weight);
          }
        }
      }
      // A lane has both parts of one head's sums once it has traded columns with lane c ^ 2.
      const bool odd = c() >= 2;
      const int mine = 2 * (c() % 2) + odd;
      float x[quads][8];
#pragma unroll
      for (int k = 0; k < quads; ++k) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float even_column = sum[k][i / 2][i % 2 * 2];
          const float odd_column = sum[k][i / 2][i % 2 * 2 + 1];
          const float other = __shfl_xor_sync(~0u, odd ? even_column : odd_column, 2);
          const float rounded = odd ? other : even_column, rest = odd ? odd_column : other;
          x[k][i] = fabsf(rounded) < kInfinity ? rounded + rest : rounded;  // an infinite value
        }
      }
#pragma unroll 1
      for (int turn = 0; turn < warps; ++turn) {
        if (turn > 0) __syncthreads();
        if (turn != part || unit >= units || chunk >= row_chunks()) continue;
#pragma unroll
        for (int k = 0; k < quads; ++k) {
          if (q + 4 * k + mine >= sharing()) continue;
          add_to_output(x[k], turn, warps, query_head + 4 * k + mine, 8 * chunk);
        }
      }
    }
  }
};

}  // namespace gpu
}  // namespace msrnn
