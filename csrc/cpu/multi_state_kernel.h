// The inner loops of attention over the states that are kept, for one instruction set (number.h).
//
// Level by level:
//   tile     A few query heads times a few rows, with an accumulator for each pair, as many as a
//            vector has lanes, so that the dot products end in one vector. 4 heads share every load
//            of a row.
//   rows     Keys come tile after tile. Values come in pieces of kPieceBytes that stay in L1, over
//            heads and then over head_dim, so that 16 accumulators stay in registers.
//   block    Some hundreds of slots of one key-value head, first the keys and then the values
//            (multi_state.cpp). The weights in between never leave L1.
//
// Traffic. Every row of keys and values is read once from memory, for all query heads that share
// it. Rows are fetched into L2 kAheadBytes, or a piece, before their use. Other ways took longer,
// in float32 with two threads of a Zen 4: 1.4 times as long when rows are fetched into L1, where
// pieces and weights already live, 1.5 with the non-temporal hint, 1.3 with every second line, and
// 1.5 with no fetch of keys. In bfloat16, sums of pairs of rows take 0.6 of the time of widened
// rows.
#pragma once

#include "multi_state.h"
#include "number.h"

namespace msrnn {
namespace MSRNN_ISA {

constexpr int64_t kWidth = Float::lanes;
constexpr int64_t kAheadBytes = 8192;
constexpr int64_t kPieceBytes = 16384;
constexpr int64_t kRowsAtOnce = 128;               // of a piece
#if defined(MSRNN_AVX512) || defined(__aarch64__)  // 32 registers
constexpr int kAccumulators = 16;
#else
constexpr int kAccumulators = 8;
#endif

MSRNN_FN int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

MSRNN_FN void fetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

template <class E>
MSRNN_FN Float widen_some(const E* p, int64_t count) {
  if (count >= kWidth) return widen(p);
  E full[kWidth] = {};
  __builtin_memcpy(full, p, count * sizeof(E));
  return widen(full);
}

template <class E>
MSRNN_FN void store_some(E* p, Float x, int64_t count) {
  if (count >= kWidth) return store_full(p, x);
  E full[kWidth];
  store_full(full, x);
  __builtin_memcpy(p, full, count * sizeof(E));
}

// How a query meets a row: in float32, or for bfloat16 by the instruction that multiplies pairs
// exactly and adds them in float32.
template <class Element>
struct Widened {
  using E = Element;
  using Query = float;
  using Vector = Float;
  static constexpr int step = Float::lanes;
  static constexpr int64_t next_query = kLargestHeadDim;

  static MSRNN_FN void copy_query(const E* from, int64_t head_dim, Query* to) {
    for (int64_t d = 0; d < head_dim; d += kWidth) {
      store_full(to + d, widen_some(from + d, head_dim - d));
    }
  }
  static MSRNN_FN Vector load(const E* p) { return widen(p); }
  static MSRNN_FN Vector load_some(const E* p, int64_t count) { return widen_some(p, count); }
  static MSRNN_FN Vector load_query(const Query* p) { return load_full(p); }
  static MSRNN_FN Float multiply_add(Vector row, Vector query, Float sum) {
    return fma(row, query, sum);
  }
};

#if defined(MSRNN_AVX512_BF16)
struct PairsOfBFloat16 {
  using E = BFloat16;
  using Query = BFloat16;
  using Vector = __m512bh;
  static constexpr int step = 32;
  static constexpr int64_t next_query = 2 * kLargestHeadDim;

  static MSRNN_FN void copy_query(const E* from, int64_t head_dim, Query* to) {
    for (int64_t d = 0; d < head_dim; d += step) {
      _mm512_storeu_si512(to + d, (__m512i)load_some(from + d, head_dim - d));
    }
  }
  static MSRNN_FN Vector load(const E* p) { return (Vector)_mm512_loadu_si512(p); }
  static MSRNN_FN Vector load_some(const E* p, int64_t count) {
    return (Vector)_mm512_maskz_loadu_epi16(count < 32 ? (1u << count) - 1 : ~0u, p);
  }
  static MSRNN_FN Vector load_query(const Query* p) { return load(p); }
  static MSRNN_FN Float multiply_add(Vector row, Vector query, Float sum) {
    return _mm512_dpbf16_ps(sum.v, row, query);
  }
};
using DotBFloat16 = PairsOfBFloat16;
#else
using DotBFloat16 = Widened<BFloat16>;
#endif

template <class Dot>
void load_queries(const char* from, int64_t step, int64_t heads, int64_t head_dim, void* to) {
  using E = typename Dot::E;
  auto* out = static_cast<typename Dot::Query*>(to);
  for (int64_t h = 0; h < heads; ++h, from += step, out += Dot::next_query) {
    Dot::copy_query(reinterpret_cast<const E*>(from), head_dim, out);
  }
}

// Lane i: the sum of the lanes of x[i].
#if defined(MSRNN_AVX512)
MSRNN_FN Float add_lanes(const Float* x) {
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i) {  // within quarters: pairs of neighbours, two vectors at once
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i].v, x[2 * i + 1].v),
                         _mm512_unpackhi_ps(x[2 * i].v, x[2 * i + 1].v));
  }
  for (int i = 0; i < 4; ++i) {
    __m512d p = _mm512_castps_pd(a[2 * i]), q = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  }
  for (int i = 0; i < 2; ++i) {  // then the quarters
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xDD));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88),
                       _mm512_shuffle_f32x4(c[0], c[1], 0xDD));
}
#elif defined(MSRNN_AVX2)
MSRNN_FN Float add_lanes(const Float* x) {
  __m256 a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = _mm256_hadd_ps((__m256)x[2 * i].v, (__m256)x[2 * i + 1].v);
  for (int i = 0; i < 2; ++i) b[i] = _mm256_hadd_ps(a[2 * i], a[2 * i + 1]);
  return Float((FloatLanes)_mm256_add_ps(_mm256_permute2f128_ps(b[0], b[1], 0x20),
                                         _mm256_permute2f128_ps(b[0], b[1], 0x31)));
}
#elif defined(__aarch64__)
MSRNN_FN Float add_lanes(const Float* x) {
  const float32x4_t a = vpaddq_f32((float32x4_t)x[0].v, (float32x4_t)x[1].v);
  const float32x4_t b = vpaddq_f32((float32x4_t)x[2].v, (float32x4_t)x[3].v);
  return Float((FloatLanes)vpaddq_f32(a, b));
}
#else
MSRNN_FN Float add_lanes(const Float* x) {
  Float sum;
  for (int i = 0; i < kWidth; ++i) sum.v[i] = (x[i].v[0] + x[i].v[2]) + (x[i].v[1] + x[i].v[3]);
  return sum;
}
#endif

// Dot products of `heads` queries and lanes / heads rows, in lane head * rows + row.
template <class Dot, int heads>
MSRNN_FN Float dot_tile(const typename Dot::Query* queries, Rows rows, int64_t head_dim,
                        int64_t ahead) {
  constexpr int count = kWidth / heads;
  Float sum[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) sum[i] = Float(0.0f);
  auto add = [&](auto load, int64_t d) __attribute__((always_inline)) {
    typename Dot::Vector row[count];
#pragma GCC unroll 16
    for (int r = 0; r < count; ++r) {
      const auto* p = reinterpret_cast<const typename Dot::E*>(rows.data + r * rows.step) + d;
      __builtin_prefetch(reinterpret_cast<const char*>(p) + ahead, 0, 2);
      row[r] = load(p);
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; ++h) {
      const auto query = Dot::load_query(queries + h * Dot::next_query + d);
#pragma GCC unroll 16
      for (int r = 0; r < count; ++r) {
        sum[h * count + r] = Dot::multiply_add(row[r], query, sum[h * count + r]);
      }
    }
  };
  int64_t d = 0;
  for (; d + Dot::step <= head_dim; d += Dot::step) {
    add([](const auto* p) __attribute__((always_inline)) { return Dot::load(p); }, d);
  }
  if (d < head_dim) {
    const int64_t left = head_dim - d;
    add([=](const auto* p) __attribute__((always_inline)) { return Dot::load_some(p, left); }, d);
  }
  return add_lanes(sum);
}

template <class Dot, int heads>
MSRNN_FN void logits_tile(const typename Dot::Query* queries, Rows rows, int64_t head_dim,
                          Float scale, float* logits, int64_t stride, int64_t wanted,
                          int64_t ahead) {
  constexpr int count = kWidth / heads;
  float tile[kWidth];
  store_full(tile, dot_tile<Dot, heads>(queries, rows, head_dim, ahead) * scale);
  for (int h = 0; h < heads; ++h) {
    if (wanted == count) {
      __builtin_memcpy(logits + h * stride, tile + h * count, count * sizeof(float));
    } else {
      for (int64_t r = 0; r < wanted; ++r) logits[h * stride + r] = tile[h * count + r];
    }
  }
}

// All rows for `heads` queries. If the last tile is partial, it goes back and computes some rows
// again. Fewer rows than a tile has go one by one.
template <class Dot, int heads>
MSRNN_FN void logits_rows(const typename Dot::Query* queries, Rows rows, int64_t count,
                          int64_t head_dim, Float scale, float* logits, int64_t stride,
                          bool fetching) {
  constexpr int size = kWidth / heads;
  const int64_t bytes = head_dim * static_cast<int64_t>(sizeof(typename Dot::E));
  if (count < size) {
    for (int64_t r = 0; r < count; ++r) {
      Rows one{rows.data + r * rows.step, 0};
      logits_tile<Dot, heads>(queries, one, head_dim, scale, logits + r, stride, 1, 0);
    }
    return;
  }
  const int64_t ahead = fetching && rows.step == bytes ? kAheadBytes : 0;
  for (int64_t r = 0; r < count; r += size) {
    const int64_t first = least(r, count - size);
    Rows tile{rows.data + first * rows.step, rows.step};
    logits_tile<Dot, heads>(queries, tile, head_dim, scale, logits + first, stride, size, ahead);
  }
}

template <class Dot>
void logits(const void* queries, int64_t heads, Rows rows, int64_t count, int64_t head_dim,
            float scale, float* out, int64_t stride) {
  const auto* query = static_cast<const typename Dot::Query*>(queries);
  // Pieces of rows that stay in L1 while all heads pass over them.
  const int64_t bytes = head_dim * static_cast<int64_t>(sizeof(typename Dot::E));
  const int64_t piece = heads <= 4 ? count : (kPieceBytes / bytes + 15) / 16 * 16;
  const Float factor(scale);
  for (int64_t r = 0; r < count; r += piece) {
    Rows some{rows.data + r * rows.step, rows.step};
    const int64_t n = least(piece, count - r);
    for (int64_t h = 0; h < heads;) {
      const auto* q = query + h * Dot::next_query;
      float* to = out + h * stride + r;
      if (heads - h >= 4) {
        logits_rows<Dot, 4>(q, some, n, head_dim, factor, to, stride, h == 0);
        h += 4;
      } else if (heads - h >= 2) {
        logits_rows<Dot, 2>(q, some, n, head_dim, factor, to, stride, h == 0);
        h += 2;
      } else {
        logits_rows<Dot, 1>(q, some, n, head_dim, factor, to, stride, h == 0);
        h += 1;
      }
    }
  }
}

void exponentials(float* x, int64_t count, float* maximum, float* sum) {
  // A maximum of -inf would turn every e into NaN, so we begin with the lowest float, which gives
  // 0. NaN is passed over here and comes back in its own e.
  constexpr float kLowest = -3.4028235e38f;
  Float m(kLowest);
  for (int64_t i = 0; i < count; i += kWidth) {
    const Float v = load_full(x + i);
    m = select(greater(v, m), v, m);
  }
  float lanes[kWidth];
  store_full(lanes, m);
  float largest = lanes[0];
  for (int i = 1; i < kWidth; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  m = Float(largest);
  Float total(0.0f);
  for (int64_t i = 0; i < count; i += kWidth) {
    const Float e = exponential(load_full(x + i) - m);
    store_full(x + i, e);
    total = total + e;
  }
  store_full(lanes, total);
  float all = lanes[0];
  for (int i = 1; i < kWidth; ++i) all += lanes[i];
  *maximum = largest;
  *sum = all;
}

// How weighted rows are summed: in float32, or for bfloat16 two rows at a time by the instruction
// that the dot products use. Weights are then rounded to bfloat16, as in FlashAttention. The output
// is off by about as much as its own rounding, and the scores do not change.
template <class Element>
struct WidenedSum {
  using E = Element;
  static constexpr int smallest = 1;  // vectors of a tile

  const float* weights;
  int64_t stride;

  MSRNN_FN WidenedSum(const float* from, int64_t step, int64_t, int64_t)
      : weights(from), stride(step) {}

  // out[h][d], d in `vectors` vectors of which a partial one has `left` elements.
  template <int heads, int vectors, bool partial>
  MSRNN_FN void add(float* out, Rows rows, int64_t count, int64_t left, bool fetching) const {
    Float sum[heads][vectors];
#pragma GCC unroll 4
    for (int h = 0; h < heads; ++h) {
#pragma GCC unroll 16
      for (int j = 0; j < vectors; ++j) {
        sum[h][j] = load_full(out + h * kLargestHeadDim + j * kWidth);
      }
    }
    for (int64_t r = 0; r < count; ++r, rows.data += rows.step) {
      const auto* row = reinterpret_cast<const E*>(rows.data);
      if (fetching) fetch(rows.data + kPieceBytes, vectors * kWidth * sizeof(E));
      Float x[vectors];
#pragma GCC unroll 16
      for (int j = 0; j < vectors; ++j) {
        x[j] = partial ? widen_some(row, left) : widen(row + j * kWidth);
      }
#pragma GCC unroll 4
      for (int h = 0; h < heads; ++h) {
        const Float weight(weights[h * stride + r]);
#pragma GCC unroll 16
        for (int j = 0; j < vectors; ++j) sum[h][j] = fma(weight, x[j], sum[h][j]);
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; ++h) {
#pragma GCC unroll 16
      for (int j = 0; j < vectors; ++j) {
        store_full(out + h * kLargestHeadDim + j * kWidth, sum[h][j]);
      }
    }
  }
};

#if defined(MSRNN_AVX512_BF16)
struct PairSum {
  using E = BFloat16;
  static constexpr int smallest = 2;

  uint32_t pairs[4][kRowsAtOnce / 2];  // weights of two rows each

  MSRNN_FN PairSum(const float* weights, int64_t stride, int64_t heads, int64_t count) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t r = 0; r < count; r += kWidth) {
        const int64_t n = least(kWidth, count - r);
        const Float w = n < kWidth ? load_partial(weights + h * stride + r, static_cast<int>(n))
                                   : load_full(weights + h * stride + r);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs[h] + r / 2),
                            (__m256i)_mm512_cvtneps_pbh(w.v));
      }
    }
  }

  // Neighbours in a pair of the instruction are one index of head_dim in both rows: sums lie by
  // quarters of a vector, even quarters in one, odd ones in the next.
  template <int heads, int vectors, bool partial>
  MSRNN_FN void add(float* out, Rows rows, int64_t count, int64_t left, bool fetching) const {
    __m512 sum[heads][vectors];
#pragma GCC unroll 4
    for (int h = 0; h < heads; ++h) {
#pragma GCC unroll 16
      for (int j = 0; j < vectors; j += 2) {
        const float* from = out + h * kLargestHeadDim + j * kWidth;
        const __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + kWidth);
        sum[h][j] = _mm512_shuffle_f32x4(a, b, 0x88);
        sum[h][j + 1] = _mm512_shuffle_f32x4(a, b, 0xDD);
      }
    }
    const __mmask32 mask = partial ? (1u << left) - 1 : ~0u;
    for (int64_t r = 0; r < count; r += 2, rows.data += 2 * rows.step) {
      const char* next = rows.data + rows.step;
      const __mmask32 next_mask = r + 1 < count ? mask : 0;
      if (fetching) {
        fetch(rows.data + kPieceBytes, vectors * kWidth * sizeof(E));
        fetch(next + kPieceBytes, vectors * kWidth * sizeof(E));
      }
      __m512bh x[vectors];
#pragma GCC unroll 16
      for (int j = 0; j < vectors; j += 2) {
        const int64_t offset = j * kWidth * static_cast<int64_t>(sizeof(E));
        const __m512i a = _mm512_maskz_loadu_epi16(mask, rows.data + offset);
        const __m512i b = _mm512_maskz_loadu_epi16(next_mask, next + offset);
        x[j] = (__m512bh)_mm512_unpacklo_epi16(a, b);
        x[j + 1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
      }
#pragma GCC unroll 4
      for (int h = 0; h < heads; ++h) {
        const auto weight = (__m512bh)_mm512_set1_epi32(static_cast<int>(pairs[h][r / 2]));
#pragma GCC unroll 16
        for (int j = 0; j < vectors; ++j) sum[h][j] = _mm512_dpbf16_ps(sum[h][j], x[j], weight);
      }
    }
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
#pragma GCC unroll 4
    for (int h = 0; h < heads; ++h) {
#pragma GCC unroll 16
      for (int j = 0; j < vectors; j += 2) {
        float* to = out + h * kLargestHeadDim + j * kWidth;
        const __m512 even = sum[h][j], odd = sum[h][j + 1];
        _mm512_storeu_ps(to, _mm512_permutex2var_ps(even, first, odd));
        _mm512_storeu_ps(to + kWidth, _mm512_permutex2var_ps(even, second, odd));
      }
    }
  }
};
using SumBFloat16 = PairSum;
#else
using SumBFloat16 = WidenedSum<BFloat16>;
#endif

// All of head_dim: as many vectors at once as there are accumulators, then halves of that.
template <int heads, int vectors, class Sum>
MSRNN_FN void accumulate_heads(const Sum& weighted, float* out, Rows rows, int64_t count,
                               int64_t head_dim, bool fetching) {
  constexpr int64_t width = vectors * kWidth;
  for (; head_dim >= width; head_dim -= width, out += width) {
    weighted.template add<heads, vectors, false>(out, rows, count, 0, fetching);
    rows.data += width * static_cast<int64_t>(sizeof(typename Sum::E));
  }
  if (head_dim == 0) return;
  if constexpr (vectors > Sum::smallest) {
    accumulate_heads<heads, vectors / 2>(weighted, out, rows, count, head_dim, fetching);
  } else {
    weighted.template add<heads, vectors, true>(out, rows, count, head_dim, fetching);
  }
}

template <class Sum>
void accumulate(float* out, int64_t heads, const float* weights, int64_t stride, Rows rows,
                int64_t count, int64_t head_dim) {
  const int64_t bytes = head_dim * static_cast<int64_t>(sizeof(typename Sum::E));
  const int64_t piece = least(kPieceBytes / bytes, kRowsAtOnce);
  const bool adjacent = rows.step == bytes;
  for (int64_t r = 0; r < count; r += piece) {
    const Rows some{rows.data + r * rows.step, rows.step};
    const int64_t n = least(piece, count - r);
    for (int64_t h = 0; h < heads;) {
      const bool fetching = adjacent && h == 0;
      float* to = out + h * kLargestHeadDim;
      const int64_t left = heads - h, now = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      const Sum weighted(weights + h * stride + r, stride, now, n);
      if (now == 4) {
        accumulate_heads<4, kAccumulators / 4>(weighted, to, some, n, head_dim, fetching);
      } else if (now == 2) {
        accumulate_heads<2, kAccumulators / 2>(weighted, to, some, n, head_dim, fetching);
      } else {
        accumulate_heads<1, kAccumulators>(weighted, to, some, n, head_dim, fetching);
      }
      h += now;
    }
  }
}

void add_weighted(float* sums, const float* factors, const float* weights, int64_t stride,
                  int64_t heads, int64_t count) {
  for (int64_t r = 0; r < count; r += kWidth) {
    Float sum = load_full(sums + r);
    for (int64_t h = 0; h < heads; ++h) {
      sum = fma(Float(factors[h]), load_full(weights + h * stride + r), sum);
    }
    store_full(sums + r, sum);
  }
}

void add_outer(float* rows, const float* weights, int64_t stride, const float* x, int64_t heads,
               int64_t count, int64_t head_dim) {
  for (int64_t r = 0; r < count; ++r, rows += kLargestHeadDim) {
    for (int64_t d = 0; d < head_dim; d += kWidth) {
      Float sum = load_full(rows + d);
      for (int64_t h = 0; h < heads; ++h) {
        sum = fma(Float(weights[h * stride + r]), load_full(x + h * kLargestHeadDim + d), sum);
      }
      store_full(rows + d, sum);
    }
  }
}

template <class E>
void combine(char* out, const float* parts, int64_t part_step, const float* factors,
             int64_t factor_step, int64_t count, int64_t head_dim) {
  auto* to = reinterpret_cast<E*>(out);
  for (int64_t d = 0; d < head_dim; d += kWidth) {
    Float sum = Float(factors[0]) * load_full(parts + d);
    for (int64_t b = 1; b < count; ++b) {
      sum = fma(Float(factors[b * factor_step]), load_full(parts + b * part_step + d), sum);
    }
    store_some(to + d, sum, head_dim - d);
  }
}

template <class E>
void widen_row(const char* from, int64_t head_dim, float* to) {
  Widened<E>::copy_query(reinterpret_cast<const E*>(from), head_dim, to);
}

template <class Dot, class Sum>
AttentionKernels attention_kernels_of() {
  using E = typename Dot::E;
  return {load_queries<Dot>, logits<Dot>, exponentials, accumulate<Sum>,
          add_weighted,      add_outer,   combine<E>,   widen_row<E>};
}

inline AttentionKernels attention_kernels(DType dtype) {
  if (dtype == DType::bfloat16) return attention_kernels_of<DotBFloat16, SumBFloat16>();
  if (dtype == DType::float16) return attention_kernels_of<Widened<Half>, WidenedSum<Half>>();
  return attention_kernels_of<Widened<float>, WidenedSum<float>>();
}

}  // namespace MSRNN_ISA
}  // namespace msrnn
