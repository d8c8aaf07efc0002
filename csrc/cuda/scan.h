// The CUDA scans as the host sees them: the plan of a call, which is a pure function of shape and
// dtype, and the call itself, with raw pointers and no torch. scan.cuh has the kernel.
#pragma once

#include <cstddef>

#include "../dtype.h"
#include "../scan.h"

namespace msrnn {

constexpr int kScanSteps = 4;    // neighbouring time steps of one thread
constexpr int kScanWindow = 16;  // spans that a block folds at a time

// How a call is cut up. A tile is what a block works on at a time: `rows` threads along time, with
// kScanSteps steps each, times `lanes` threads along channels, with 16 bytes each. A chain is what
// must run in order: the tiles of one batch row and one block of channels.
//
// Results depend on the plan, so the plan depends on shape and dtype alone, never on the GPU.
struct ScanPlan {
  int32_t lanes, rows;  // powers of two
  int32_t lanes_log2;
  int64_t tile_steps, tile_channels;
  int64_t chains, tiles;  // tiles of each chain
  // Whether the tiles of a chain run side by side and hand the carry on through memory. Otherwise a
  // block walks each chain.
  bool look_back;
  // In look-back a tile folds the spans of its own group after the carry of the group before.
  int64_t group, groups;  // tiles of a group; groups of each chain
};

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline ScanPlan scan_plan(bool backward, int64_t element_size, int64_t rows, int64_t time,
                          int64_t channels) {
  // Enough chains keep a large GPU busy without look-back: four blocks for each of its 132
  // multiprocessors. A few tiles, one after the other, cost less than the exchange of carries.
  constexpr int64_t kEnoughChains = 528, kFewTiles = 4, kOneGroup = 64, kGroup = 16;
  const int most_threads = backward ? 128 : 256;
  const int64_t vectors = ceil_divide(channels * element_size, 16);

  ScanPlan p{};
  p.rows = 1;
  while (p.rows < most_threads / 4 && p.rows * kScanSteps < time) p.rows *= 2;
  p.lanes = 4;
  while (p.lanes * p.rows < 32) p.lanes *= 2;
  while (p.lanes < 32 && p.lanes * p.rows < most_threads && p.lanes < vectors) p.lanes *= 2;
  while (1 << p.lanes_log2 < p.lanes) ++p.lanes_log2;
  p.tile_steps = p.rows * kScanSteps;
  p.tile_channels = p.lanes * (16 / element_size);
  p.tiles = ceil_divide(time, p.tile_steps);
  p.chains = rows * ceil_divide(channels, p.tile_channels);
  p.look_back = p.tiles > kFewTiles && p.chains < kEnoughChains;
  p.group = p.tiles <= kOneGroup ? kOneGroup : kGroup;
  p.groups = ceil_divide(p.tiles, p.group);
  return p;
}

// What the blocks of a look-back share, in global memory.
struct ScanExchange {
  uint32_t* ticket;       // the next tile to be taken; chains take turns
  uint32_t* tile_flags;   // [chain][tile]: 0; 1 if its span is there; 3 if it starts a sequence too
  uint32_t* group_flags;  // [chain][group]: 0; 1 if its carry is there
  void* spans;            // [chain][tile][word][channel]
  void* carries;          // [chain][group][value, rest][channel]
};

// Bytes of the exchange, and how many of them must be zero before the launch.
struct ScanWorkspace {
  int64_t bytes, cleared;
};

// Lays the exchange out at `memory`. To learn the size, `memory` may be null.
inline ScanWorkspace lay_out(const ScanPlan& p, int64_t scalar_size, char* memory,
                             ScanExchange* exchange) {
  const int64_t tiles = p.chains * p.tiles, groups = p.chains * p.groups;
  const int64_t cleared = padded(16 + 4 * (tiles + groups));
  const int64_t carries = cleared + 3 * scalar_size * tiles * p.tile_channels;
  if (memory) {
    exchange->ticket = reinterpret_cast<uint32_t*>(memory);
    exchange->tile_flags = exchange->ticket + 4;
    exchange->group_flags = exchange->tile_flags + tiles;
    exchange->spans = memory + cleared;
    exchange->carries = memory + carries;
  }
  return {carries + 2 * scalar_size * groups * p.tile_channels, cleared};
}

// Where a block keeps what in shared memory, in bytes. scan_tile.h says what each is.
struct ScanShared {
  int32_t rows, parts, window, carry, entering_tile, tiles, warp_starts, part_starts, unusable,
      marks;
  int32_t bytes;
};

// One call. Initial and final states are (sequences, channels), contiguous, float or, for float64,
// double. A null pointer means zero (log 0 for log_scan's h0), or not wanted.
struct ScanCall {
  ScanPlan plan;
  int64_t rows, time, channels;
  bool reverse;  // the recurrence runs from the last time step to the first

  View input[3];       // a, b | log a, log b | gate, candidate | forget, input, candidate
  View state;          // h: written forward, read backward
  View grad_state;     // backward: gradient of h, or absent
  View grad_input[3];  // backward: written
  // Whether a view can be read or written 16 bytes at a time, in the order above.
  bool wide[8];

  const void* entering;  // the state before a sequence; backward: the gradient of its last state
  void* leaving;         // the state after it; backward: the gradient of h0
  const void* h0;        // backward only

  const void* cu_seqlens;  // (sequences + 1) of int32, or int64 with `long_ends`; or null
  bool long_ends;
  int64_t sequences;
  // (rows, time) of bytes, with these strides, or null: where one is set, nothing crosses the
  // border before its step.
  const void* resets;
  int64_t resets_row, resets_time;

  ScanExchange exchange;  // look-back only
  ScanShared shared;      // filled in by the launch
};

// Launches one kernel. Returns what the CUDA runtime says is wrong, or null.
const char* launch_scan(ScanOp op, DType dtype, bool backward, const ScanCall& call, void* stream);

}  // namespace msrnn
