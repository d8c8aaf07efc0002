// The scan kernel: every recurrence, forward and backward, on both paths.
//
// Level by level:
//   thread   4 neighbouring steps of 16 bytes of channels (8 of bfloat16), walked twice. The first
//            walk starts from zero and gives the thread's span: what its steps do to a state that
//            enters them (recurrence.h). The second starts from the state that does enter. Threads
//            that share steps are a row.
//   part     an eighth of the rows. One thread a channel composes their spans, one after the other;
//            once the state that enters the part is known it passes that through them.
//   tile     a block's work at a time: 256 steps x 64 bytes of channels, 128 steps backward, which
//            loads twice the bytes. One thread a channel composes the parts and gets the carry: the
//            state that enters the tile.
//   chain    the tiles of a batch row and a block of channels, in order. With enough chains a block
//            walks each of them and keeps the carry ("walk"). Otherwise blocks take tiles by
//            ticket, time-major across chains, and hand carries on through memory (look_back.h).
//
// Sequences packed by cu_seqlens stay one chain: a step that starts a sequence enters that
// sequence's own state and marks its span, and whatever comes before a marked span is dropped (not
// multiplied by 0: an infinity would become NaN). The start of a batch row is such a step too.
//
// Accuracy. A thread's 4 steps are plain. Spans carry both a and 1-a, and the carry from tile to
// tile is compensated. Emulated, float32, T = 8192, gates around -8: at most 7e-7, elementwise;
// 1.7e-6 when spans were composed with a alone.
//
// Memory. Each element is read and written once, 16 bytes at a time: 3 tensors of B*T*D for minGRU
// forward and 6 backward, 4 and 8 for minLSTM. Loads go to shared memory by cp.async, and a thread
// reads only what it loaded itself: shared memory serves as its asynchronous registers, without a
// barrier. Slots are refilled for the next tile once they are read, so a forward block has most of
// a tile (32 KB for minGRU) in flight while it composes, waits and stores; backward, where slots
// are read twice, other blocks of the multiprocessor have theirs. TMA would load the same bytes
// with fewer instructions (a load of 16 bytes is one here, an eighth of an element's 45) but needs
// a barrier between the engine and its readers and a descriptor per tensor: not used.
//
// Arithmetic an element of bfloat16 on sm_90, from the machine code (python -m bench.roofline). An
// H200 copies 4.3 TB/s with 132 multiprocessors at 1.98 GHz, so 6 bytes take 0.365 cycles of one:
// time for 47 instructions (128 a cycle) and 5.8 special functions (16 a cycle). minGRU takes 48
// and 4.0 forward, 80 and 6.1 backward of 93 and 11.7; minLSTM 58 and 5.0 of 62 and 7.8, 115 and
// 8.1 of 125 and 15.6. log_scan forward takes 54 and 3.3: the only one an H200 slows by more than
// 2 %.
//
// Rejected, in instructions of minGRU forward:
//   - spans composed by shuffles in a warp, then across warps: 11 more, half of it selects and
//     branches;
//   - a Newton step for the reciprocals of 16-bit data: 2 each; 1 - small accumulates no bias;
//   - one reciprocal for both gates: a special function less, an instruction more, and a NaN in one
//     gate poisons the other;
//   - gates computed again for the second walk: 8 special functions where memory leaves 5.8.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "look_back.h"
#include "memory.h"
#include "sequences.h"

namespace msrnn {
namespace gpu {

// A tile: of which chain, where in it, and where that lies. chain < 0: none.
struct alignas(16) Tile {
  int chain, index;
  int batch, channel;  // row of the tensors; first channel
};

// One block at work. Op is of recurrence.h; T is what tensors hold.
template <class Op, class T, bool backward>
struct ScanBlock {
  using Memory = Stored<T>;
  using V = typename Memory::V;
  using S = typename V::Scalar;
  using Space = std::conditional_t<backward, Adjoint, typename Op::Space>;
  using State = typename Space::template State<V>;
  using Span = typename Space::template Span<V>;
  static constexpr bool kLogarithmic = std::is_same_v<typename Op::Space, LogSpace>;
  // Whether a decay may be infinite, so that a span may be of no use.
  static constexpr bool kUnbounded = !Op::gated || (kLogarithmic && !backward);
  // Whether products of decays are looked at: they may vanish or overflow.
  static constexpr bool kClamped = !Op::gated;
  static constexpr bool kNeverLost = Op::gated && (backward || !kLogarithmic);
  // Whether steps are read again for the second walk, or else kept in registers, which frees their
  // slots for the next tile. (Registers are too few for logarithms of double.)
  static constexpr bool kReadTwice =
      backward || Op::cheap || (kLogarithmic && sizeof(T) == sizeof(double));
  // Of 16-bit data, 64 registers of them, which is a few too many: the first steps then wait in
  // their own slots, as far as they fit, and those slots are refilled late.
  static constexpr int kParked = kReadTwice || sizeof(T) > 2 ? 0 : Op::inputs - 1;
  static constexpr int kVector = Memory::count;
  static constexpr int kVectorLog2 = kVector == 8 ? 3 : kVector == 4 ? 2 : 1;
  static constexpr int kInputs = backward ? Op::saved : Op::inputs;
  static constexpr int kSources = backward ? kInputs + 2 : kInputs;  // backward: h before, grad
  static constexpr int kWords = sizeof(Span) / sizeof(S);
  static constexpr int kParts = 8;  // of a tile's rows: as many threads a channel
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

  MSRNN_FN explicit ScanBlock(const ScanCall& c) : call(c), walk{c, c.reverse != backward} {}

  template <class X>
  static MSRNN_FN X* in_shared(int offset) {
    return reinterpret_cast<X*>(dynamic_shared() + offset);
  }
  // Waiting for their step: [source][step][thread].
  MSRNN_FN Chunk& slot(int source, int step) const {
    return in_shared<Chunk>(0)[(source * kScanSteps + step) * threads() + threadIdx.x];
  }
  // [word][row][channel]: the span of a row, then the state that enters it.
  MSRNN_FN S* row_words(int row) const { return in_shared<S>(call.shared.rows) + row * channels(); }
  MSRNN_FN int plane() const { return call.plan.rows * channels(); }
  // [part][word][channel]: the span of some neighbouring rows, then of all parts before.
  MSRNN_FN S* part_words(int part) const {
    return in_shared<S>(call.shared.parts) + part * kWords * channels();
  }
  // This thread's piece of the first plane. While it walks, it is free to hold numbers on their way
  // one at a time.
  MSRNN_FN S* staged() const { return row_words(row()) + lane() * kVector; }
  // [channel]: the state that enters the tile.
  MSRNN_FN State* entering_tile() const { return in_shared<State>(call.shared.entering_tile); }
  // [channel]: on a walk, the carry into the next tile.
  MSRNN_FN Carry<V>* carry() const { return in_shared<Carry<V>>(call.shared.carry); }
  // [4]: the last tile, which some warp may still be at, the one at work, the next and the one
  // after it, as a thread drew them. They stay here since registers are short.
  MSRNN_FN Tile& tile(int turn) const { return in_shared<Tile>(call.shared.tiles)[turn & 3]; }
  // [warp]: bits of the threads whose steps start a sequence. [part]: whether its span starts one,
  // and whether one of the parts before it does.
  MSRNN_FN uint32_t* warp_starts() const { return in_shared<uint32_t>(call.shared.warp_starts); }
  MSRNN_FN uint32_t* part_starts() const { return in_shared<uint32_t>(call.shared.part_starts); }
  MSRNN_FN uint32_t* part_started() const { return part_starts() + kParts; }
  // [warp]: whether it has a span of no use.
  MSRNN_FN uint32_t* warp_unusable() const { return in_shared<uint32_t>(call.shared.unusable); }

  // Of this thread.
  MSRNN_FN Marks& own_marks() const { return in_shared<Marks>(call.shared.marks)[threadIdx.x]; }

  static MSRNN_FN int threads() { return blockDim.x; }
  MSRNN_FN int channels() const { return call.plan.lanes * kVector; }  // of a tile
  MSRNN_FN int warp() const { return threadIdx.x / 32; }
  MSRNN_FN int lane() const { return threadIdx.x & (call.plan.lanes - 1); }
  MSRNN_FN int row() const { return threadIdx.x >> call.plan.lanes_log2; }
  MSRNN_FN int parts() const { return call.plan.rows < kParts ? call.plan.rows : kParts; }
  MSRNN_FN int part_rows() const { return call.plan.rows < kParts ? 1 : call.plan.rows / kParts; }

  // What this thread does of a tile.
  MSRNN_FN int first_of(const Tile& t) const {
    return (t.index * call.plan.rows + row()) * kScanSteps;
  }
  MSRNN_FN int count_of(const Tile& t) const {
    const int left = static_cast<int>(call.time) - first_of(t);
    return left < 0 ? 0 : left > kScanSteps ? kScanSteps : left;
  }
  MSRNN_FN int channel_of(const Tile& t) const { return t.channel + lane() * kVector; }
  MSRNN_FN int channels_of(const Tile& t) const {  // none at all if 0 or less
    const int left = static_cast<int>(call.channels) - channel_of(t);
    return left > kVector ? kVector : left;
  }

  // A view at this thread's first step and channel of a tile, and how far it is to the next step.
  struct Cursor {
    char* at;
    int64_t step;
  };
  MSRNN_FN Cursor cursor(const Tile& t, const View& v) const {
    char* const row = v.data + t.batch * v.row + channel_of(t) * v.channel;
    return {row + walk.time(first_of(t)) * v.time, walk.descending ? -v.time : v.time};
  }

  // Starts to load a tile into the slots; what is not aligned is loaded at once.
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
      if (of_state) {  // the state before each step: h0 before the first of all
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

  // Which sequence a marked step of this thread belongs to.
  MSRNN_FN int64_t sequence_of(const Tile& t, const Marks& mark, int step) const {
    if (!call.cu_seqlens) return t.batch;
    const int n = walk.find_from(mark.sequence, walk.time(first_of(t) + step));
    return n < 0 ? 0 : n;  // cu_seqlens may hold anything
  }
  // The state where none is given.
  static MSRNN_FN V initial(bool adjoint) {
    return !adjoint && kLogarithmic ? V::minus_infinity() : V(0);
  }
  // This thread's channels of a (sequences, channels) state at the sequence of a step.
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
    fetch(t, mark, step, call.entering, backward, h);
#pragma unroll
    for (int c = 0; c < kVector; ++c) state[c] = Space::enter(h[c]);
  }
  MSRNN_FN void leave_sequence(const Tile& t, const Marks& mark, int step,
                               const State (&state)[kVector]) const {
    if (!call.leaving) return;
#pragma unroll
    for (int c = 0; c < kVector; ++c) staged()[c] = Space::value_of(state[c]).v;
    S* to =
        static_cast<S*>(call.leaving) + sequence_of(t, mark, step) * call.channels + channel_of(t);
#pragma unroll 1
    for (int c = 0; c < channels_of(t); ++c) to[c] = staged()[c];
  }

  struct Backward {
    V adjoint[kVector];  // the gradient of h that arrives at this step alone
    V factor[Op::inputs][kVector];
  };

  // Reads a step from its slots: the step as two numbers, and 1-a; backward also its gradients.
  MSRNN_FN void read(const Tile& t, const Marks& mark, int step, Step<V> (&steps)[kVector],
                     V (&lost)[kVector], Backward& b) const {
    V x[kSources][kVector];
#pragma unroll
    for (int source = 0; source < kSources; ++source) {
      Memory::unpack(slot(source, step), x[source]);
    }
    if constexpr (backward) {
      if (mark.ends >> step & 1)
        fetch(t, mark, step, call.h0, false, x[kInputs]);  // the first step of the recurrence
    }
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
      V in[kInputs];
#pragma unroll
      for (int i = 0; i < kInputs; ++i) in[i] = x[i][c];
      Gates<V> g;
      if constexpr (backward) {
        V factor[Op::inputs];
        g = Op::adjoint(in, x[kInputs][c], factor);
        b.adjoint[c] = call.grad_state.data ? x[kInputs + 1][c] : V(0);
        steps[c] = {g.kept, b.adjoint[c]};
#pragma unroll
        for (int i = 0; i < Op::inputs; ++i) b.factor[i][c] = factor[i];
      } else {
        g = Op::gates(in);
        steps[c] = Space::reduce(g);
      }
      lost[c] = g.lost;
    }
  }

  static MSRNN_FN void clamp(Span (&span)[kVector], const V (&a)[kVector], const V (&b)[kVector]) {
#pragma unroll
    for (int c = 0; c < kVector; ++c) span[c].kept = clamp_product(span[c].kept, a[c], b[c]);
  }

  // Spans and states lie in shared memory as words `stride` scalars apart, so that neighbouring
  // channels are neighbours.
  template <class X>
  static MSRNN_FN X gather(const S* from, int stride) {
    S word[sizeof(X) / sizeof(S)];
#pragma unroll
    for (S& w : word) w = *from, from += stride;
    X x;
    memcpy(static_cast<void*>(&x), word, sizeof x);
    return x;
  }
  template <class X>
  static MSRNN_FN void scatter(S* to, int stride, const X& x) {
    S word[sizeof(X) / sizeof(S)];
    memcpy(word, &x, sizeof x);
#pragma unroll
    for (const S& w : word) *to = w, to += stride;
  }
  // The same for all channels of this thread's row, 16 bytes at a time.
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

  static MSRNN_FN Span compose(const Span& x, const Span& y) {
    Span both = Space::then(x, y);
    if constexpr (kClamped) both.kept = clamp_product(both.kept, x.kept, y.kept);
    return both;
  }
  static MSRNN_FN Span settled(const Span& x) {
    if constexpr (kNeverLost) return Space::never_quite_lost(x);
    return x;
  }
  static MSRNN_FN State pass(const Span& x, bool starts, const State& before) {
    return starts ? x.state : Space::apply(x, before);
  }

  // Calls `each` for every channel of every part that is this thread's: with the channel, the part,
  // the part's first row and the bits of those of its rows that start a sequence, `lanes` apart.
  // (The rows of a part belong to one warp, and so do rows that follow: their bits come after.)
  template <class Each>
  MSRNN_FN void for_parts(const Each& each) const {
    const int channels_log2 = call.plan.lanes_log2 + kVectorLog2;
#pragma unroll 1
    for (int i = threadIdx.x; i < channels() * parts(); i += threads()) {
      const int part = i >> channels_log2, row = part * part_rows();
      const int first = row << call.plan.lanes_log2;  // thread
      each(i & (channels() - 1), part, row, warp_starts()[first / 32] >> first % 32);
    }
  }

  // From the spans of the rows to those of the parts.
  MSRNN_FN void fold_rows() const {
    for_parts([&](int channel, int part, int row, uint32_t starts) {
      const S* from = row_words(row) + channel;
      Span total = gather<Span>(from, plane());
      bool any = starts & 1;
      if (!starts) {
#pragma unroll 7
        for (int r = 1; r < part_rows(); ++r) {
          total = compose(total, gather<Span>(from += channels(), plane()));
        }
      } else {
#pragma unroll 1
        for (int r = 1; r < part_rows(); ++r) {
          const Span own = gather<Span>(from += channels(), plane());
          const bool own_starts = starts >> r * call.plan.lanes & 1;
          total = own_starts ? own : compose(total, own);
          any = any || own_starts;
        }
      }
      scatter(part_words(part) + channel, channels(), settled(total));
      if (channel == 0) part_starts()[part] = any;
    });
  }

  // From the spans of the parts to that of the tile, for one channel. Leaves in place of each
  // part's span that of all parts before it.
  MSRNN_FN Span fold_parts(int channel, bool& starts) const {
    Span total = Space::template no_steps<V>();
    starts = false;
#pragma unroll 1
    for (int part = 0; part < parts(); ++part) {
      S* const at = part_words(part) + channel;
      const Span own = gather<Span>(at, channels());
      const bool own_starts = part_starts()[part];
      scatter(at, channels(), total);
      if (channel == 0) part_started()[part] = starts;
      total = own_starts ? own : settled(compose(total, own));
      starts = starts || own_starts;
    }
    return total;
  }

  // From the state that enters the tile to those that enter the rows, in place of their spans.
  MSRNN_FN void enter_rows() const {
    for_parts([&](int channel, int part, int row, uint32_t starts) {
      const Span before = gather<Span>(part_words(part) + channel, channels());
      State state = pass(before, part_started()[part], entering_tile()[channel]);
      S* at = row_words(row) + channel;
      if (!starts) {
#pragma unroll 8
        for (int r = 0; r < part_rows(); ++r, at += channels()) {
          const Span own = gather<Span>(at, plane());
          scatter(at, plane(), state);
          state = Space::apply(own, state);
        }
      } else {
#pragma unroll 1
        for (int r = 0; r < part_rows(); ++r, at += channels()) {
          const Span own = gather<Span>(at, plane());
          scatter(at, plane(), state);
          state = pass(own, starts >> r * call.plan.lanes & 1, state);
        }
      }
    });
  }

  MSRNN_FN LookBack<Space, V> look_back(const Tile& t) const {
    return {call, t.chain, t.index, channels(), in_shared<Span>(call.shared.window)};
  }

  // From the spans of the parts to the state that enters the tile, and on to the tiles after it.
  // With `serial` the spans are of no use; hand_on() follows once the tile has been walked.
  MSRNN_FN void fold_tile(const Tile& t, bool serial) const {
    bool starts = false;
    if (call.plan.look_back) {  // at most 32 channels: the first warp, whole
      if (warp() > 0) return;
      const auto exchange = look_back(t);
      Span total = Space::template no_steps<V>();
      if (exchange.mine) total = fold_parts(threadIdx.x, starts);
      starts = __any_sync(~0u, starts);
      if (!serial) exchange.publish(total, starts);
      const Carry<V> c = exchange.collect({initial(backward), V(0)});
      if (exchange.mine) entering_tile()[threadIdx.x] = Space::enter(c.value);
      if (!serial && exchange.passes_carry) exchange.close(carry_after<Space>(c, total, starts));
      return;
    }
    for (int channel = threadIdx.x; channel < channels(); channel += threads()) {
      const Span total = fold_parts(channel, starts);
      const Carry<V> c = carry()[channel];
      entering_tile()[channel] = Space::enter(c.value);
      if (!serial) carry()[channel] = carry_after<Space>(c, total, starts);
    }
  }

  // Where a decay is infinite: infinity times the zero that a span starts from is NaN. The rows
  // walk one after the other, and the tile passes for one that starts a sequence with what it
  // leaves.
  MSRNN_FN void enter_rows_serially(const Tile& t, const Marks& mark,
                                    Step<V> (&steps)[kScanSteps][kVector],
                                    State (&state)[kVector]) const {
    State* const running = entering_tile() + lane() * kVector;
#pragma unroll 1
    for (int r = 0; r < call.plan.rows; ++r) {
      if (row() == r) {
        State now[kVector];
        for (int c = 0; c < kVector; ++c) state[c] = now[c] = running[c];
#pragma unroll
        for (int s = 0; s < kScanSteps; ++s) {
          if (s >= count_of(t)) break;
          Backward b;
          recall(t, mark, s, steps[s], b);
          if (mark.starts >> s & 1) enter_sequence(t, mark, s, now);
          for (int c = 0; c < kVector; ++c) now[c] = Space::walk(now[c], steps[s][c]);
        }
        for (int c = 0; c < kVector; ++c) running[c] = now[c];
      }
      __syncthreads();
    }
    hand_on(t);
    __syncthreads();
  }
  MSRNN_FN void hand_on(const Tile& t) const {
    if (call.plan.look_back) {
      if (warp() > 0) return;
      const auto exchange = look_back(t);
      Span total = Space::template no_steps<V>();
      if (exchange.mine) total.state = entering_tile()[threadIdx.x];
      exchange.publish(total, true);
      exchange.close({Space::value_of(total.state), V(0)});
      return;
    }
    for (int c = threadIdx.x; c < channels(); c += threads()) {
      carry()[c] = {Space::value_of(entering_tile()[c]), V(0)};
    }
  }

  // One tile, while the next is loaded and the one after it is drawn: ahead of its use, since a
  // ticket takes a trip to memory.
  MSRNN_FN void run(int turn) {
    Step<V> steps[kScanSteps][kVector];
    Span span[kVector];
    Marks& mark = own_marks();
    bool serial = false;
    {
      const Tile t = tile(turn);
      mark = marks(walk, t.batch, first_of(t), count_of(t));
      copies_done();
      first_walk(t, mark, steps, span);
      if constexpr (kUnbounded) {
#pragma unroll
        for (int c = 0; c < kVector; ++c) serial = serial || !Space::usable_span(span[c]);
        serial = __any_sync(~0u, serial && channels_of(t) > 0);
        if (threadIdx.x % 32 == 0) warp_unusable()[warp()] = serial;
      }
    }
    scatter_row(span);
    const uint32_t starting = __ballot_sync(~0u, mark.starts != 0);
    if (threadIdx.x % 32 == 0) warp_starts()[warp()] = starting;
    constexpr int kLate = kReadTwice ? kScanSteps : kParked;  // steps loaded at the end
    if (!kUnbounded && kLate < kScanSteps) load_tile(tile(turn + 1), kLate);
    const bool draws = threadIdx.x == threads() - 1;
    uint32_t drawn = 0;
    if (draws) drawn = draw_after(tile(turn + 1));
    __syncthreads();
    if constexpr (kUnbounded) {
      const int other = threadIdx.x % 32;
      serial = __any_sync(~0u, other < threads() / 32 && warp_unusable()[other]);
      if (!serial && kLate < kScanSteps) load_tile(tile(turn + 1), kLate);
    }
    fold_rows();
    if (draws) tile(turn + 2) = tile_at(drawn);
    __syncthreads();
    fold_tile(tile(turn), serial);
    __syncthreads();

    const Tile t = tile(turn);
    State state[kVector];
    if (serial) {
      enter_rows_serially(t, mark, steps, state);
    } else {
      enter_rows();
      __syncthreads();
      gather_row(state);
    }
    second_walk(t, mark, steps, state);
    load_tile(tile(turn + 1), 0, serial ? kScanSteps : kLate);
  }

  // The slots of a step hold four numbers a source: what is added, then what is kept as far as it
  // goes.
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

  // A step that the first walk has read.
  MSRNN_FN void recall(const Tile& t, const Marks& mark, int step, Step<V> (&steps)[kVector],
                       Backward& b) const {
    V lost[kVector];
    if constexpr (kReadTwice) {
      read(t, mark, step, steps, lost, b);
    } else if constexpr (kParked > 0) {
      if (step < kParked) unpark(steps, step);
    }
  }

  // From zero: the span of this thread's steps.
  MSRNN_FN void first_walk(const Tile& t, const Marks& mark, Step<V> (&steps)[kScanSteps][kVector],
                           Span (&span)[kVector]) const {
    const uint32_t starts = mark.starts;
#pragma unroll
    for (Span& x : span) x = Space::template no_steps<V>();
#pragma unroll
    for (int s = 0; s < kScanSteps; ++s) {
      if (s >= count_of(t)) break;
      V lost[kVector], before[kVector], own[kVector];
      Backward b;
      read(t, mark, s, steps[s], lost, b);
      bool ordinary = true;
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        if (s == 0) {
          span[c] = Space::span_of(steps[s][c], lost[c]);
          continue;
        }
        before[c] = span[c].kept;
        own[c] = steps[s][c].kept;
        span[c] = Space::extend(span[c], steps[s][c], lost[c]);
        ordinary = ordinary && is_ordinary(span[c].kept);
      }
      if constexpr (kClamped) {
        if (!ordinary) clamp(span, before, own);
      }
      if (starts >> s & 1) {
        State state[kVector];
        enter_sequence(t, mark, s, state);
#pragma unroll
        for (int c = 0; c < kVector; ++c) span[c].state = Space::walk(state[c], steps[s][c]);
      }
      if constexpr (kParked > 0) {
        if (s < kParked) park(steps[s], s);
      }
    }
#pragma unroll
    for (Span& x : span) x = settled(x);
  }

  // From the state that enters: the results.
  MSRNN_FN void second_walk(const Tile& t, const Marks& mark, Step<V> (&steps)[kScanSteps][kVector],
                            State (&state)[kVector]) const {
    const uint32_t starts = mark.starts, ends = mark.ends;
    constexpr int kTargets = backward ? Op::inputs : 1;
    Cursor to[kTargets];
#pragma unroll
    for (int i = 0; i < kTargets; ++i) {
      to[i] = cursor(t, backward ? call.grad_input[i] : call.state);
    }
#pragma unroll
    for (int s = 0; s < kScanSteps; ++s) {
      if (s >= count_of(t)) break;
      if (starts >> s & 1) enter_sequence(t, mark, s, state);
      V out[kTargets][kVector];
      Backward b;
      recall(t, mark, s, steps[s], b);
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        if constexpr (backward) {
          const V s_t = b.adjoint[c] + state[c].value;
#pragma unroll
          for (int i = 0; i < kTargets; ++i) out[i][c] = b.factor[i][c] * s_t;
        }
        state[c] = Space::walk(state[c], steps[s][c]);
        if constexpr (!backward) out[0][c] = Space::value_of(state[c]);
      }
#pragma unroll
      for (int i = 0; i < kTargets; ++i) {
        const View& v = backward ? call.grad_input[i] : call.state;
        store(t, v, call.wide[backward ? 5 + i : 3], to[i].at, out[i]);
        to[i].at += to[i].step;
      }
      if (ends >> s & 1) leave_sequence(t, mark, s, state);
    }
  }

  // A sequence without a step leaves as it enters.
  MSRNN_FN void pass_empty_sequences() const {
    if (!call.leaving || (call.time > 0 && !call.cu_seqlens)) return;
    for (int n = blockIdx.x; n < call.sequences; n += gridDim.x) {
      if (call.cu_seqlens && walk.start(n) < walk.start(n + 1)) continue;
      for (int64_t c = threadIdx.x; c < call.channels; c += threads()) {
        const int64_t at = n * call.channels + c;
        static_cast<S*>(call.leaving)[at] =
            call.entering ? static_cast<const S*>(call.entering)[at] : initial(backward).v;
      }
    }
  }

  // Tiles are numbered along the chain of this block, or by ticket across all chains.
  MSRNN_FN uint32_t tile_count() const {
    const ScanPlan& p = call.plan;
    return static_cast<uint32_t>(p.look_back ? p.chains * p.tiles : p.tiles);
  }
  MSRNN_FN Tile tile_at(uint32_t n) const {
    if (n >= tile_count()) return {-1, 0, 0, 0};
    const auto chains = static_cast<uint32_t>(call.plan.chains);
    const auto blocks = chains / static_cast<uint32_t>(call.rows);  // of channels
    const bool back = call.plan.look_back;
    const uint32_t chain = back ? n % chains : blockIdx.x, index = back ? n / chains : n;
    return {static_cast<int>(chain), static_cast<int>(index), static_cast<int>(chain / blocks),
            static_cast<int>(chain % blocks) * channels()};
  }
  MSRNN_FN uint32_t draw() const { return atomicAdd(call.exchange.ticket, 1u); }
  MSRNN_FN uint32_t draw_after(const Tile& t) const {
    if (t.chain < 0) return tile_count();
    return call.plan.look_back ? draw() : t.index + 1;
  }

  // The tiles of this block. In look-back a grid that has a block for every tile draws one each.
  MSRNN_FN void run_all() {
    pass_empty_sequences();
    if (threadIdx.x == 0) {
      const uint32_t end = tile_count();
      tile(0) = tile_at(call.plan.look_back ? draw() : 0);
      tile(1) = tile_at(call.plan.look_back && gridDim.x >= end ? end : draw_after(tile(0)));
    }
    if (!call.plan.look_back) {
      for (int c = threadIdx.x; c < channels(); c += threads()) {
        carry()[c] = {initial(backward), V(0)};
      }
    }
    __syncthreads();
    load_tile(tile(0));
#pragma unroll 1
    for (int turn = 0; tile(turn).chain >= 0; ++turn) run(turn);
  }
};

template <class Op, class T, bool backward>
__global__ void __launch_bounds__(backward ? 128 : 256, backward    ? 4
                                                        : Op::cheap ? 3
                                                                    : 2)
    scan_kernel(const __grid_constant__ ScanCall call) {
  ScanBlock<Op, T, backward>(call).run_all();
}

template <class Op, class T, bool backward>
cudaError_t launch_scan_kernel(ScanCall call, cudaStream_t stream) {
  const auto kernel = scan_kernel<Op, T, backward>;
  const ScanPlan& p = call.plan;
  const int threads = p.lanes * p.rows;
  call.shared = ScanBlock<Op, T, backward>::lay_out_shared(p);
  const auto shared = static_cast<size_t>(call.shared.bytes);
  if (auto e = allow_shared(kernel, shared)) return e;
  int64_t blocks = p.chains;
  if (p.look_back) {
    const int64_t cleared =
        lay_out(p, sizeof(typename Stored<T>::V::Scalar), nullptr, nullptr).cleared;
    if (auto e = cudaMemsetAsync(call.exchange.ticket, 0, cleared, stream)) return e;
    int most;
    if (auto e = resident_blocks(&most, kernel, threads, shared)) return e;
    blocks = std::min<int64_t>(most, p.chains * p.tiles);
  }
  return launch(kernel, static_cast<uint32_t>(blocks), threads, shared, stream, call);
}

// Every op for one dtype; defined once in each scan_<dtype>.cu.
template <class T>
cudaError_t launch_scan_of(ScanOp op, bool backward, const ScanCall& call, cudaStream_t stream) {
  const auto of = [&]<class Op>(Op) {
    return backward ? launch_scan_kernel<Op, T, true>(call, stream)
                    : launch_scan_kernel<Op, T, false>(call, stream);
  };
  switch (op) {
    case ScanOp::linear_scan:
      return of(LinearScan{});
    case ScanOp::decay_scan:
      return of(DecayScan{});
    case ScanOp::log_scan:
      return of(LogScan{});
    case ScanOp::min_gru_g:
      return of(MinGru<false>{});
    case ScanOp::min_gru_identity:
      return of(MinGru<true>{});
    case ScanOp::min_lstm_g:
      return of(MinLstm<false>{});
    default:
      return of(MinLstm<true>{});
  }
}

}  // namespace gpu
}  // namespace msrnn
