// Runs the step kernels of multi-state attention on the emulator, without torch, and checks what
// they write. Arguments and output are those of driver.cpp.
//
// The truth is attention over the kept states in double, one token after the other, and the policy
// as a sort of (score, position); it shares only Policy with the kernel. After every token the kept
// positions, free slots and counts must be equal, and outputs and scores close. Keys and values of
// empty slots are NaN. In cases of `indexed` rows the batch names some rows of a larger state, in
// another order, and others that do nothing: -1, one beyond the state, one that is named already.
//
// With ONLY_FLOAT32 it has the cases of one dtype and links with multi_state_float32.cu alone.
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/memory.h"
#include "cuda/multi_state.h"
#include "driver.h"

#if defined(ONLY_FLOAT32)
namespace msrnn {
namespace gpu {
template <class T>
cudaError_t step_fits_of(StepCall, Fits*);
template <class T>
cudaError_t launch_step_of(StepCall, cudaStream_t);
extern template cudaError_t step_fits_of<float>(StepCall, Fits*);
extern template cudaError_t launch_step_of<float>(StepCall, cudaStream_t);
}  // namespace gpu

const char* step_fits(const StepCall& call, Fits* fits) {
  return cudaGetErrorString(gpu::step_fits_of<float>(call, fits));
}
const char* launch_step(const StepCall& call, void* stream) {
  return cudaGetErrorString(gpu::launch_step_of<float>(call, stream));
}
}  // namespace msrnn
#endif

namespace msrnn {
namespace {

enum class Mode { fused, halves, sequence };  // halves: attend, then evict

struct Case {
  std::string name;
  DType dtype;
  int64_t rows, query_heads, kv_heads, head_dim, kept;  // rows: of the state
  int64_t tokens, planned_rows;
  bool per_head;
  Policy policy;
  Mode mode;
  bool padded;  // sequence: some tokens are not valid
  bool quick;
  // The row of the state that each row of the batch names; empty: its own.
  std::vector<int64_t> index;

  int64_t batch() const { return index.empty() ? rows : static_cast<int64_t>(index.size()); }
  // The row of the state that a row of the batch uses, or -1.
  int64_t row_of(int64_t b) const {
    if (index.empty()) return b;
    const bool first = std::find(index.begin(), index.begin() + b, index[b]) == index.begin() + b;
    return first && index[b] >= 0 && index[b] < rows ? index[b] : -1;
  }
};

struct Shape {
  const char* name;
  int64_t rows, query_heads, kv_heads, head_dim, kept, tokens;
  bool quick;
  int64_t planned_rows = 0;  // the plan is that of so many rows: the more, the larger the blocks
};
constexpr Shape kShapes[] = {
    {"tiny", 2, 2, 1, 8, 3, 7, true},
    {"two_blocks", 1, 2, 2, 8, 32, 34, true},
    {"grouped", 1, 8, 2, 64, 40, 44, false},
    {"many_heads", 1, 12, 12, 16, 70, 73, false},
    {"multi_query", 1, 11, 1, 128, 33, 36, false},
    {"odd_dim", 2, 6, 3, 80, 37, 39, false},
    {"wide", 1, 2, 2, 256, 40, 42, false},
    {"wider", 1, 3, 1, 136, 34, 36, false},
    {"long", 1, 4, 2, 32, 165, 168, false},
    {"rows", 5, 2, 1, 8, 32, 34, false},
    {"large_blocks", 1, 16, 8, 16, 99, 103, false, 132},
};
struct Named {
  const char* name;
  Policy policy;
  bool per_head;
};
constexpr Named kPolicies[] = {
    {"tova", {ScoreKind::attention, 0, 0}, false},
    {"tova_head", {ScoreKind::attention, 2, 1}, true},
    {"window", {ScoreKind::position, 0, 0}, false},
    {"sinks", {ScoreKind::position, 2, 0}, false},
    {"h2o", {ScoreKind::accumulated, 0, 2}, false},
    {"h2o_head", {ScoreKind::accumulated, 0, 1}, true},
};
constexpr const char* kModes[] = {"fused", "halves", "sequence"};

// Rows of the batch for some rows of a state of 4, and others that do nothing.
const std::vector<int64_t> kIndex = {-1, 2, 0, 4, 2, int64_t{1} << 31, 3};

const char* name_of(DType dtype) {
  return dtype == DType::float32 ? "float32" : dtype == DType::bfloat16 ? "bfloat16" : "float16";
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  int turn = 0;
  for (const Shape& s : kShapes) {
    for (const Named& p : kPolicies) {
      const Mode mode = static_cast<Mode>(turn % 3);
      const DType dtypes[] = {DType::float32, DType::bfloat16, DType::float32, DType::float16};
      const DType dtype = dtypes[turn / 3 % 4];
      const bool padded = mode == Mode::sequence && turn % 2 == 0;
      const bool few = s.kept > 100 && mode == Mode::sequence;
      cases.push_back({std::string(s.name) + '/' + p.name + '/' + kModes[turn % 3] + '/' +
                           name_of(dtype) + (padded ? "/padded" : ""),
                       dtype, s.rows, s.query_heads, s.kv_heads, s.head_dim, s.kept,
                       few ? 60 : s.tokens, s.planned_rows > 0 ? s.planned_rows : s.rows,
                       p.per_head, p.policy, mode, padded,
                       s.quick && (s.kept < 10 || mode != Mode::halves)});
#if defined(ONLY_FLOAT32)
      if (dtype != DType::float32) cases.pop_back();
#endif
      ++turn;
    }
    turn += 1;  // so that shapes differ in which policy meets which mode
  }
  for (const Named& p : kPolicies) {
    const Mode mode = static_cast<Mode>(turn % 2);
    const DType dtype = turn % 4 < 2 ? DType::float32 : DType::bfloat16;
    const bool large = turn % 3 == 0;  // in several blocks
    cases.push_back(
        {std::string("indexed/") + p.name + '/' + kModes[turn % 2] + '/' + name_of(dtype), dtype, 4,
         4, 2, 16, large ? 40 : 5, large ? 43 : 9, 4, p.per_head, p.policy, mode, false, !large,
         kIndex});
#if defined(ONLY_FLOAT32)
    if (dtype != DType::float32) cases.pop_back();
#endif
    ++turn;
  }
  return cases;
}

// The state of one row and group of the truth: per kept position its score; and all tokens of the
// row as they are stored.
struct Kept {
  std::vector<int64_t> slot_position;  // by slot; -1: empty
  std::vector<double> score;
  int64_t free = 0, last_evicted = -1;
};

struct Truth {
  const Case& c;
  std::vector<Kept> kept;     // (rows, groups)
  std::vector<int64_t> seen;  // (rows)
  int64_t groups, slots;

  explicit Truth(const Case& c)
      : c(c), seen(c.rows, 0), groups(c.per_head ? c.kv_heads : 1), slots(c.kept + 1) {
    kept.resize(c.rows * groups);
    for (Kept& k : kept) k.slot_position.assign(slots, -1), k.score.assign(slots, 0);
  }
};

struct Data {
  const Case& c;
  int64_t size, groups, slots;
  Memory q, k, v, out, keys, values, position, score, free, last_evicted, seen, scores, expiry,
      times, valid, index;

  explicit Data(const Case& c)
      : c(c),
        size(size_of(c.dtype)),
        groups(c.per_head ? c.kv_heads : 1),
        slots(c.kept + 1),
        q(c.batch() * c.query_heads * c.tokens * c.head_dim * size),
        k(c.batch() * c.kv_heads * c.tokens * c.head_dim * size),
        v(k.bytes()),
        out(q.bytes()),
        keys(c.rows * c.kv_heads * slots * c.head_dim * size),
        values(keys.bytes()),
        position(8 * c.rows * groups * slots),
        score(4 * c.rows * groups * slots),
        free(8 * c.rows * groups),
        last_evicted(8 * c.rows * groups),
        seen(8 * c.rows),
        scores(4 * c.batch() * groups * slots),
        expiry(8 * c.rows * groups * c.tokens),
        times(8 * c.rows * c.tokens),
        valid(c.batch() * c.tokens),
        index(8 * c.index.size()) {
    Random random(std::hash<std::string>{}(c.name));
    for (const Memory* m : {&q, &k, &v}) {
      for (int64_t at = 0; at < m->bytes(); at += size) {
        // Queries of size 3, so that attention is uneven.
        store(c.dtype, m->data() + at, random.uniform(-1, 1) * (m == &q ? 3 : 1));
      }
    }
    memset(score.data(), 0, score.bytes());
    memset(last_evicted.data(), 0xFF, last_evicted.bytes());
    memset(free.data(), 0, free.bytes());
    memset(seen.data(), 0, seen.bytes());
    memset(scores.data(), 0, scores.bytes());
    for (int64_t i = 0; i < valid.bytes(); ++i) {
      valid.data()[i] = !c.padded || random.uniform(0, 1) < 0.7;
    }
    // In 32 bits every number but one beyond them keeps its meaning; that one names no row, either.
    for (size_t i = 0; i < c.index.size(); ++i) {
      const auto narrow = static_cast<int32_t>(c.index[i]);
      if (wide_index()) memcpy(index.data() + 8 * i, &c.index[i], 8);
      if (!wide_index()) memcpy(index.data() + 4 * i, &narrow, 4);
    }
  }
  double number(const Memory& m, int64_t heads, int64_t b, int64_t h, int64_t t, int64_t d) const {
    return load(c.dtype, m.data() + (((b * heads + h) * c.tokens + t) * c.head_dim + d) * size);
  }
  int64_t whole(const Memory& m, int64_t i) const {
    int64_t x;
    memcpy(&x, m.data() + 8 * i, 8);
    return x;
  }
  float real(const Memory& m, int64_t i) const {
    float x;
    memcpy(&x, m.data() + 4 * i, 4);
    return x;
  }
  bool wide_index() const { return c.per_head; }
  bool is_valid(int64_t b, int64_t t) const { return valid.data()[b * c.tokens + t]; }
  Heads heads(const Memory& m, int64_t count, int64_t t) const {
    const int64_t row = c.head_dim * size;
    return {m.data() + t * row, count * c.tokens * row, c.tokens * row, row};
  }
};

// One token of a row of the batch by the truth. Returns the output (query_heads, head_dim) and the
// attention that each slot got (groups, slots), and changes the truth.
void attend(const Data& d, Truth& truth, int64_t b, int64_t t, std::vector<double>& out,
            std::vector<double>& attention) {
  const Case& c = truth.c;
  const int64_t each = c.query_heads / c.kv_heads, groups = truth.groups, row = c.row_of(b);
  out.assign(c.query_heads * c.head_dim, 0);
  attention.assign(groups * truth.slots, 0);
  if (row < 0) return;
  std::vector<int64_t> time_of;  // of each position
  for (int64_t i = 0; i <= t; ++i) {
    if (d.is_valid(b, i)) time_of.push_back(i);
  }
  for (int64_t g = 0; g < groups; ++g) {
    Kept& k = truth.kept[row * groups + g];
    k.slot_position[k.free] = truth.seen[row];
  }
  for (int64_t h = 0; h < c.query_heads; ++h) {
    const int64_t head = h / each, g = groups == 1 ? 0 : head;
    const Kept& k = truth.kept[row * groups + g];
    std::vector<double> weight(truth.slots, -HUGE_VAL);
    double largest = -HUGE_VAL, sum = 0;
    for (int64_t i = 0; i < truth.slots; ++i) {
      if (k.slot_position[i] < 0) continue;
      double dot = 0;
      for (int64_t x = 0; x < c.head_dim; ++x) {
        dot += d.number(d.q, c.query_heads, b, h, t, x) *
               d.number(d.k, c.kv_heads, b, head, time_of[k.slot_position[i]], x);
      }
      weight[i] = dot / std::sqrt(static_cast<double>(c.head_dim));
      largest = std::fmax(largest, weight[i]);
    }
    for (double& w : weight) sum += w = std::exp(w - largest);
    for (int64_t i = 0; i < truth.slots; ++i) {
      if (k.slot_position[i] < 0) continue;
      attention[g * truth.slots + i] += weight[i] / sum;
      for (int64_t x = 0; x < c.head_dim; ++x) {
        out[h * c.head_dim + x] +=
            weight[i] / sum * d.number(d.v, c.kv_heads, b, head, time_of[k.slot_position[i]], x);
      }
    }
  }
}

void evict(Truth& truth, int64_t row, const std::vector<double>& attention) {
  const Case& c = truth.c;
  if (row < 0) return;
  for (int64_t g = 0; g < truth.groups; ++g) {
    Kept& k = truth.kept[row * truth.groups + g];
    std::vector<std::pair<double, int64_t>> order;
    int64_t occupied = 0;
    for (int64_t i = 0; i < truth.slots; ++i) {
      const int64_t position = k.slot_position[i];
      if (position < 0) continue;
      ++occupied;
      double score = 0;
      if (c.policy.score == ScoreKind::attention) score = attention[g * truth.slots + i];
      if (c.policy.score == ScoreKind::accumulated) {
        score = k.score[i] += attention[g * truth.slots + i];
      }
      if (!is_protected(c.policy, position, truth.seen[row])) order.push_back({score, position});
    }
    k.last_evicted = -1;
    if (occupied > c.kept) {
      k.last_evicted = std::min_element(order.begin(), order.end())->second;
      const auto at = std::find(k.slot_position.begin(), k.slot_position.end(), k.last_evicted);
      k.score[at - k.slot_position.begin()] = 0;
      *at = -1;
    }
    k.free =
        std::find(k.slot_position.begin(), k.slot_position.end(), -1) - k.slot_position.begin();
  }
  ++truth.seen[row];
}

bool run(const Case& c) {
  Data d(c);
  Truth truth(c);
  const bool scored = c.policy.score == ScoreKind::accumulated;
  StepCall call{};
  call.state = {d.keys.data(),
                d.values.data(),
                reinterpret_cast<int64_t*>(d.position.data()),
                scored ? reinterpret_cast<float*>(d.score.data()) : nullptr,
                reinterpret_cast<int64_t*>(d.free.data()),
                reinterpret_cast<int64_t*>(d.last_evicted.data()),
                reinterpret_cast<int64_t*>(d.seen.data()),
                c.rows,
                c.kv_heads,
                d.groups,
                d.slots,
                c.head_dim,
                c.dtype};
  call.batch = c.batch();
  call.rows = {c.index.empty() ? nullptr : d.index.data(), d.wide_index(), c.rows};
  call.policy = c.policy;
  call.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(c.head_dim)));
  call.query_heads = c.query_heads;
  call.evicting = c.mode != Mode::halves;
  call.scores = c.mode == Mode::halves ? reinterpret_cast<float*>(d.scores.data()) : nullptr;
  call.plan =
      step_plan(c.planned_rows, c.query_heads, c.kv_heads, d.slots, c.head_dim, size_of(c.dtype));
  step_fits(call, &call.fits);
  call.plan.one_launch = call.plan.one_launch && call.fits != Fits::not_at_all;
  const Memory workspace(
      lay_out(call.plan, call.state, call.batch, c.query_heads, nullptr, nullptr).bytes);
  lay_out(call.plan, call.state, call.batch, c.query_heads, workspace.data(), &call.exchange);
  call.token = c.rows == 1 ? 77 : 0;  // the same for every launch, as a CUDA graph has it; or new
  const auto at_token = [&](int64_t t) {
    call.q = d.heads(d.q, c.query_heads, t);
    call.k = d.heads(d.k, c.kv_heads, t);
    call.v = d.heads(d.v, c.kv_heads, t);
    call.out = d.heads(d.out, c.query_heads, t);
  };
  std::vector<double> out, attention;
  double error = 0;
  bool same = true;
  const auto launches = [&](const char* wrong) {
    if (wrong && strcmp(wrong, "no error") != 0) {
      std::printf("WRONG %s: %s\n", c.name.c_str(), wrong);
      same = false;
    }
  };
  const auto compare_output = [&](int64_t b, int64_t t) {
    for (int64_t h = 0; h < c.query_heads; ++h) {
      for (int64_t x = 0; x < c.head_dim; ++x) {
        const double y = d.number(d.out, c.query_heads, b, h, t, x);
        const double right = out[h * c.head_dim + x];
        const double apart = std::fabs(y - right) - half_a_unit(c.dtype, right);
        error = std::isfinite(apart) ? std::fmax(error, apart) : HUGE_VAL;
      }
    }
  };
  const auto compare_state = [&] {
    for (int64_t i = 0; i < c.rows * d.groups; ++i) {
      const Kept& k = truth.kept[i];
      same = same && d.whole(d.last_evicted, i) == k.last_evicted && d.whole(d.free, i) == k.free;
      for (int64_t slot = 0; slot < d.slots; ++slot) {
        same = same && d.whole(d.position, i * d.slots + slot) == k.slot_position[slot];
        if (!scored) continue;
        const double apart = std::fabs(d.real(d.score, i * d.slots + slot) - k.score[slot]);
        error = std::fmax(error, apart / (c.query_heads + k.score[slot]));
      }
    }
    for (int64_t b = 0; b < c.rows; ++b) same = same && d.whole(d.seen, b) == truth.seen[b];
  };

  if (c.mode == Mode::sequence) {
    at_token(0);
    call.first = 0;
    call.last = call.time = c.tokens;
    call.valid = c.padded ? reinterpret_cast<bool*>(d.valid.data()) : nullptr;
    call.expiry = reinterpret_cast<int64_t*>(d.expiry.data());
    call.times = reinterpret_cast<int64_t*>(d.times.data());
    // As attend_sequence prepares them.
    memset(d.position.data(), 0xFF, d.position.bytes());
    launches(launch_step(call, kStream));
    std::vector<int64_t> expiry(c.rows * d.groups * c.tokens);
    for (int64_t b = 0; b < c.rows; ++b) {
      std::vector<int64_t> time_of;
      for (int64_t t = 0; t < c.tokens; ++t) {
        int64_t* const gone = expiry.data() + b * d.groups * c.tokens;
        for (int64_t g = 0; g < d.groups; ++g) gone[g * c.tokens + t] = c.tokens;
        if (!d.is_valid(b, t)) {
          for (int64_t g = 0; g < d.groups; ++g) gone[g * c.tokens + t] = t;
          continue;
        }
        time_of.push_back(t);
        attend(d, truth, b, t, out, attention);
        evict(truth, b, attention);
        compare_output(b, t);
        for (int64_t g = 0; g < d.groups; ++g) {
          const int64_t evicted = truth.kept[b * d.groups + g].last_evicted;
          if (evicted >= 0) gone[g * c.tokens + time_of[evicted]] = t + 1;
        }
      }
    }
    compare_state();
    for (size_t i = 0; i < expiry.size(); ++i) same = same && d.whole(d.expiry, i) == expiry[i];
  } else {
    memset(d.position.data(), 0xFF, d.position.bytes());
    for (int64_t t = 0; t < c.tokens; ++t) {
      at_token(t);
      call.first = 0;
      call.last = call.time = 1;
      launches(launch_step(call, kStream));
      for (int64_t b = 0; b < c.batch(); ++b) {
        attend(d, truth, b, t, out, attention);
        compare_output(b, t);
        for (int64_t i = 0; call.scores && i < d.groups * d.slots; ++i) {
          const double apart =
              std::fabs(d.real(d.scores, b * d.groups * d.slots + i) - attention[i]);
          error = std::isfinite(apart) ? std::fmax(error, apart / c.query_heads) : HUGE_VAL;
        }
        evict(truth, c.row_of(b), attention);
      }
      if (c.mode == Mode::halves) {
        launches(launch_evict(call.state, call.batch, call.rows, c.policy, call.scores, kStream));
      }
      compare_state();
    }
  }
  bool untouched = true;
  uint64_t hash = 0xCBF29CE484222325;
  for (const Memory* m : std::initializer_list<const Memory*>{
           &d.q, &d.k, &d.v, &d.out, &d.keys, &d.values, &d.position, &d.score, &d.free,
           &d.last_evicted, &d.seen, &d.scores, &d.expiry, &d.times, &d.index, &workspace}) {
    untouched = m->guards_untouched() && untouched;
    for (int64_t i = 0; m != &workspace && i < m->bytes(); ++i) {
      hash = (hash ^ static_cast<unsigned char>(m->data()[i])) * 0x100000001B3;
    }
  }
  // Beyond the rounding of the output. Weights that tensor cores multiply are exact to 2^-17.
  const double tolerance = c.dtype == DType::bfloat16 ? 1e-5 : 2e-6;
  const bool close = error <= tolerance;
  std::printf("%016" PRIx64 " %.1e %s%s%s%s\n", hash, error, c.name.c_str(),
              close ? "" : "  WRONG: values", same ? "" : "  WRONG: state",
              untouched ? "" : "  WRONG: overrun");
  return close && same && untouched;
}

}  // namespace
}  // namespace msrnn

int main(int argc, char** argv) {
  return msrnn::run_cases(argc, argv, msrnn::all_cases(), msrnn::run);
}
