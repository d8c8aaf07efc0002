// The scan kernel: every recurrence, forward and backward, on both of its paths.
//
// A tile is what a block works on at a time. Forward, unless time is short, it is 256 steps of 64
// bytes of channels:
//
//            16 bytes of channels
//            |<-->|
//            +----+----+----+----+                  -+         -+
//    4 steps |  0 |  1 |  2 |  3 | row 0             |          |
//            +----+----+----+----+                   | part 0:  |
//            |  4 |  5 |  6 |  7 | row 1             | 8 rows,  |
//            +----+----+----+----+                   | 32 steps | tile 0:
//            :    :    :    :    :                   |          | 8 parts,
//            | 28 | 29 | 30 | 31 | row 7             |          | 64 rows,
//            +====+====+====+====+                  -+          | 256 threads
//            :    :    :    :    : parts 1 to 7                 |
//            +====+====+====+====+                             -+
//            :    :    :    :    :                               tile 1
//       time :
//          v   Tile follows tile to the last step: together they are a chain.
//
// Level 0, thread. A thread has four neighbouring steps of 16 bytes of channels (8 channels of
//   bfloat16) and walks them twice. The first walk starts from zero. It gives the span of the
//   thread: what its steps do to a state that enters them (recurrence.h). The second walk starts
//   from the state that does enter, and gives the results. Threads that share steps are a row.
// Level 1, part. A part is an eighth of the rows. For each channel one thread composes their spans,
//   one after the other. Once the state that enters the part is known, the same thread passes it
//   through the rows.
// Level 2, tile. For each channel one thread composes the parts and gets the carry: the state that
//   enters the tile. Backward, a tile has half the rows, since each step loads twice the bytes.
// Level 3, chain. A chain is the tiles of one batch row and one block of channels, in order. If
//   there are enough chains, a block walks each of them and keeps the carry ("walk"). Otherwise
//   blocks take tiles by ticket, from all chains in turn, and hand carries on through memory
//   ("look-back", look_back.h).
//
// Sequences that are packed by cu_seqlens stay one chain. A step that starts a sequence enters the
// state of that sequence and marks its span, and whatever comes before a marked span is dropped. We
// do not multiply it by 0, which would turn an infinity into NaN. The start of a batch row is such
// a step too, and so is one behind a reset, which starts from zero, and one that no sequence
// covers: it gets inputs that make its state 0. sequences.h finds these steps; a call without
// cu_seqlens and resets does not look for them.
//
// Accuracy. The four steps of a thread are plain. Spans carry both a and 1-a, and the carry from
// tile to tile is compensated. On the emulator, in float32, with T = 8192 and gates around -8, no
// element is off by more than 7e-7; it was 1.7e-6 when spans were composed with a alone.
//
// Memory. Each element is read and written once, 16 bytes at a time: minGRU moves 3 tensors of
// B*T*D forward and 6 backward, minLSTM 4 and 8. Loads go to shared memory by cp.async, and a
// thread reads only what it loaded itself, so shared memory serves as its asynchronous registers
// and needs no barrier. A slot is refilled for the next tile as soon as it has been read. A forward
// block thus has most of a tile (32 KB for minGRU) in flight while it composes, waits and stores.
// Backward, where slots are read twice, the other blocks of the multiprocessor have their tiles in
// flight. TMA would load the same bytes with fewer instructions (a load of 16 bytes is one here, an
// eighth of the 45 that an element takes), but it needs a barrier between the engine and its
// readers, and a descriptor for each tensor. We do not use it.
//
// Arithmetic, for an element of bfloat16 on sm_90, counted in the machine code (by `python -m bench
// estimates`). An H200 copies 4.3 TB/s with 132 multiprocessors at 1.98 GHz, so that 6 bytes take
// 0.365 cycles of a multiprocessor. That is time for 47 instructions (128 a cycle) and 5.8 special
// functions (16 a cycle).
//
//                     instructions   of those       special     of those
//                        taken      that fit in    functions   that fit in
//   minGRU forward         45            47           4.0          5.8
//   minGRU backward        80            93           6.1         11.7
//   minLSTM forward        59            62           5.0          7.8
//   minLSTM backward      115           125           8.1         15.6
//   log_scan forward       54            47           3.3          5.8
//
// log_scan forward is the only one that an H200 slows by more than 2 %.
//
// Rejected, with what each would cost minGRU forward:
//   - Composing spans by shuffles in a warp and then across warps takes 11 more instructions, half
//     of them selects and branches.
//   - A Newton step for each reciprocal of 16-bit data takes 2 instructions. We do not need it: the
//     form 1 - small accumulates no bias.
//   - One reciprocal for both gates saves a special function and costs an instruction, but a NaN in
//     one gate then poisons the other.
//   - Computing the gates again in the second walk takes 8 special functions, where memory leaves
//     time for 5.8.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "look_back.h"
#include "scan_tile.h"

namespace msrnn {
namespace gpu {

// One block at work. Op is one of recurrence.h, and T is what the tensors hold.
template <class Op, class T, bool backward>
struct ScanBlock : ScanTile<Op, T, backward> {
  using Base = ScanTile<Op, T, backward>;
  // From scan_tile.h: types and constants,
  using Base::kInputs, Base::kSources, Base::kVector, Base::kVectorLog2, Base::kParts;
  using Base::kLogarithmic;
  using typename Base::Space, typename Base::State, typename Base::Span, typename Base::Cursor;
  using typename Base::V, typename Base::S, typename Base::Memory;

  // the call, and this thread's place and its share of a tile,
  using Base::call, Base::walk, Base::cursor;
  using Base::part_rows, Base::first_of, Base::count_of, Base::channel_of, Base::channels_of;
  using Base::threads, Base::channels, Base::warp, Base::lane, Base::row, Base::parts;

  // shared memory,
  using Base::carry, Base::entering_tile, Base::own_marks, Base::slot, Base::tile;
  using Base::row_words, Base::part_words, Base::plane, Base::gather_row, Base::scatter_row;
  using Base::warp_starts, Base::part_starts, Base::part_started, Base::warp_unusable;

  // and what goes to memory and comes from it.
  using Base::enter_sequence, Base::leave_sequence, Base::fetch, Base::initial;
  using Base::load_tile, Base::fill_uncovered, Base::store, Base::park, Base::unpark;

  // Whether a decay may be infinite, so that a span may be of no use.
  static constexpr bool kUnbounded = !Op::gated || (kLogarithmic && !backward);
  // Whether products of decays need a look, since they may vanish or overflow.
  static constexpr bool kClamped = !Op::gated;
  static constexpr bool kNeverLost = Op::gated && (backward || !kLogarithmic);
  // Whether the second walk reads the steps again. Else they stay in registers, which frees their
  // slots for the next tile. (There are too few registers for the logarithms of doubles.)
  static constexpr bool kReadTwice =
      backward || Op::cheap || (kLogarithmic && sizeof(T) == sizeof(double));
  // Steps of 16-bit data would take 64 registers, a few too many. So the first of them wait in
  // their own slots, as far as these reach, and those slots are refilled late.
  static constexpr int kParked = kReadTwice || sizeof(T) > 2 ? 0 : Op::inputs - 1;

  MSRNN_FN explicit ScanBlock(const ScanCall& c) : Base(c) {}

  // One tile from top to bottom, while the next one is loaded.
  MSRNN_FN void run(int turn) {
    // Level 0, thread: from the inputs to the span of this thread's four steps.
    Step<V> steps[kScanSteps][kVector];
    Span span[kVector];
    Marks& mark = own_marks();
    bool serial = false;
    {
      const Tile t = tile(turn);
      mark = marks(walk, t.batch, first_of(t), count_of(t));
      copies_done();
      if (mark.any_uncovered()) fill_uncovered(mark);
      first_walk(t, mark, steps, span);
      if constexpr (kUnbounded) {
#pragma unroll
        for (int c = 0; c < kVector; ++c) serial = serial || !Space::usable_span(span[c]);
        serial = __any_sync(~0u, serial && channels_of(t) > 0);
        if (threadIdx.x % 32 == 0) warp_unusable()[warp()] = serial;
      }
    }
    scatter_row(span);
    const uint32_t starting = __ballot_sync(~0u, mark.any_starts());
    if (threadIdx.x % 32 == 0) warp_starts()[warp()] = starting;

    // Slots that nobody reads again are refilled for the next tile. One thread draws the tile after
    // that: ahead of its use, since a ticket takes a trip to memory.
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

    // Level 1, part: from the spans of the rows to those of the parts.
    fold_rows();
    if (draws) tile(turn + 2) = tile_at(drawn);
    __syncthreads();

    // Levels 2 and 3, tile and chain: from the spans of the parts to the state that enters the
    // tile, and on to the tiles after it.
    fold_tile(tile(turn), serial);
    __syncthreads();

    // Back down: from the state that enters the tile to those that enter the rows, and to results.
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

  // Level 0: the thread.

  struct Backward {
    V adjoint[kVector];  // the gradient that arrives at h of this step alone
    V factor[Op::inputs][kVector];
  };

  // Reads a step from its slots, as two numbers and 1-a; backward, the gradients of the step too.
  MSRNN_FN void read(const Tile& t, const Marks& mark, int step, Step<V> (&steps)[kVector],
                     V (&lost)[kVector], Backward& b) const {
    V x[kSources][kVector];
#pragma unroll
    for (int source = 0; source < kSources; ++source) {
      Memory::unpack(slot(source, step), x[source]);
    }
    if constexpr (backward) {
      if (mark.alone(step))
        fetch(t, mark, step, mark.cut(step) ? nullptr : call.h0, false, x[kInputs]);
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

  // Reads a step for the second time, unless it is still in registers.
  MSRNN_FN void recall(const Tile& t, const Marks& mark, int step, Step<V> (&steps)[kVector],
                       Backward& b) const {
    V lost[kVector];
    if constexpr (kReadTwice) {
      read(t, mark, step, steps, lost, b);
    } else if constexpr (kParked > 0) {
      if (step < kParked) unpark(steps, step);
    }
  }

  // Walks from zero: the span of this thread's steps.
  MSRNN_FN void first_walk(const Tile& t, const Marks& mark, Step<V> (&steps)[kScanSteps][kVector],
                           Span (&span)[kVector]) const {
    const Marks here{mark.bits, 0};  // in a register
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
      if (here.starts(s)) {
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

  // Walks from the state that enters: the results.
  MSRNN_FN void second_walk(const Tile& t, const Marks& mark, Step<V> (&steps)[kScanSteps][kVector],
                            State (&state)[kVector]) const {
    const Marks here{mark.bits, 0};
    constexpr int kTargets = backward ? Op::inputs : 1;
    Cursor to[kTargets];
#pragma unroll
    for (int i = 0; i < kTargets; ++i) {
      to[i] = cursor(t, backward ? call.grad_input[i] : call.state);
    }
#pragma unroll
    for (int s = 0; s < kScanSteps; ++s) {
      if (s >= count_of(t)) break;
      if (here.starts(s)) enter_sequence(t, mark, s, state);
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
      if (here.ends(s)) leave_sequence(t, mark, s, state);
    }
  }

  // Level 1: the part.

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

  // Calls `each` for all channels of all parts that are this thread's, with the channel, the part,
  // the part's first row, and bits that say which of the part's rows start a sequence, `lanes`
  // apart. (The rows of a part belong to one warp. Rows of other parts may follow there; their bits
  // come after.)
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

  // Up: from the spans of the rows to those of the parts.
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

  // Down: from the state that enters the tile to those that enter the rows. They take the place of
  // the spans of the rows.
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

  // Level 2: the tile.

  // From the spans of the parts to that of the tile, for one channel. The span of all parts before
  // a part takes the place of the part's own.
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

  // Level 3: the chain.

  MSRNN_FN LookBack<Space, V> look_back(const Tile& t) const {
    return {call, t.chain, t.index, channels(), in_shared<Span>(call.shared.window)};
  }

  // From the spans of the parts to the state that enters the tile, and on to the tiles after it.
  // If `serial`, the spans are of no use, and hand_on() follows once the tile has been walked.
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

  // What a tile does whose spans are of no use, since a decay is infinite: infinity times the zero
  // that a span starts from is NaN. The rows walk one after the other, and the tile passes for one
  // that starts a sequence with the state that it leaves.
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
          if (mark.starts(s)) enter_sequence(t, mark, s, now);
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

  // The block.

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

  // Tiles are numbered along the chain of this block, or across all chains, and then a ticket says
  // which is next.
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

  // All tiles of this block. In look-back, a grid with a block for every tile draws one each.
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
  constexpr int64_t scalar = sizeof(typename Stored<T>::V::Scalar);
  int64_t blocks = p.chains;
  if (call.cu_seqlens && call.sequences > 0) {  // where it decreases, some end at no step
    if (auto e = cudaMemsetAsync(call.leaving, 0, call.sequences * call.channels * scalar, stream))
      return e;
  }
  if (p.look_back) {
    const int64_t cleared = lay_out(p, scalar, nullptr, nullptr).cleared;
    if (auto e = cudaMemsetAsync(call.exchange.ticket, 0, cleared, stream)) return e;
    int most;
    if (auto e = resident_blocks(&most, kernel, threads, shared)) return e;
    blocks = std::min<int64_t>(most, p.chains * p.tiles);
  }
  return launch(kernel, static_cast<uint32_t>(blocks), threads, shared, stream, call);
}

// Every op of one dtype; each instantiations/scan_<dtype>.cu compiles one.
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
