// Where sequences start and end, as a tile walks over the steps of a batch row.
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
};

// Which of a thread's steps start and end a sequence, as bits, and the sequence of its first step.
struct Marks {
  uint32_t starts, ends;
  int sequence;
};

MSRNN_FN Marks marks(const Walk& walk, int batch, int first, int count) {
  Marks m{0, 0, batch};
  if (!walk.call.cu_seqlens) {
    const int last = static_cast<int>(walk.call.time) - 1 - first;
    m.starts = first == 0 && count > 0;
    m.ends = last >= 0 && last < count ? 1u << last : 0;
    return m;
  }
  int n = m.sequence = count > 0 ? walk.find(walk.time(first)) : 0;
#pragma unroll 1
  for (int s = 0; s < count; ++s) {
    const int t = walk.time(first + s);
    n = walk.find_from(n, t);
    if (n < 0) continue;
    const bool opens = t == walk.start(n), closes = t + 1 == walk.start(n + 1);
    if (walk.descending ? closes : opens) m.starts |= 1u << s;
    if (walk.descending ? opens : closes) m.ends |= 1u << s;
  }
  return m;
}

}  // namespace gpu
}  // namespace msrnn
