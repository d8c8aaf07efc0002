// A tile in the hands of its block: what lies in shared memory, which steps and channels a thread
// has, and how its numbers are loaded and stored. scan.cuh walks and composes them.
#pragma once

#include <cstring>
#include <type_traits>

#include "memory.h"
#include "sequences.h"

namespace msrnn {
namespace gpu {

// Which tile of which chain, and where that lies in the tensors. A negative chain means no tile.
struct alignas(16) Tile {
  int chain, index;
  int batch, channel;  // row of the tensors; first channel
};

// Spans and states lie in shared memory as words that are `stride` scalars apart, so that
// neighbouring channels are neighbours.
template <class X, class S>
MSRNN_FN X gather(const S* from, int stride) {
  S word[sizeof(X) / sizeof(S)];
#pragma unroll
  for (S& w : word) w = *from, from += stride;
  X x;
  memcpy(static_cast<void*>(&x), word, sizeof x);
  return x;
}
template <class X, class S>
MSRNN_FN void scatter(S* to, int stride, const X& x) {
  S word[sizeof(X) / sizeof(S)];
  memcpy(word, &x, sizeof x);
#pragma unroll
  for (const S& w : word) *to = w, to += stride;
}

// Op is one of recurrence.h, and T is what the tensors hold.
template <class Op, class T, bool backward>
struct ScanTile {
  using Memory = Stored<T>;
  using V = typename Memory::V;
  using S = typename V::Scalar;
  using Space = std::conditional_t<backward, Adjoint, typename Op::Space>;
  using State = typename Space::template State<V>;
  using Span = typename Space::template Span<V>;
  static constexpr bool kLogarithmic = std::is_same_v<typename Op::Space, LogSpace>;
  static constexpr int kVector = Memory::count;
  static constexpr int kVectorLog2 = kVector == 8 ? 3 : kVector == 4 ? 2 : 1;
  static constexpr int kInputs = backward ? Op::saved : Op::inputs;
  // A step is read from these tensors: the inputs and, backward, the state before and the gradient.
  static constexpr int kSources = backward ? kInputs + 2 : kInputs;
  static constexpr int kWords = sizeof(Span) / sizeof(S);
  static constexpr int kParts = 8;  // of the rows of a tile
  static constexpr int kRowChunks = kVector * sizeof(S) / 16;

  static ScanShared lay_out_shared(const ScanPlan& p) {
    const int threads = p.lanes * p.rows, channels = p.lanes * kVector;
    int32_t at = 0;
    const auto take = [&](size_t size, int count) {
      const int32_t here = at;
      at += static_cast<int32_t>(size) * count;
      return here;
    };
    ScanShared m{};
    take(sizeof(Chunk), kSources * kScanSteps * threads);  // the slots
    m.rows = take(sizeof(Span), threads * kVector);
    m.parts = take(sizeof(Span), kParts * channels);
    m.window = take(sizeof(Span), p.look_back ? kScanWindow * channels : 0);
    m.carry = take(sizeof(Carry<V>), p.look_back ? 0 : channels);
    m.entering_tile = take(sizeof(State), channels);
    m.tiles = take(sizeof(Tile), 4);
    m.warp_starts = take(4, threads / 32);
    m.part_starts = take(4, 2 * kParts);
    m.unusable = take(4, threads / 32);
    m.marks = take(sizeof(Marks), threads);
    m.bytes = at;
    return m;
  }

  const ScanCall& call;
  const Walk walk;

  MSRNN_FN explicit ScanTile(const ScanCall& c) : call(c), walk{c, c.reverse != backward} {}

  // Shared memory.

  // [source][step][thread]: 16 bytes each, waiting for their step.
  MSRNN_FN Chunk& slot(int source, int step) const {
    return in_shared<Chunk>(0)[(source * kScanSteps + step) * threads() + threadIdx.x];
  }
  // [word][row][channel]: the span of a row, and later the state that enters the row.
  MSRNN_FN S* row_words(int row) const { return in_shared<S>(call.shared.rows) + row * channels(); }
  MSRNN_FN int plane() const { return call.plan.rows * channels(); }
  // [part][word][channel]: the span of a part, and later that of all parts before it.
  MSRNN_FN S* part_words(int part) const {
    return in_shared<S>(call.shared.parts) + part * kWords * channels();
  }
  // This thread's piece of the first plane. While the thread walks, nobody else looks at it, so it
  // may hold numbers on their way to or from memory, where these go one at a time.
  MSRNN_FN S* staged() const { return row_words(row()) + lane() * kVector; }
  // [channel]: the state that enters the tile.
  MSRNN_FN State* entering_tile() const { return in_shared<State>(call.shared.entering_tile); }
  // [channel]: the carry into the next tile, where a block walks its chain.
  MSRNN_FN Carry<V>* carry() const { return in_shared<Carry<V>>(call.shared.carry); }
  // [4]: the last tile, which some warp may still be at, the one at work, the next one, and the one
  // after it. They stay in shared memory, since registers are short.
  MSRNN_FN Tile& tile(int turn) const { return in_shared<Tile>(call.shared.tiles)[turn & 3]; }
  // [warp]: the threads, a bit each, that have a step with which a state starts. [part]: whether
  // its rows have one, and whether a part before it does.
  MSRNN_FN uint32_t* warp_starts() const { return in_shared<uint32_t>(call.shared.warp_starts); }
  MSRNN_FN uint32_t* part_starts() const { return in_shared<uint32_t>(call.shared.part_starts); }
  MSRNN_FN uint32_t* part_started() const { return part_starts() + kParts; }
  // [warp]: whether one of its spans is of no use.
  MSRNN_FN uint32_t* warp_unusable() const { return in_shared<uint32_t>(call.shared.unusable); }
  // What is special about the steps of this thread.
  MSRNN_FN Marks& own_marks() const { return in_shared<Marks>(call.shared.marks)[threadIdx.x]; }

  // This thread's place.

  static MSRNN_FN int threads() { return blockDim.x; }
  MSRNN_FN int channels() const { return call.plan.lanes * kVector; }  // of a tile
  MSRNN_FN int warp() const { return threadIdx.x / 32; }
  MSRNN_FN int lane() const { return threadIdx.x & (call.plan.lanes - 1); }
  MSRNN_FN int row() const { return threadIdx.x >> call.plan.lanes_log2; }
  MSRNN_FN int parts() const { return call.plan.rows < kParts ? call.plan.rows : kParts; }
  MSRNN_FN int part_rows() const { return call.plan.rows < kParts ? 1 : call.plan.rows / kParts; }

  // This thread's share of a tile: its first step and how many it has, and its first channel and
  // how many it has. It has no channels if that number is not positive.
  MSRNN_FN int first_of(const Tile& t) const {
    return (t.index * call.plan.rows + row()) * kScanSteps;
  }
  MSRNN_FN int count_of(const Tile& t) const {
    const int left = static_cast<int>(call.time) - first_of(t);
    return left < 0 ? 0 : left > kScanSteps ? kScanSteps : left;
  }
  MSRNN_FN int channel_of(const Tile& t) const { return t.channel + lane() * kVector; }
  MSRNN_FN int channels_of(const Tile& t) const {
    const int left = static_cast<int>(call.channels) - channel_of(t);
    return left > kVector ? kVector : left;
  }

  // Loads and stores.

  // An address at this thread's first step and channel of a tile, and the bytes to the next step.
  struct Cursor {
    char* at;
    int64_t step;
  };
  MSRNN_FN Cursor cursor(const Tile& t, const View& v) const {
    char* const row = v.data + t.batch * v.row + channel_of(t) * v.channel;
    return {row + walk.time(first_of(t)) * v.time, walk.descending ? -v.time : v.time};
  }

  // Starts to load steps [first, end) of a tile into their slots. What is not aligned to 16 bytes
  // is loaded at once.
  MSRNN_FN void load_tile(const Tile& t, int first = 0, int end = kScanSteps) const {
    const int present = t.chain < 0 ? 0 : channels_of(t);
    if (present <= 0) return;
#pragma unroll
    for (int source = 0; source < kSources; ++source) {
      const bool of_state = backward && source == kInputs;
      const bool of_grad = backward && source == kInputs + 1;
      const View& v = of_state ? call.state : of_grad ? call.grad_state : call.input[source];
      if (of_grad && !v.data) continue;
      int count = count_of(t);
      Cursor from = cursor(t, v);
      if (of_state) {  // the state before a step is one step on; before the first of all it is h0
        from.at += from.step;
        const int before = static_cast<int>(call.time) - 1 - first_of(t);
        if (count > before) count = before;
      }
      if (call.wide[of_state ? 3 : of_grad ? 4 : source]) {
#pragma unroll
        for (int step = 0; step < kScanSteps; ++step, from.at += from.step) {
          if (step >= first && step < end && step < count) {
            copy_async(&slot(source, step), from.at);
          }
        }
      } else {
#pragma unroll 1
        for (int step = 0; step < count; ++step, from.at += from.step) {
          if (step < first || step >= end) continue;
          T* to = reinterpret_cast<T*>(&slot(source, step));
#pragma unroll 1
          for (int c = 0; c < kVector; ++c) {  // zeros, so that absent channels ask for nothing
            to[c] = c < present ? *reinterpret_cast<const T*>(from.at + c * v.channel) : T{};
          }
        }
      }
    }
  }

  // Puts inputs into the slots of the steps that no sequence covers with which they make the state
  // 0, and backward gradients of 0, whatever the tensors hold there.
  MSRNN_FN void fill_uncovered(const Marks& mark) const {
    // A gate that is closed lets a state of 0 stay; in log-space log h = log b = 0.
    constexpr int kGate = !backward && Op::gated && !kLogarithmic ? kInputs - 2 : -1;
#pragma unroll 1
    for (int step = 0; step < kScanSteps; ++step) {
      if (!mark.uncovered(step)) continue;
#pragma unroll
      for (int source = 0; source < kSources; ++source) {
        V x[kVector];
#pragma unroll
        for (V& each : x) each = source == kGate ? V::minus_infinity() : V(0);
        slot(source, step) = Memory::pack(x);
      }
    }
  }

  MSRNN_FN void store(const Tile& t, const View& v, bool wide, char* to,
                      const V (&x)[kVector]) const {
    const Chunk chunk = Memory::pack(x);
    if (wide) {
      if (channels_of(t) > 0) *reinterpret_cast<Chunk*>(to) = chunk;
      return;
    }
    memcpy(staged(), &chunk, sizeof chunk);
#pragma unroll 1
    for (int c = 0; c < channels_of(t); ++c) {
      *reinterpret_cast<T*>(to + c * v.channel) = reinterpret_cast<const T*>(staged())[c];
    }
  }

  // The first steps of a thread may wait in their own slots for the second walk. A slot holds four
  // numbers: first what each channel adds, then what it keeps, as far as the slots reach.
  static MSRNN_FN V& parked(Step<V> (&steps)[kVector], int i) {
    return i < kVector ? steps[i].added : steps[i - kVector].kept;
  }
  MSRNN_FN void park(Step<V> (&steps)[kVector], int step) const {
#pragma unroll
    for (int source = 0; source < kSources; ++source) {
      float four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) four[i] = parked(steps, 4 * source + i).v;
      Chunk chunk;
      memcpy(&chunk, four, sizeof chunk);
      slot(source, step) = chunk;
    }
  }
  MSRNN_FN void unpark(Step<V> (&steps)[kVector], int step) const {
#pragma unroll
    for (int source = 0; source < kSources; ++source) {
      const Chunk chunk = slot(source, step);
      float four[4];
      memcpy(four, &chunk, sizeof chunk);
#pragma unroll
      for (int i = 0; i < 4; ++i) parked(steps, 4 * source + i) = V(four[i]);
    }
  }

  // Spans and states of a row.

  // Like gather and scatter, for all channels of this thread's row, 16 bytes at a time.
  template <class X>
  MSRNN_FN void gather_row(X (&x)[kVector]) const {
    constexpr int kCount = sizeof(X) / sizeof(S);
    S word[kCount][kVector];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const auto* from = reinterpret_cast<const Chunk*>(staged() + i * plane());
#pragma unroll
      for (int k = 0; k < kRowChunks; ++k) {
        const Chunk chunk = from[k];
        memcpy(&word[i][k * kVector / kRowChunks], &chunk, sizeof chunk);
      }
    }
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
      S one[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) one[i] = word[i][c];
      memcpy(static_cast<void*>(&x[c]), one, sizeof one);
    }
  }
  MSRNN_FN void scatter_row(const Span (&x)[kVector]) const {
    S word[kVector][kWords];
    memcpy(word, x, sizeof word);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      S along[kVector];
#pragma unroll
      for (int c = 0; c < kVector; ++c) along[c] = word[c][i];
      auto* to = reinterpret_cast<Chunk*>(staged() + i * plane());
#pragma unroll
      for (int k = 0; k < kRowChunks; ++k) {
        Chunk chunk;
        memcpy(&chunk, &along[k * kVector / kRowChunks], sizeof chunk);
        to[k] = chunk;
      }
    }
  }

  // Sequences.

  // Which sequence a marked step of this thread belongs to.
  MSRNN_FN int64_t sequence_of(const Tile& t, const Marks& mark, int step) const {
    if (!call.cu_seqlens) return t.batch;
    const int n = walk.find_from(mark.sequence, walk.time(first_of(t) + step));
    return n < 0 ? 0 : n;  // cu_seqlens may hold anything
  }
  // The state of a sequence for which none is given.
  static MSRNN_FN V initial(bool adjoint) {
    return !adjoint && kLogarithmic ? V::minus_infinity() : V(0);
  }
  // This thread's channels of a (sequences, channels) state, at the sequence of a step.
  MSRNN_FN void fetch(const Tile& t, const Marks& mark, int step, const void* states, bool adjoint,
                      V (&x)[kVector]) const {
    if (!states) {
      for (V& each : x) each = initial(adjoint);
      return;
    }
    const S* from =
        static_cast<const S*>(states) + sequence_of(t, mark, step) * call.channels + channel_of(t);
#pragma unroll 1
    for (int c = 0; c < channels_of(t); ++c) staged()[c] = from[c];
#pragma unroll
    for (int c = 0; c < kVector; ++c) x[c] = V(staged()[c]);
  }
  MSRNN_FN void enter_sequence(const Tile& t, const Marks& mark, int step,
                               State (&state)[kVector]) const {
    V h[kVector];
    fetch(t, mark, step, mark.enters(step) ? call.entering : nullptr, backward, h);
#pragma unroll
    for (int c = 0; c < kVector; ++c) state[c] = Space::enter(h[c]);
  }
  MSRNN_FN void leave_sequence(const Tile& t, const Marks& mark, int step,
                               const State (&state)[kVector]) const {
    if (!call.leaving) return;
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
      staged()[c] = (backward && mark.cut(step) ? V(0) : Space::value_of(state[c])).v;
    }
    S* to =
        static_cast<S*>(call.leaving) + sequence_of(t, mark, step) * call.channels + channel_of(t);
#pragma unroll 1
    for (int c = 0; c < channels_of(t); ++c) to[c] = staged()[c];
  }
};

}  // namespace gpu
}  // namespace msrnn
