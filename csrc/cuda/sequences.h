// Where sequences start and end and where resets cut them, as a tile walks over the steps of a
// batch row.
#pragma once

#include "device.h"
#include "scan.h"

namespace msrnn {
namespace gpu {

// The sequences as a tile walks over them. A walking position w counts from the start of the walk.
struct Walk {
  const ScanCall& call;
  bool descending;  // in time

  MSRNN_FN int time(int w) const { return descending ? static_cast<int>(call.time) - 1 - w : w; }

  // Where sequence n, up to `sequences`, starts in time. It is in bounds whatever cu_seqlens holds.
  MSRNN_FN int start(int n) const {
    const int64_t t = call.long_ends ? static_cast<const int64_t*>(call.cu_seqlens)[n]
                                     : static_cast<const int32_t*>(call.cu_seqlens)[n];
    return static_cast<int>(t < 0 ? 0 : t > call.time ? call.time : t);
  }
  // The packed sequence that holds time t: the last one to start at or before it, or -1.
  MSRNN_FN int find(int t) const {
    int low = -1, high = static_cast<int>(call.sequences);
#pragma unroll 1
    while (low + 1 < high) {
      const int middle = low + (high - low) / 2;
      (start(middle) <= t ? low : high) = middle;
    }
    return low;
  }
  // The same, walking on from sequence n of an earlier position.
  MSRNN_FN int find_from(int n, int t) const {
    if (descending) {
#pragma unroll 1
      while (n >= 0 && t < start(n)) --n;
    } else {
#pragma unroll 1
      while (n + 1 < call.sequences && t >= start(n + 1)) ++n;
    }
    return n;
  }
  // Whether a reset lies on the border before position w, which may be the end of the walk.
  MSRNN_FN bool resets_before(int batch, int w) const {
    const int64_t t = descending ? call.time - w : w;
    if (t >= call.time) return false;
    return static_cast<const uint8_t*>(call.resets)[batch * call.resets_row + t * call.resets_time];
  }
};

// What is special about a thread's steps, as the pass at work meets them: groups of a bit for each.
struct Marks {
  uint32_t bits;
  int sequence;  // of the first step

  // Whether nothing is left of what came before a step, and whether a sequence's state enters
  // there.
  MSRNN_FN bool starts(int step) const { return bits >> step & 1; }
  MSRNN_FN bool any_starts() const { return bits & ((1u << kScanSteps) - 1); }
  MSRNN_FN bool enters(int step) const { return bits >> (kScanSteps + step) & 1; }
  // Whether a sequence ends with the step, so that its state leaves.
  MSRNN_FN bool ends(int step) const { return bits >> (2 * kScanSteps + step) & 1; }
  // Backward, whether the next step of the walk does not hold the state before this one, since a
  // sequence ends here or, which also says cut(), a reset lies behind the step.
  MSRNN_FN bool alone(int step) const { return bits >> (3 * kScanSteps + step) & 1; }
  MSRNN_FN bool cut(int step) const { return bits >> (4 * kScanSteps + step) & 1; }
  MSRNN_FN bool uncovered(int step) const { return bits >> (5 * kScanSteps + step) & 1; }
  MSRNN_FN bool any_uncovered() const { return bits >> 5 * kScanSteps; }
};

MSRNN_FN Marks pack(uint32_t starts, uint32_t enters, uint32_t ends, uint32_t cut,
                    uint32_t uncovered, int sequence) {
  const uint32_t alone = ends | cut;
  return {starts | enters << kScanSteps | ends << 2 * kScanSteps | alone << 3 * kScanSteps |
              cut << 4 * kScanSteps | uncovered << 5 * kScanSteps,
          sequence};
}

MSRNN_FN Marks marks(const Walk& walk, int batch, int first, int count) {
  const ScanCall& call = walk.call;
  const int last = static_cast<int>(call.time) - 1 - first;
  uint32_t enters = first == 0 && count > 0;
  uint32_t ends = last >= 0 && last < count ? 1u << last : 0;
  if (!call.cu_seqlens && !call.resets) return pack(enters, enters, ends, 0, 0, batch);
  uint32_t uncovered = 0, resets = 0;
  int sequence = batch;
  if (call.cu_seqlens) {
    enters = ends = 0;
    int n = sequence = count > 0 ? walk.find(walk.time(first)) : 0;
#pragma unroll 1
    for (int s = 0; s < count; ++s) {
      const int t = walk.time(first + s);
      n = walk.find_from(n, t);
      const int end = n < 0 ? 0 : walk.start(n + 1);
      if (t >= end) {
        uncovered |= 1u << s;
        continue;
      }
      const bool opens = t == walk.start(n), closes = t + 1 == end;
      if (walk.descending ? closes : opens) enters |= 1u << s;
      if (walk.descending ? opens : closes) ends |= 1u << s;
    }
  }
  if (call.resets && count > 0) {  // else the walk is over, and the border may lie before time 0
#pragma unroll
    for (int s = 0; s <= kScanSteps; ++s) {
      if (s <= count && walk.resets_before(batch, first + s)) resets |= 1u << s;
    }
  }
  // Forward, a reset at the first step of a sequence keeps its initial state out, and backward the
  // gradient of that in. In reverse it lies behind the last step and means nothing.
  const uint32_t all = (1u << count) - 1;
  const uint32_t starts = enters | uncovered | (resets & all);
  const uint32_t cut = resets >> 1 & all & (call.reverse ? ~ends : ~0u);
  if (!call.reverse && !walk.descending) enters &= ~resets;
  return pack(starts, enters, ends, cut, uncovered, sequence);
}

}  // namespace gpu
}  // namespace msrnn
