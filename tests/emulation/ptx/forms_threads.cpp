// Control flow, and what threads do together: barriers, shuffles, votes, matrices.
#include <cstring>

#include "memory.h"
#include "number.h"

namespace ptx {
namespace {

constexpr uint32_t kAllLanes = ~0u;

uint32_t lane() { return static_cast<uint32_t>(runtime::running->lane); }

void jump(Thread& t, const Instruction& i) {
  if (i[0] < t.next && ++t.jumps > t.launch.most_jumps) t.fail("a thread runs for ever");
  t.next = i[0];
}
void end(Thread& t, const Instruction&) { t.ended = true; }
void pause(Thread& t, const Instruction&) { runtime::poll(t.where()); }

// Of all threads of the block: no compiler has emitted another barrier for the project's kernels.
void meet_block(Thread& t, const Instruction& i) {
  if (t.get<uint32_t>(i[0]) != 0) t.fail("a barrier other than 0");
  runtime::sync_block(t.where());
}
void meet_warp(Thread& t, const Instruction& i) {
  runtime::sync_warp(t.get<uint32_t>(i[0]), t.where());
}

// shfl.sync d|p, a, b, c, mask: the a of another lane. c holds the bounds of a segment of the warp.
// A lane whose source lies outside keeps its own, and p is false.
enum class Shuffle { up, down, bfly, idx };
template <Shuffle mode>
void shuffle(Thread& t, const Instruction& i) {
  const int self = static_cast<int>(lane());
  const int b = t.get<int32_t>(i[3]) & 31;
  const int clamp = t.get<int32_t>(i[4]) & 31, segments = t.get<int32_t>(i[4]) >> 8 & 31;
  const int first = self & segments, bound = first | (clamp & ~segments);
  int source;
  switch (mode) {
    case Shuffle::up:
      source = self - b;
      break;
    case Shuffle::down:
      source = self + b;
      break;
    case Shuffle::bfly:
      source = self ^ b;
      break;
    default:
      source = first | (b & ~segments);
  }
  const bool inside = mode == Shuffle::up ? source >= bound : source <= bound;
  const auto value = runtime::shuffle(t.get<uint32_t>(i[5]), t.get<uint32_t>(i[2]),
                                      inside ? source : self, t.where());
  t.set(i[0], static_cast<uint32_t>(value));
  t.set(i[1], inside);
}

uint32_t ballot(Thread& t, uint32_t mask, bool x) { return runtime::ballot(mask, x, t.where()); }
void vote_ballot(Thread& t, const Instruction& i) {
  t.set(i[0], ballot(t, t.get<uint32_t>(i[2]), t.get<bool>(i[1])));
}
void vote_any(Thread& t, const Instruction& i) {
  t.set(i[0], ballot(t, t.get<uint32_t>(i[2]), t.get<bool>(i[1])) != 0);
}
void vote_all(Thread& t, const Instruction& i) {
  t.set(i[0], ballot(t, t.get<uint32_t>(i[2]), !t.get<bool>(i[1])) == 0);
}

// redux.sync d, a, mask: f of the a of all lanes of the mask.
template <class T, auto f>
void reduce(Thread& t, const Instruction& i) {
  const T mine = t.get<T>(i[1]);
  const auto mask = t.get<uint32_t>(i[2]);
  T all{};
  for (int from = 0, met = 0; from < 32; ++from) {
    if (!(mask >> from & 1)) continue;
    const auto theirs =
        static_cast<T>(runtime::shuffle(mask, static_cast<Unsigned<T>>(mine), from, t.where()));
    all = met++ == 0 ? theirs : f(all, theirs);
  }
  t.set(i[0], all);
}

// mma: d = a b + c, of 16 x K and K x 8 numbers that the lanes of a warp hold in fragments. With
// g = lane / 4, i = lane % 4, and elements of a register side by side along K, `per` of them:
//   a  register r: row g + 8 (r % 2), columns from i * per + (r / 2) * (K / 2) on
//   b  register r: column g, rows from i * per + r * (K / 2) on
//   c  element e: row g + 8 (e / 2), column 2 i + e % 2
// Sums of doubles are rounded towards zero at the end, about the worst that hardware does.
template <class Element, int K>
void multiply(Thread& t, const Instruction& i) {
  constexpr int kPer = 4 / sizeof(Element), kStretch = 4 * kPer, kStretches = K / kStretch;
  static_assert(kStretches == 2);
  runtime::Factors mine{};
  for (int r = 0; r < 4; ++r) mine.left[r] = t.get<uint32_t>(i[4 + r]);
  for (int r = 0; r < 2; ++r) mine.right[r] = t.get<uint32_t>(i[8 + r]);
  const runtime::Factors* const lanes = runtime::bring(mine, t.where());
  const auto element = [](uint32_t word, int at) -> double {
    if constexpr (kPer == 1) {
      return value_of(Element{word});
    } else {
      return value_of(Element{static_cast<uint16_t>(word >> 16 * at)});
    }
  };
  float sums[4];  // c may lie in registers of d
  for (uint32_t e = 0; e < 4; ++e) {
    const uint32_t row = lane() / 4 + e / 2 * 8, column = lane() % 4 * 2 + e % 2;
    double total = t.get<float>(i[10 + static_cast<int>(e)]);
    for (uint32_t k = 0; k < K; ++k) {
      const uint32_t stretch = k / kStretch, from = k % kStretch / kPer;
      const uint32_t a = lanes[row % 8 * 4 + from].left[row / 8 + 2 * stretch];
      const uint32_t b = lanes[column * 4 + from].right[stretch];
      total += element(a, k % kPer) * element(b, k % kPer);
    }
    sums[e] = static_cast<float>(total);
    if (std::fabs(sums[e]) > std::fabs(total)) sums[e] = std::nextafter(sums[e], 0.0f);
  }
  for (int e = 0; e < 4; ++e) t.set(i[e], sums[e]);
}

// ldmatrix and stmatrix move n matrices of 8 x 8 numbers of 16 bits. Lanes 8 m to 8 m + 7 give the
// addresses of the rows of matrix m; a lane holds row lane / 4, columns 2 (lane % 4) and the next,
// or, transposed, these rows of that column.
struct Place {
  uint32_t row, column;
};
template <bool transposed>
Place place(uint32_t half) {
  const Place p{lane() / 4, lane() % 4 * 2 + half};
  return transposed ? Place{p.column, p.row} : p;
}
uint64_t row_of(Thread& t, uint64_t mine, uint32_t matrix, uint32_t row) {
  const auto address =
      runtime::shuffle(kAllLanes, mine, static_cast<int>(8 * matrix + row), t.where());
  checked(t, Space::shared, address, 16);
  return address;
}
template <int n, bool transposed>
void load_matrices(Thread& t, const Instruction& i) {
  const uint64_t mine = t.slots[i[n]] + t.slots[i[n + 1]];
  for (int m = 0; m < n; ++m) {
    uint64_t halves[2];
    for (uint32_t h = 0; h < 2; ++h) {
      const Place p = place<transposed>(h);
      const uint64_t row = row_of(t, mine, m, p.row);
      load_checked(t, Space::shared, row + 2 * p.column, 2, 1, &halves[h]);
    }
    t.set(i[m], static_cast<uint32_t>(halves[1] << 16 | halves[0]));
  }
}
template <int n, bool transposed>
void store_matrices(Thread& t, const Instruction& i) {
  const uint64_t mine = t.slots[i[0]] + t.slots[i[1]];
  for (int m = 0; m < n; ++m) {
    for (uint32_t h = 0; h < 2; ++h) {
      const Place p = place<transposed>(h);
      const uint64_t row = row_of(t, mine, m, p.row),
                     half = t.get<uint32_t>(i[2 + m]) >> 16 * h & 0xFFFF;
      store_checked(t, Space::shared, row + 2 * p.column, 2, 1, &half);
    }
  }
}

}  // namespace

void add_threads(Forms& forms) {
  forms.add("bra", "l", jump);
  forms.add("bra.uni", "l", jump);
  forms.add("ret", "", end);
  forms.add("exit", "", end);
  forms.add("nanosleep.u32", "s", pause);
  forms.add("bar.sync", "s", meet_block);
  forms.add("barrier.sync", "s", meet_block);
  forms.add("bar.warp.sync", "s", meet_warp);
  forms.add("shfl.sync.up.b32", "pssss", shuffle<Shuffle::up>);
  forms.add("shfl.sync.down.b32", "pssss", shuffle<Shuffle::down>);
  forms.add("shfl.sync.bfly.b32", "pssss", shuffle<Shuffle::bfly>);
  forms.add("shfl.sync.idx.b32", "pssss", shuffle<Shuffle::idx>);
  forms.add("vote.sync.ballot.b32", "dss", vote_ballot);
  forms.add("vote.sync.any.pred", "dss", vote_any);
  forms.add("vote.sync.all.pred", "dss", vote_all);
  rows<s32, u32>(forms, "redux.sync.min.", "dss", []<class T> { return reduce<T, smaller>; });
  rows<s32, u32>(forms, "redux.sync.max.", "dss", []<class T> { return reduce<T, larger>; });
  rows<s32, u32>(forms, "redux.sync.add.", "dss", []<class T> { return reduce<T, sum>; });

  const auto mma = [&](const char* name, Execute execute) {
    forms.add(std::string("mma.sync.aligned.") + name, "D4S4S2S4", execute);
  };
  mma("m16n8k16.row.col.f32.f16.f16.f32", multiply<Half, 16>);
  mma("m16n8k16.row.col.f32.bf16.bf16.f32", multiply<BFloat16, 16>);
  mma("m16n8k8.row.col.f32.tf32.tf32.f32", multiply<Tf32, 8>);
  const std::string load = "ldmatrix.sync.aligned.m8n8.", store = "stmatrix.sync.aligned.m8n8.";
  forms.add(load + "x1.shared.b16", "da", load_matrices<1, false>);
  forms.add(load + "x2.shared.b16", "D2a", load_matrices<2, false>);
  forms.add(load + "x4.shared.b16", "D4a", load_matrices<4, false>);
  forms.add(load + "x1.trans.shared.b16", "da", load_matrices<1, true>);
  forms.add(load + "x2.trans.shared.b16", "D2a", load_matrices<2, true>);
  forms.add(load + "x4.trans.shared.b16", "D4a", load_matrices<4, true>);
  forms.add(store + "x1.shared.b16", "as", store_matrices<1, false>);
  forms.add(store + "x2.shared.b16", "aS2", store_matrices<2, false>);
  forms.add(store + "x4.shared.b16", "aS4", store_matrices<4, false>);
  forms.add(store + "x1.trans.shared.b16", "as", store_matrices<1, true>);
  forms.add(store + "x2.trans.shared.b16", "aS2", store_matrices<2, true>);
  forms.add(store + "x4.trans.shared.b16", "aS4", store_matrices<4, true>);
}

}  // namespace ptx
