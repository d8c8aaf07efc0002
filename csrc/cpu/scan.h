// What the CPU scan kernels take: raw pointers and strides, and no torch.
#pragma once

#include <sched.h>

#include "../dtype.h"
#include "../scan.h"

namespace msrnn {

// Steps that a state runs through: a row of a batch, or one of several sequences packed along time,
// or a piece of either between resets.
struct Segment {
  int64_t row;
  int64_t start;     // first time index
  int64_t length;    // time steps
  int64_t sequence;  // of the initial and final states
  bool enters;       // starts from the sequence's initial state; otherwise from zero
  bool leaves;       // ends in the sequence's final state
};

// One call. Initial and final states are (segments, channels), contiguous, float or, for float64,
// double. A null pointer means zero (log 0 for log_scan's h0) on the way in, and not wanted on the
// way out.
struct Scan {
  ScanOp op;
  DType dtype;   // of every View
  bool reverse;  // the recurrence runs from the last time step to the first
  bool packed;   // channels of every View are adjacent in memory
  bool stream;   // non-temporal stores, since outputs exceed the cache and are aligned
  int64_t channels;
  const Segment* segments;

  View input[3];       // a, b | log a, log b | gate, candidate | forget, input, candidate
  View state;          // h: written forward, read backward
  View grad_state;     // backward: gradient of h, or absent
  View grad_input[3];  // backward: written

  const void* h0;
};

// A piece of one segment: `rows` steps from `first`, counted in walking order (backward walks the
// recurrence from its end), for channels [channel_begin, channel_end).
//
// A tile with `wait == nullptr` starts from a known carry and walks. Any other works from a zero
// carry, waits until *wait is non-zero, and applies the carry of the tile before it.
struct Tile {
  int64_t segment;
  int64_t first, rows;
  int64_t channel_begin, channel_end;
  const void* before;  // carry entering, one scalar a channel from channel 0; or null
  void* after;         // carry leaving, likewise
  const uint32_t* wait;
  uint32_t* post;
};

// Scalars of scratch memory that a tile needs, for up to 16 lanes.
MSRNN_SCALAR int64_t scratch_scalars(const Tile& t) {
  return (6 + (t.wait ? 5 * t.rows : 0)) * padded(t.channel_end - t.channel_begin);
}

// Before other threads read what was written with non-temporal stores.
MSRNN_SCALAR void store_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

using TileFunction = void (*)(const Scan&, const Tile&, void* scratch);

struct ScanKernels {
  TileFunction forward, backward;
};

// float64 is served by `baseline` alone.
ScanKernels scan_kernels_baseline(DType);
#if defined(__x86_64__)
ScanKernels scan_kernels_avx2(DType);
ScanKernels scan_kernels_avx512(DType);
#endif

}  // namespace msrnn
