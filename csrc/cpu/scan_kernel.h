// The CPU scan kernels, forward and backward, for one instruction set (see number.h).
//
// Level by level:
//   vector   16, 8 or 4 neighbouring channels of one time step, with gates, carry and state in
//            registers. Loads widen 16-bit numbers, and stores round them.
//   rows     All channels of a step before the next step, as memory lies, with the carries in L1.
//            (A vector that went over several steps first would keep its carry in registers. But
//            rows 4 KB apart share a set of L1, which makes that 2 to 4 times slower.)
//   block    Some rows. A block that met an infinity or NaN is done again with the plain
//            recurrence, since h + (a-1)h is NaN where a*h is infinite.
//   tile     Some blocks of one segment (scan.h). If its carry is known, it walks from there
//            ("walk"). Otherwise it scans from zero, holds states and decay products in scratch
//            memory, and applies the carry of the tile before it as soon as that is posted
//            ("deferred"). Time is then parallel in one pass over memory. Tiles depend on shape
//            alone, so any number of threads gives the same bits.
//
// Traffic, in tensors of B*T*D. Forward reads the inputs and writes h: 3 for minGRU and 4 for
// minLSTM. Backward reads the inputs, h and the gradient of h, and writes the gradients: 6 and 8.
//
// Input is fetched into L2 kAhead bytes before its use. We measured minGRU at (1, 16384, 1024) with
// two threads of a Zen 4. It runs at 0.74 of the speed of a streaming copy of the same bytes, and
// at 0.81 with backward. If the input is fetched into L1, where rows 4 KB apart evict each other,
// it is 0.57 and 0.58.
//
// Rejected:
//   - Computing the gates again in a second pass over late tiles takes 1.5 times the arithmetic.
//   - Stopping once the decay has underflowed is wrong for an infinite carry.
//   - A division shared by both gates lets a NaN in one poison the other, and two Newton
//     reciprocals cost the same.
#pragma once

#include "number.h"
#include "scan.h"

namespace msrnn {
namespace MSRNN_ISA {

constexpr int64_t kBlockElements = 8192;
constexpr int64_t kAhead = 8192;  // bytes

// How a vector of channels is read and written. `any` covers partial vectors, channels that are not
// adjacent in memory, and every dtype.
enum class Access { any, float32, bfloat16, float16 };

template <Access>
struct Stored;
template <>
struct Stored<Access::float32> {
  using Type = float;
};
template <>
struct Stored<Access::bfloat16> {
  using Type = BFloat16;
};
template <>
struct Stored<Access::float16> {
  using Type = Half;
};

MSRNN_FN int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Partial vectors and channels that are not adjacent.
static __attribute__((noinline)) Float load_any(const char* p, int64_t stride, DType dtype,
                                                int count) {
  if (dtype == DType::float32 && stride == 4) {
    return load_partial(reinterpret_cast<const float*>(p), count);
  }
  float x[Float::lanes] = {};
  for (int i = 0; i < count && i < Float::lanes; ++i, p += stride) {
    if (dtype == DType::float32) {
      __builtin_memcpy(&x[i], p, 4);
    } else if (dtype == DType::bfloat16) {
      x[i] = to_float(*reinterpret_cast<const BFloat16*>(p));
    } else {
      x[i] = to_float(*reinterpret_cast<const Half*>(p));
    }
  }
  return load_full(x);
}

static __attribute__((noinline)) void store_any(char* p, int64_t stride, DType dtype, int count,
                                                Float v) {
  if (dtype == DType::float32 && stride == 4) {
    return store_partial(reinterpret_cast<float*>(p), v, count);
  }
  float x[Float::lanes];
  store_full(x, v);
  for (int i = 0; i < count && i < Float::lanes; ++i, p += stride) {
    if (dtype == DType::float32) {
      __builtin_memcpy(p, &x[i], 4);
    } else if (dtype == DType::bfloat16) {
      *reinterpret_cast<BFloat16*>(p) = to_bfloat16(x[i]);
    } else {
      *reinterpret_cast<Half*>(p) = to_half(x[i]);
    }
  }
}

// One time step of a View.
struct Row {
  char* p;          // the tile's first channel
  int64_t step;     // bytes to the next step of the walk
  int64_t channel;  // bytes between channels

  MSRNN_FN Row() : p(nullptr), step(0), channel(0) {}
  MSRNN_FN Row(const View& v, const Segment& g, int64_t time, int64_t direction, int64_t c)
      : p(v.data + g.row * v.row + (g.start + time) * v.time + c * v.channel),
        step(direction * v.time),
        channel(v.channel) {}
};

// Channels [c, c + V::lanes) of a row, or only `count` of them under Access::any.
template <class V, Access access>
MSRNN_FN V load(const Scan& s, const Row& row, int64_t c, int count, int64_t ahead) {
  if constexpr (V::lanes == 1) {
    return V(*reinterpret_cast<const double*>(row.p + c * row.channel));
  } else if constexpr (access == Access::any) {
    return load_any(row.p + c * row.channel, row.channel, s.dtype, count);
  } else {
    using T = typename Stored<access>::Type;
    const T* here = reinterpret_cast<const T*>(row.p) + c;
    for (int i = 0; i < V::lanes * int(sizeof(T)); i += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(here) + ahead * row.step + i, 0, 2);
    }
    if constexpr (V::lanes == Float::lanes) {
      return widen(here);
    } else {
      return widen_pair(here);
    }
  }
}

template <class V, Access access>
MSRNN_FN void store(const Scan& s, const Row& row, int64_t c, int count, bool streaming, V x) {
  if constexpr (V::lanes == 1) {
    *reinterpret_cast<double*>(row.p + c * row.channel) = x.v;
  } else if constexpr (access == Access::any) {
    store_any(row.p + c * row.channel, row.channel, s.dtype, count, x);
  } else {
    using T = typename Stored<access>::Type;
    T* here = reinterpret_cast<T*>(row.p) + c;
    streaming ? stream(here, x) : store_full(here, x);
  }
}

template <class V>
MSRNN_FN V load_scalars(const typename V::Scalar* p, int count = V::lanes) {
  if constexpr (V::lanes == 1) {
    return V(*p);
  } else if constexpr (V::lanes != Float::lanes) {
    return widen_pair(p);
  } else {
    return count == V::lanes ? load_full(p) : load_partial(p, count);
  }
}
template <class V>
MSRNN_FN void store_scalars(typename V::Scalar* p, V x) {
  if constexpr (V::lanes == 1) {
    *p = x.v;
  } else {
    store_full(p, x);
  }
}

// The vectors that a row is taken by, as long as there are that many channels.
template <class V>
struct Wide {
  using Type = V;
};
template <>
struct Wide<Float> {
  using Type = Pair;
};

MSRNN_FN int64_t fetch_ahead(const Scan& s, int64_t channels) {
  const int64_t size = s.dtype == DType::float32 ? 4 : s.dtype == DType::float64 ? 8 : 2;
  return kAhead / (channels * size) + 1;
}

// Waits for a flag. It spins at first, and then leaves the processor to whoever may have to raise
// it.
MSRNN_FN void wait_for(const uint32_t* flag) {
  for (int spins = 0; !__atomic_load_n(flag, __ATOMIC_ACQUIRE); ++spins) {
    if (spins > 1000) {
      sched_yield();
      continue;
    }
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
}

// Going forward: reads the inputs of a step and writes its state.
template <class Op, class V, Access access>
struct ForwardPass {
  using Space = typename Op::Space;
  static constexpr int factors = 0;

  const Scan& s;
  const int64_t ahead;
  const bool streaming;
  Row input[Op::inputs], state;

  MSRNN_FN ForwardPass(const Scan& scan, const Segment& g, int64_t step, int64_t channel,
                       int64_t fetch)
      : s(scan), ahead(fetch), streaming(scan.stream) {
    const int64_t time = s.reverse ? g.length - 1 - step : step;
    const int64_t direction = s.reverse ? -1 : 1;
    for (int i = 0; i < Op::inputs; ++i) input[i] = Row(s.input[i], g, time, direction, channel);
    state = Row(s.state, g, time, direction, channel);
  }
  MSRNN_FN void next_row() {
#pragma GCC unroll 3
    for (int i = 0; i < Op::inputs; ++i) input[i].p += input[i].step;
    state.p += state.step;
  }

  MSRNN_FN Gates<V> read(int64_t c, int count, V*) const {
    V x[Op::inputs];
#pragma GCC unroll 3
    for (int i = 0; i < Op::inputs; ++i) x[i] = load<V, access>(s, input[i], c, count, ahead);
    return Op::gates(x);
  }
  MSRNN_FN void write(int64_t c, int count, V h, const V*) const {
    store<V, access>(s, state, c, count, streaming, h);
  }

  // The carry after a step; its value is h.
  template <bool compensated>
  static MSRNN_FN V step(Carry<V>& carry, Gates<V> g) {
    carry = compensated ? Space::advance(carry, g) : Space::plain(carry, g);
    return carry.value;
  }
  static MSRNN_FN V decay(Carry<V>& product, Gates<V> g) {
    product = Space::compound(product, g);
    return product.value;
  }
};

// Going against the recurrence. The adjoint s_t = grad_t + a_{t+1} s_{t+1} is the visible value;
// the carry is a_t s_t.
template <class Op, class V, Access access>
struct BackwardPass {
  using Space = Linear;
  using Scalar = typename V::Scalar;
  static constexpr int factors = Op::inputs;

  const Scan& s;
  const int64_t ahead;
  const bool streaming;
  Row input[Op::saved], gradient[Op::inputs], before, grad_state;
  int64_t stored;    // steps left whose state before is a stored one; the last starts from h0
  const Scalar* h0;  // or null

  MSRNN_FN BackwardPass(const Scan& scan, const Segment& g, int64_t step, int64_t channel,
                        int64_t fetch)
      : s(scan), ahead(fetch), streaming(scan.stream), stored(g.length - 1 - step), h0(nullptr) {
    const int64_t time = s.reverse ? step : g.length - 1 - step;
    const int64_t direction = s.reverse ? 1 : -1;
    for (int i = 0; i < Op::saved; ++i) input[i] = Row(s.input[i], g, time, direction, channel);
    for (int i = 0; i < Op::inputs; ++i) {
      gradient[i] = Row(s.grad_input[i], g, time, direction, channel);
    }
    before = Row(s.state, g, time + direction, direction, channel);
    if (s.grad_state.data) grad_state = Row(s.grad_state, g, time, direction, channel);
    if (s.h0 && g.enters) {
      h0 = static_cast<const Scalar*>(s.h0) + g.sequence * s.channels + channel;
    }
  }
  MSRNN_FN void next_row() {
#pragma GCC unroll 3
    for (int i = 0; i < Op::saved; ++i) input[i].p += input[i].step;
#pragma GCC unroll 3
    for (int i = 0; i < Op::inputs; ++i) gradient[i].p += gradient[i].step;
    before.p += before.step;
    grad_state.p += grad_state.step;
    --stored;
  }

  MSRNN_FN Gates<V> read(int64_t c, int count, V* factor) const {
    V x[Op::saved], f[Op::inputs], h, grad(0);
#pragma GCC unroll 3
    for (int i = 0; i < Op::saved; ++i) x[i] = load<V, access>(s, input[i], c, count, ahead);
    if (stored > 0) {
      h = load<V, access>(s, before, c, count, ahead);
    } else {
      h = h0 ? load_scalars<V>(h0 + c, count) : Op::Space::template start<V>().value;
    }
    if (grad_state.p) grad = load<V, access>(s, grad_state, c, count, ahead);
    Gates<V> g = Op::adjoint(x, h, f);
#pragma GCC unroll 3
    for (int i = 0; i < Op::inputs; ++i) factor[i] = f[i];
    return {g.slow, g.decay, V(1), grad};
  }
  MSRNN_FN void write(int64_t c, int count, V adjoint, const V* factor) const {
#pragma GCC unroll 3
    for (int i = 0; i < Op::inputs; ++i) {
      store<V, access>(s, gradient[i], c, count, streaming, adjoint * factor[i]);
    }
  }

  template <bool compensated>
  static MSRNN_FN V step(Carry<V>& carry, Gates<V> g) {
    Carry<V> sum = compensated ? Space::add(carry, g.value) : Carry<V>{carry.value + g.value, V(0)};
    carry = compensated ? Space::compound(sum, g)
                        : Space::plain(sum, Gates<V>{g.slow, g.decay, V(0), V(0)});
    return sum.value;
  }
  static MSRNN_FN V decay(Carry<V>& product, Gates<V> g) {
    V before = product.value;
    product = Space::compound(product, g);
    return before;
  }
};

// Carries of neighbouring channels: their values and, `width` scalars on, their rests.
template <class V>
MSRNN_FN Carry<V> load_carry(const typename V::Scalar* p, int64_t width) {
  return {load_scalars<V>(p), load_scalars<V>(p + width)};
}
template <class V>
MSRNN_FN void store_carry(typename V::Scalar* p, int64_t width, Carry<V> carry) {
  store_scalars<V>(p, carry.value);
  store_scalars<V>(p + width, carry.rest);
}

// Some rows from known carries.
template <class Pass, bool compensated, class V>
__attribute__((noinline)) void walk_rows(Pass pass, int64_t rows, int64_t channels,
                                         typename V::Scalar* carries, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, pass.next_row()) {
    for (int64_t c = 0; c < channels; c += V::lanes) {
      const int count = static_cast<int>(smaller(V::lanes, channels - c));
      V factor[Pass::factors + 1];
      Carry<V> carry = load_carry<V>(carries + c, width);
      Gates<V> gates = pass.read(c, count, factor);
      pass.write(c, count, Pass::template step<compensated>(carry, gates), factor);
      store_carry<V>(carries + c, width, carry);
    }
  }
}

// Some rows from zero carries into scratch memory: for each row the visible values, the products
// that a carry is to be applied with, and the factors, each `width` scalars. `carries` holds
// those of the scan and of the products.
template <class Pass, class V>
__attribute__((noinline)) void scan_rows(Pass pass, int64_t rows, int64_t channels,
                                         typename V::Scalar* place, typename V::Scalar* carries,
                                         int64_t width) {
  for (int64_t row = 0; row < rows; ++row, pass.next_row()) {
    for (int64_t c = 0; c < channels; c += V::lanes) {
      const int count = static_cast<int>(smaller(V::lanes, channels - c));
      V factor[Pass::factors + 1];
      Carry<V> local = load_carry<V>(carries + c, width);
      Carry<V> product = load_carry<V>(carries + 2 * width + c, width);
      Gates<V> gates = pass.read(c, count, factor);
      store_scalars<V>(place + c, Pass::template step<V::compensated>(local, gates));
      store_scalars<V>(place + width + c, Pass::decay(product, gates));
#pragma GCC unroll 3
      for (int k = 0; k < Pass::factors; ++k) {
        store_scalars<V>(place + (2 + k) * width + c, factor[k]);
      }
      store_carry<V>(carries + c, width, local);
      store_carry<V>(carries + 2 * width + c, width, product);
    }
    place += (2 + Pass::factors) * width;
  }
}

// Applies carries to what scan_rows left, and writes the results.
template <class Pass, class V>
__attribute__((noinline)) void apply_rows(Pass pass, int64_t rows, int64_t channels,
                                          const typename V::Scalar* place,
                                          const typename V::Scalar* carries, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, pass.next_row()) {
    for (int64_t c = 0; c < channels; c += V::lanes) {
      const int count = static_cast<int>(smaller(V::lanes, channels - c));
      V factor[Pass::factors + 1];
#pragma GCC unroll 3
      for (int k = 0; k < Pass::factors; ++k) {
        factor[k] = load_scalars<V>(place + (2 + k) * width + c);
      }
      V local = load_scalars<V>(place + c);
      V product = load_scalars<V>(place + width + c);
      V carry = load_scalars<V>(carries + c);
      pass.write(c, count, Pass::Space::apply(local, product, carry), factor);
    }
    place += (2 + Pass::factors) * width;
  }
}

template <template <class, class, Access> class PassOf, class Op, class V>
struct TileOf {
  using AnyPass = PassOf<Op, V, Access::any>;
  using Space = typename AnyPass::Space;
  using Scalar = typename V::Scalar;

  const Scan& s;
  const Tile& t;
  const Segment& g;
  const int64_t channels;
  const int64_t width;  // scalars between rows of scratch memory
  const int64_t ahead;  // rows between a fetch and its use

  TileOf(const Scan& scan, const Tile& tile)
      : s(scan),
        t(tile),
        g(scan.segments[tile.segment]),
        channels(tile.channel_end - tile.channel_begin),
        width(padded(channels)),
        ahead(fetch_ahead(scan, channels)) {}

  template <class Pass>
  Pass pass(int64_t row, int64_t c) const {
    return Pass(s, g, t.first + row, t.channel_begin + c, ahead);
  }

  // Calls action.operator()<pass, vector>(c, count) for the channels that fill pairs of vectors,
  // then for those that fill vectors, then for the rest.
  template <class Action>
  void for_channels(Action action) const {
    int64_t done = 0;
    if constexpr (V::lanes > 1) {
      if (s.packed && s.dtype == DType::float32) done = for_vectors<Access::float32>(action);
      if (s.packed && s.dtype == DType::bfloat16) done = for_vectors<Access::bfloat16>(action);
      if (s.packed && s.dtype == DType::float16) done = for_vectors<Access::float16>(action);
    }
    if (done < channels) {
      action.template operator()<PassOf<Op, V, Access::any>, V>(done, channels - done);
    }
  }
  template <Access access, class Action>
  int64_t for_vectors(Action action) const {
    using W = typename Wide<V>::Type;
    const int64_t wide = channels / W::lanes * W::lanes;
    const int64_t whole = channels / V::lanes * V::lanes;
    if (wide) action.template operator()<PassOf<Op, W, access>, W>(0, wide);
    if (wide < whole) action.template operator()<PassOf<Op, V, access>, V>(wide, whole - wide);
    return whole;
  }

  void enter(Scalar* carries) const {
    const auto* from = static_cast<const Scalar*>(t.before);
    for (int64_t c = 0; c < width; c += V::lanes) {
      Carry<V> carry = Space::template start<V>();
      const int count = static_cast<int>(smaller(V::lanes, channels - c));
      if (from && count > 0) carry.value = load_scalars<V>(from + t.channel_begin + c, count);
      store_carry<V>(carries + c, width, carry);
    }
  }
  void leave(const Scalar* values) const {
    if (t.after) {
      __builtin_memcpy(static_cast<Scalar*>(t.after) + t.channel_begin, values,
                       channels * sizeof(Scalar));
    }
    if (t.post) __atomic_store_n(t.post, 1u, __ATOMIC_RELEASE);
  }
  bool usable(const Scalar* values) const {
    bool yes = true;
    for (int64_t c = 0; c < width; c += V::lanes) {
      yes = yes && Space::usable(load_scalars<V>(values + c, V::lanes));
    }
    return yes;
  }

  // From the carries before a row to those after it; `scratch` holds 2 * width scalars.
  void walk(Scalar* carries, Scalar* scratch) const {
    const int64_t block = kBlockElements / width + 1;
    for (int64_t row = 0; row < t.rows; row += block) {
      const int64_t rows = smaller(block, t.rows - row);
      __builtin_memcpy(scratch, carries, 2 * width * sizeof(Scalar));
      for_channels([&]<class Pass, class W>(int64_t c, int64_t n) {
        walk_rows<Pass, W::compensated, W>(pass<Pass>(row, c), rows, n, carries + c, width);
      });
      if (!V::compensated || usable(carries)) continue;
      __builtin_memcpy(carries, scratch, width * sizeof(Scalar));
      __builtin_memset(carries + width, 0, width * sizeof(Scalar));
      walk_rows<AnyPass, false, V>(pass<AnyPass>(row, 0), rows, channels, carries, width);
    }
  }

  void deferred(Scalar* scratch) const {
    Scalar* entering = scratch;
    Scalar* carries = scratch + 2 * width;
    Scalar* place = scratch + 6 * width;
    for (int64_t c = 0; c < width; c += V::lanes) {
      store_carry<V>(carries + c, width, Space::template start<V>());
      store_carry<V>(carries + 2 * width + c, width, Space::template no_decay<V>());
    }
    for_channels([&]<class Pass, class W>(int64_t c, int64_t n) {
      scan_rows<Pass, W>(pass<Pass>(0, c), t.rows, n, place + c, carries + c, width);
    });

    wait_for(t.wait);

    enter(entering);
    Scalar* products = carries + 2 * width;
    bool applicable = usable(products);
    for (int64_t c = 0; c < width; c += V::lanes) {
      V local = load_scalars<V>(carries + c);
      V product = load_scalars<V>(products + c);
      V before = load_scalars<V>(entering + c);
      store_scalars<V>(carries + c, Space::apply(local, product, before));
    }
    applicable = applicable && usable(carries);
    if (!applicable) {  // infinities, or a product out of range: walk after all
      walk(entering, carries);
      return leave(entering);
    }
    leave(carries);  // first: the next tile waits for nothing else
    for_channels([&]<class Pass, class W>(int64_t c, int64_t n) {
      apply_rows<Pass, W>(pass<Pass>(0, c), t.rows, n, place + c, entering + c, width);
    });
  }

  void run(void* memory) const {
    auto* scratch = static_cast<Scalar*>(memory);
    if (t.wait) return deferred(scratch);
    enter(scratch);
    walk(scratch, scratch + 2 * width);
    leave(scratch);
  }
};

template <template <class, class, Access> class PassOf, class V>
void run_tile(const Scan& s, const Tile& t, void* scratch) {
  switch (s.op) {
    case ScanOp::linear_scan:
      return TileOf<PassOf, LinearScan, V>(s, t).run(scratch);
    case ScanOp::decay_scan:
      return TileOf<PassOf, DecayScan, V>(s, t).run(scratch);
    case ScanOp::log_scan:
      return TileOf<PassOf, LogScan, V>(s, t).run(scratch);
    case ScanOp::min_gru_g:
      return TileOf<PassOf, MinGru<false>, V>(s, t).run(scratch);
    case ScanOp::min_gru_identity:
      return TileOf<PassOf, MinGru<true>, V>(s, t).run(scratch);
    case ScanOp::min_lstm_g:
      return TileOf<PassOf, MinLstm<false>, V>(s, t).run(scratch);
    case ScanOp::min_lstm_identity:
      return TileOf<PassOf, MinLstm<true>, V>(s, t).run(scratch);
  }
}

}  // namespace MSRNN_ISA
}  // namespace msrnn
