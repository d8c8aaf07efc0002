// Look-back: how the tiles of one chain hand the carry on while different blocks work on them.
//
// Tiles form aligned groups. A tile publishes its span, waits for the spans of the tiles before it
// in its group and for the carry of the group before, and folds these in order. The last tile of a
// group publishes the group's carry. So the shape of a call fixes the order of every operation, and
// results are the same bits for any schedule and in any run. Folding from whatever carry is already
// there would be cheaper: here a tile reads on average half a group of spans, which is 8 x 12 bytes
// for a channel and 256 steps (6 % of the bytes of a bfloat16 minGRU, from L2), and a chain
// advances by one group, 4096 steps, with each exchange.
//
// Tickets make this safe. A block waits for lower tickets only, and whoever holds the lowest
// unfinished ticket waits for nobody. A block works through its tickets in order, so it may also
// draw ahead in order to load ahead. Flags belong to one call. The host clears 4 bytes for each
// tile in the stream before the launch: a memset of 2 us by estimate, which graphs capture with the
// launch. In return no state is left between calls, streams and replays.
#pragma once

#include <cstring>

#include "../recurrence.h"
#include "device.h"
#include "scan.h"

namespace msrnn {
namespace gpu {

// The exchange of one tile. The whole first warp of its block takes part, a thread for each
// channel.
template <class Space, class V>
struct LookBack {
  using S = typename V::Scalar;
  using Span = typename Space::template Span<V>;
  static constexpr int kWords = sizeof(Span) / sizeof(S);

  int channels;                      // of a tile
  Span* window;                      // shared, [kScanWindow][channel]: the spans of tiles before
  uint32_t *tile_flag, *group_flag;  // of this tile and its group; those of earlier ones precede
  S *span, *carry;                   // of this thread's channel, likewise
  int behind;                        // tiles of the group before this one
  bool first_group, mine, passes_span, passes_carry;

  MSRNN_FN LookBack(const ScanCall& call, int chain, int tile, int channels, Span* window)
      : channels(channels), window(window + threadIdx.x) {
    const ScanPlan& plan = call.plan;
    const ScanExchange& exchange = call.exchange;
    const int size = static_cast<int>(plan.group), group = tile / size;
    const int64_t at = chain * plan.tiles + tile, group_at = chain * plan.groups + group;
    const bool last = tile + 1 == plan.tiles, closes = tile + 1 == (group + 1) * size;
    tile_flag = exchange.tile_flags + at;
    group_flag = exchange.group_flags + group_at;
    span = static_cast<S*>(exchange.spans) + at * kWords * channels + threadIdx.x;
    carry = static_cast<S*>(exchange.carries) + group_at * 2 * channels + threadIdx.x;
    behind = tile - group * size;
    first_group = group == 0;
    mine = threadIdx.x < channels;
    passes_span = !last && !closes;
    passes_carry = !last && closes;
  }

  // Waits until a flag has been set and returns it.
  static MSRNN_FN uint32_t await(const uint32_t* flag) {
    uint32_t value;
    while (!(value = load_acquire(flag))) spin_pause();
    return value;
  }

  // Hands on what the tile does to a state that enters it.
  MSRNN_FN void publish(const Span& total, bool starts) const {
    if (!passes_span) return;
    if (mine) {
      S word[kWords];
      memcpy(word, &total, sizeof total);
#pragma unroll
      for (int i = 0; i < kWords; ++i) span[i * channels] = word[i];
    }
    __syncwarp();
    if (threadIdx.x == 0) store_release(tile_flag, starts ? 3 : 1);
  }

  // The carry into the tile: that of the group before, or `first`, through the spans of the tiles
  // before it in its group.
  MSRNN_FN Carry<V> collect(Carry<V> first) const {
    Carry<V> c = first;
    bool before = !first_group;  // the carry of the group before is still to be had
    int left = behind;
#pragma unroll 1
    do {
      const int count = left < kScanWindow ? left : kScanWindow;
      const uint32_t flag = threadIdx.x < count ? await(tile_flag - left + threadIdx.x) : 0;
      const uint32_t starting = __ballot_sync(~0u, flag == 3);
      __syncwarp();  // a vote orders no memory, and other threads acquired the spans
      if (mine) {
        const S* from = span - left * kWords * channels;
        for (int k = 0; k < count; ++k) {
          S word[kWords];
#pragma unroll
          for (int i = 0; i < kWords; ++i, from += channels) word[i] = load_coherent(from);
          memcpy(static_cast<void*>(&window[k * channels]), word, sizeof(Span));
        }
      }
      if (before) {
        if (threadIdx.x == 0) await(group_flag - 1);
        __syncwarp();
        if (mine) c = {V(load_coherent(carry - 2 * channels)), V(load_coherent(carry - channels))};
        before = false;
      }
      if (mine) {
#pragma unroll 1
        for (int k = 0; k < count; ++k) {
          c = carry_after<Space>(c, window[k * channels], starting >> k & 1);
        }
      }
      left -= count;
    } while (left > 0);
    return c;
  }

  // Hands on the carry after the last tile of a group.
  MSRNN_FN void close(const Carry<V>& after) const {
    if (!passes_carry) return;
    if (mine) {
      carry[0] = after.value.v;
      carry[channels] = after.rest.v;
    }
    __syncwarp();
    if (threadIdx.x == 0) store_release(group_flag, 1);
  }
};

}  // namespace gpu
}  // namespace msrnn
