// Runs the scan kernels on the emulator, without torch, and checks what they write.
//
//   driver --list      names every case
//   driver             runs them all
//   driver --quick     runs those that the slow sanitizers have time for
//   driver NAME...     runs these
//
// The truth is the recurrence step by step in double, with the algebra of recurrence.h: it shares
// no tile, no span and no carry with the kernel. Every byte that a call must not write is checked,
// too: tensors lie between guards, and all they hold before the call is poison (NaN).
//
// A line for each case: a hash of the bits of all it wrote, its error relative to the largest value
// of a tensor, and its name. The hashes must not depend on the emulator's schedule. Exit code 1 if
// anything is wrong.
//
// With ONLY_FLOAT32 it has the cases of one dtype and links with scan_float32.cu alone.
#include "driver.h"

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cuda/memory.h"
#include "cuda/scan.h"

#if defined(ONLY_FLOAT32)
namespace msrnn {
namespace gpu {
template <class T>
cudaError_t launch_scan_of(ScanOp, bool backward, const ScanCall&, cudaStream_t);
extern template cudaError_t launch_scan_of<float>(ScanOp, bool, const ScanCall&, cudaStream_t);
}  // namespace gpu

const char* launch_scan(ScanOp op, DType, bool backward, const ScanCall& call, void* stream) {
  return cudaGetErrorString(gpu::launch_scan_of<float>(op, backward, call, stream));
}
}  // namespace msrnn
#endif

namespace msrnn {
namespace {

using gpu::Double;

// Cases.

enum class Layout { contiguous, time_major, strided };  // strided: every second channel

struct Case {
  std::string name;
  ScanOp op;
  DType dtype;
  bool backward;
  int64_t rows, time, channels;
  bool entering, reverse, gradient;  // whether h0 and its like, and a gradient of h, are given
  Layout layout;
  int64_t offset;                // elements by which tensors miss their alignment
  std::vector<int64_t> lengths;  // of packed sequences; empty: not packed
  int64_t lead;                  // steps before the first of them, which none covers
  double resets;                 // how likely one is
  bool long_ends;
  bool infinite;    // a decay is infinite: spans are of no use
  double slowness;  // added to gates, so that states live long
  bool quick;
};

const char* name_of(ScanOp op) {
  constexpr const char* kNames[] = {"linear_scan",      "decay_scan",       "log_scan",
                                    "min_gru_g",        "min_gru_identity", "min_lstm_g",
                                    "min_lstm_identity"};
  return kNames[static_cast<int>(op)];
}

const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};
  return kNames[static_cast<int>(dtype)];
}

constexpr ScanOp kOps[] = {ScanOp::linear_scan,      ScanOp::decay_scan,       ScanOp::log_scan,
                           ScanOp::min_gru_g,        ScanOp::min_gru_identity, ScanOp::min_lstm_g,
                           ScanOp::min_lstm_identity};

enum class Path { walk, look_back, groups };

const char* name_of(Path path) {
  constexpr const char* kNames[] = {"walk", "look_back", "groups"};
  return kNames[static_cast<int>(path)];
}

// The shapes of the plan (scan_plan): 3 tiles; 11, in one group; 67, in five. The last tile is not
// whole, nor is the last block of channels.
void set_shape(Case& c, Path path) {
  const int64_t tile = c.backward ? 128 : 256;
  c.time = (path == Path::walk ? 2 : path == Path::look_back ? 10 : 66) * tile + 37;
  c.rows = path == Path::groups ? 1 : 2;
  c.channels = path == Path::groups ? 8 : 24;
}

// What may be special about a call, apart from op, dtype, direction and path. The last thread that
// has steps has one of them, or two or three, as the feature says.
struct Feature {
  const char* name;
  void (*set)(Case&);
};

void set_state(Case& c) { c.entering = true; }

// Sequences of no step, of one, of a few and of many tiles.
void set_packed(Case& c) {
  c.rows = 1;
  c.lengths = {0, 1, 3, c.time / 3, 0, 0, 1, 1, c.time / 4, 5};
  int64_t left = c.time;
  for (int64_t n : c.lengths) left -= n;
  c.lengths.push_back(left);
  c.lengths.push_back(0);
}

// No sequence covers the first steps and the last ones: whole tiles and a part of one.
void set_uncovered(Case& c) {
  set_packed(c), set_state(c);
  c.lead = c.lengths[3], c.lengths[3] = 0;
  c.lengths.pop_back(), c.lengths.pop_back();
}

const Feature kFeatures[] = {
    {"plain", [](Case&) {}},
    {"state", set_state},
    {"state_reverse", [](Case& c) { set_state(c), c.reverse = true; }},
    {"packed_state", [](Case& c) { set_packed(c), set_state(c); }},
    {"packed_reverse", [](Case& c) { set_packed(c), c.reverse = c.long_ends = true; }},
    {"time_major",
     [](Case& c) { set_state(c), c.rows = 2, c.time += 1, c.layout = Layout::time_major; }},
    {"strided_no_gradient",
     [](Case& c) { set_state(c), c.layout = Layout::strided, c.gradient = false; }},
    {"unaligned", [](Case& c) { set_state(c), c.time += 1, c.channels -= 3, c.offset = 1; }},
    {"packed_unaligned", [](Case& c) { c.time += 2, set_packed(c), set_state(c), c.channels = 3; }},
    {"resets", [](Case& c) { set_state(c), c.resets = 0.02; }},
    {"resets_reverse",
     [](Case& c) { set_state(c), c.time += 2, c.reverse = true, c.resets = 0.2; }},
    {"packed_resets", [](Case& c) { set_packed(c), set_state(c), c.resets = 0.5; }},
    {"uncovered", set_uncovered},
    {"uncovered_reverse",
     [](Case& c) { set_uncovered(c), c.reverse = c.long_ends = true, c.resets = 0.02; }},
};
constexpr int kFeatureCount = std::size(kFeatures);

Case make(ScanOp op, DType dtype, bool backward, Path path, const Feature& feature) {
  Case c{};
  c.op = op;
  c.dtype = dtype;
  c.backward = backward;
  c.gradient = true;
  set_shape(c, path);
  feature.set(c);
  c.name = std::string(name_of(op)) + (backward ? "/backward/" : "/forward/") + name_of(dtype) +
           '/' + name_of(path) + '/' + feature.name;
  return c;
}

// Every op, direction and path, in two dtypes; what else may be special takes turns.
void add_crossed(std::vector<Case>& cases) {
  int turn = 0;
  for (ScanOp op : kOps) {
    for (bool backward : {false, true}) {
      for (Path path : {Path::walk, Path::look_back, Path::groups}) {
        for (DType dtype : {DType::float32, DType::bfloat16}) {
          cases.push_back(make(op, dtype, backward, path, kFeatures[turn++ % kFeatureCount]));
          const bool parked = dtype == DType::bfloat16 && op == ScanOp::min_lstm_g;
          cases.back().quick = parked && path == Path::look_back;
        }
      }
    }
  }
}

// Every feature on every path, of one op.
void add_features(std::vector<Case>& cases) {
  for (const Feature& feature : kFeatures) {
    for (bool backward : {false, true}) {
      for (Path path : {Path::walk, Path::look_back, Path::groups}) {
        cases.push_back(make(ScanOp::min_gru_g, DType::float32, backward, path, feature));
        cases.back().quick = path != Path::groups || feature.set == set_state;
      }
    }
  }
}

void add_other_dtypes(std::vector<Case>& cases) {
  for (DType dtype : {DType::float64, DType::float16}) {
    for (bool backward : {false, true}) {
      cases.push_back(make(ScanOp::min_lstm_g, dtype, backward, Path::walk, kFeatures[1]));
      cases.push_back(make(ScanOp::log_scan, dtype, backward, Path::look_back, kFeatures[3]));
    }
  }
}

// Decays are infinite in one channel: their tiles walk serially, those after them go on from there.
void add_infinite(std::vector<Case>& cases) {
  const Feature feature{"infinite", [](Case& c) { set_state(c), c.infinite = true; }};
  const Feature packed{"packed_infinite",
                       [](Case& c) { set_packed(c), set_state(c), c.infinite = true; }};
  for (ScanOp op : {ScanOp::linear_scan, ScanOp::decay_scan, ScanOp::log_scan}) {
    for (Path path : {Path::walk, Path::look_back, Path::groups}) {
      for (const auto& [f, dtype] : {std::pair{feature, DType::float32},
                                     {feature, DType::bfloat16},
                                     {packed, DType::float32}}) {
        cases.push_back(make(op, dtype, false, path, f));
        cases.back().quick = op == ScanOp::log_scan && path == Path::look_back;
        if (op == ScanOp::linear_scan) cases.push_back(make(op, dtype, true, path, f));
      }
    }
  }
}

// Gates around -8 forget little: what a rounding loses stays.
void add_slow(std::vector<Case>& cases) {
  const Feature slow{"slow", [](Case& c) { c.slowness = 8; }};
  const Feature packed{"packed_slow", [](Case& c) { set_packed(c), set_state(c), c.slowness = 8; }};
  for (bool backward : {false, true}) {
    for (Path path : {Path::walk, Path::look_back, Path::groups}) {
      for (const Feature& f : {slow, packed}) {
        cases.push_back(make(ScanOp::min_gru_identity, DType::float32, backward, path, f));
      }
    }
  }
}

// Shapes with a corner: no step, one step, one channel, empty sequences alone, as many chains as
// make a block walk many tiles.
void add_corners(std::vector<Case>& cases) {
  const auto add = [&](const char* name, bool backward, int64_t rows, int64_t time,
                       int64_t channels, std::vector<int64_t> lengths = {}) {
    Case c = make(ScanOp::min_gru_g, DType::float32, backward, Path::walk, {name, set_state});
    c.rows = rows, c.time = time, c.channels = channels, c.lengths = lengths;
    cases.push_back(c);
  };
  for (bool backward : {false, true}) {
    add("no_step", backward, 3, 0, 5);
    add("one_step", backward, 3, 1, 40);
    add("one_channel", backward, 1, 700, 1);
    add("empty_sequences", backward, 1, 0, 9, {0, 0, 0});
    add("many_empty_channels", backward, 1, 0, 128, {0, 0, 0});
    add("many_chains", backward, 132, 700, 64);
    add("few_rows", backward, 3, 42, 40);  // a thread folds several parts
    add("fewer_rows", backward, 1, 3, 40);
    add("short_sequences", backward, 1, 600, 9, {100, 0, 100});
  }
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  add_features(cases);
  add_infinite(cases);
  add_slow(cases);
  add_corners(cases);
  const size_t own = cases.size();
  add_crossed(cases);
  add_other_dtypes(cases);
  std::vector<Case> kept;
  for (size_t i = 0; i < cases.size(); ++i) {
    bool known = false;
    for (size_t k = 0; k < own && i >= own; ++k) known = known || cases[k].name == cases[i].name;
#if defined(ONLY_FLOAT32)
    known = known || cases[i].dtype != DType::float32;
#endif
    if (!known) kept.push_back(cases[i]);
  }
  return kept;
}

// Tensors.

// A tensor of (rows, time, channels) in the layout of a case, or a contiguous one of states.
class Tensor {
 public:
  Tensor(DType dtype, int64_t rows, int64_t time, int64_t channels,
         Layout layout = Layout::contiguous, int64_t offset = 0)
      : dtype_(dtype), rows_(rows), time_(time), channels_(channels) {
    const int64_t apart = layout == Layout::strided ? 2 : 1, line = channels * apart;
    const bool time_major = layout == Layout::time_major;
    const int64_t size = size_of(dtype);
    memory_ = std::make_unique<Memory>((rows * time * line + offset) * size);
    view_.data = memory_->data() + offset * size;
    view_.channel = apart * size;
    view_.row = (time_major ? 1 : time) * line * size;
    view_.time = (time_major ? rows : 1) * line * size;
  }

  const View& view() const { return view_; }
  DType dtype() const { return dtype_; }
  void* data() const { return view_.data; }
  bool wide() const {  // as the host of torch decides it
    const int64_t size = size_of(dtype_);
    return view_.channel == size && channels_ * size % 16 == 0 &&
           (reinterpret_cast<uintptr_t>(view_.data) | view_.row | view_.time) % 16 == 0;
  }
  char* at(int64_t row, int64_t time, int64_t channel) const {
    return view_.data + row * view_.row + time * view_.time + channel * view_.channel;
  }
  double get(int64_t row, int64_t time, int64_t channel) const {
    return load(dtype_, at(row, time, channel));
  }
  void set(int64_t row, int64_t time, int64_t channel, double x) const {
    store(dtype_, at(row, time, channel), x);
  }
  template <class Each>
  void for_all(const Each& each) const {
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t t = 0; t < time_; ++t) {
        for (int64_t c = 0; c < channels_; ++c) each(r, t, c);
      }
    }
  }
  void fill(const std::function<double()>& next) const {
    for_all([&](int64_t r, int64_t t, int64_t c) { set(r, t, c, next()); });
  }

  // Whether all bytes but the elements are as they were. Takes the elements away.
  bool surroundings_untouched() const {
    for_all([&](int64_t r, int64_t t, int64_t c) { Memory::poison(at(r, t, c), size_of(dtype_)); });
    return memory_->guards_untouched() && Memory::is_poison(memory_->data(), memory_->bytes());
  }

 private:
  DType dtype_;
  int64_t rows_, time_, channels_;
  std::unique_ptr<Memory> memory_;
  View view_;
};

// The tensors of a case: what it reads, what it writes, and what it should have written.

using Tensors = std::vector<std::unique_ptr<Tensor>>;

struct Data {
  Tensors input, grad_input;
  std::unique_ptr<Tensor> h, grad_h, h0, entering, leaving;
  Vector<int64_t> long_ends;
  Vector<int32_t> ends;
  Vector<uint8_t> resets;  // every second byte

  bool reset(const Case& c, int64_t row, int64_t time) const {
    return !resets.empty() && resets[2 * (row * c.time + time)];
  }
};

DType state_dtype(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }
int64_t sequences_of(const Case& c) {
  return c.lengths.empty() ? c.rows : static_cast<int64_t>(c.lengths.size());
}
bool is_lstm(ScanOp op) { return op == ScanOp::min_lstm_g || op == ScanOp::min_lstm_identity; }
int inputs_of(ScanOp op) { return is_lstm(op) ? 3 : 2; }

std::unique_ptr<Tensor> tensor_of(const Case& c) {
  return std::make_unique<Tensor>(c.dtype, c.rows, c.time, c.channels, c.layout, c.offset);
}
std::unique_ptr<Tensor> states_of(const Case& c) {
  return std::make_unique<Tensor>(state_dtype(c.dtype), 1, sequences_of(c), c.channels);
}

// Decays that are mostly below one, so that states stay finite over any length.
double random_input(const Case& c, int i, Random& random) {
  switch (c.op) {
    case ScanOp::linear_scan:
      return i == 0 ? random.uniform(-0.3, 1.0) : random.uniform(-1, 1);
    case ScanOp::decay_scan:
      return i == 0 ? random.uniform(-3, 0.1) : random.uniform(-1, 1);
    case ScanOp::log_scan:
      return i == 0 ? random.uniform(-2, 0) : random.uniform(-3, 3);
    default:
      return random.uniform(-3, 3) - (i == 0 ? c.slowness : 0);
  }
}

Data make_data(const Case& c) {
  Random random(std::hash<std::string>{}(c.name));
  Data d;
  for (int i = 0; i < inputs_of(c.op); ++i) {
    d.input.push_back(tensor_of(c));
    d.input.back()->fill([&] { return random_input(c, i, random); });
    if (c.backward) d.grad_input.push_back(tensor_of(c));
  }
  if (c.infinite) {  // on the path of groups also in the last tile of one, in either direction
    for (double at : {0.5, 0.718, 0.282}) {
      d.input[0]->set(0, static_cast<int64_t>(at * static_cast<double>(c.time)), 1, HUGE_VAL);
    }
  }
  d.h = tensor_of(c);
  d.leaving = states_of(c);
  if (c.entering) {
    d.entering = states_of(c);
    d.entering->fill([&] { return random.uniform(-2, 2); });
  }
  if (c.backward && c.entering) {
    d.h0 = states_of(c);
    d.h0->fill([&] { return random.uniform(-2, 2); });
  }
  if (c.backward && c.gradient) {
    d.grad_h = tensor_of(c);
    d.grad_h->fill([&] { return random.uniform(-1, 1); });
  }
  if (!c.lengths.empty()) {
    d.long_ends = {c.lead};
    for (int64_t n : c.lengths) d.long_ends.push_back(d.long_ends.back() + n);
    d.ends.assign(d.long_ends.begin(), d.long_ends.end());
    for (int64_t t = 0; t < c.time; ++t) {  // what no sequence covers may hold anything
      if (d.ends.front() <= t && t < d.ends.back()) continue;
      for (int64_t channel = 0; channel < c.channels; ++channel) {
        for (const auto& x : d.input) x->set(0, t, channel, NAN);
        if (d.grad_h) d.grad_h->set(0, t, channel, NAN);
      }
    }
  }
  if (c.resets) {
    d.resets.assign(2 * c.rows * c.time, 1);
    for (size_t i = 0; i < d.resets.size(); i += 2) d.resets[i] = random.uniform(0, 1) < c.resets;
    for (int32_t first : d.ends) d.resets[2 * (first < c.time ? first : 0)] = 1;
    if (d.ends.empty()) d.resets[0] = 1;
  }
  return d;
}

Tensors written(Data& d) {
  Tensors all = std::move(d.grad_input);
  all.push_back(std::move(d.leaving));
  if (all.size() == 1) all.push_back(std::move(d.h));
  return all;
}

// The truth.

template <class Op>
class Truth {
 public:
  Truth(const Case& c, const Data& d) : c_(c), d_(d) {}

  // The states, as the forward pass of the case, or the one before its backward pass, has them.
  void forward(const Tensor* entering, const Tensor& h, const Tensor* leaving) const {
    for_sequences([&](int64_t row, int64_t n, int64_t begin, int64_t end, int64_t channel) {
      auto state = Space::enter(Double(entering ? entering->get(0, n, channel) : initial()));
      for (int64_t s = begin; s < end; ++s) {
        const int64_t t = c_.reverse ? begin + end - 1 - s : s;
        const int64_t border = c_.reverse ? t + 1 : t;
        if (border < end && d_.reset(c_, row, border)) state = Space::enter(Double(initial()));
        Double x[Op::inputs];
        for (int i = 0; i < Op::inputs; ++i) x[i] = Double(d_.input[i]->get(row, t, channel));
        state = Space::walk(state, Space::reduce(Op::gates(x)));
        h.set(row, t, channel, Space::value_of(state).v);
      }
      if (leaving) leaving->set(0, n, channel, Space::value_of(state).v);
    });
  }

  void backward(const Tensors& grad_input, const Tensor& leaving) const {
    for_sequences([&](int64_t row, int64_t n, int64_t begin, int64_t end, int64_t channel) {
      Double carry(d_.entering ? d_.entering->get(0, n, channel) : 0);
      for (int64_t s = begin; s < end; ++s) {
        const int64_t t = c_.reverse ? s : begin + end - 1 - s;
        const int64_t before = c_.reverse ? t + 1 : t - 1;
        Double x[Op::saved], factor[Op::inputs];
        for (int i = 0; i < Op::saved; ++i) x[i] = Double(d_.input[i]->get(row, t, channel));
        const bool first = before < begin || before >= end;
        const int64_t border = c_.reverse ? t + 1 : t;
        const bool cut = border < end && d_.reset(c_, row, border);
        const double given = d_.h0 ? d_.h0->get(0, n, channel) : initial();
        const Double h(cut ? initial() : first ? given : d_.h->get(row, before, channel));
        const Gates<Double> g = Op::adjoint(x, h, factor);
        const Double adjoint = Double(d_.grad_h ? d_.grad_h->get(row, t, channel) : 0) + carry;
        for (int i = 0; i < Op::inputs; ++i) {
          grad_input[i]->set(row, t, channel, (adjoint * factor[i]).v);
        }
        carry = cut ? Double(0) : g.kept * adjoint;
      }
      leaving.set(0, n, channel, carry.v);
    });
  }

 private:
  using Space = typename Op::Space;

  static double initial() { return std::is_same_v<Space, LogSpace> ? -HUGE_VAL : 0; }

  template <class Each>
  void for_sequences(const Each& each) const {
    for (int64_t channel = 0; channel < c_.channels; ++channel) {
      for (int64_t n = 0; n < sequences_of(c_); ++n) {
        if (d_.ends.empty()) {
          each(n, n, 0, c_.time, channel);
        } else {
          each(0, n, d_.ends[n], d_.ends[n + 1], channel);
        }
      }
    }
  }

  const Case& c_;
  const Data& d_;
};

// Fills what a backward pass reads of the forward one, and returns what the case should write.
template <class Op>
Tensors expect(Case c, const Data& d) {
  const Truth<Op> truth(c, d);
  const auto zeros = [&] {
    auto x = tensor_of(c);
    x->fill([] { return 0; });
    return x;
  };
  if (c.backward) {
    d.h->fill([] { return 0; });
    truth.forward(d.h0.get(), *d.h, nullptr);
  }
  c.dtype = DType::float64;
  Tensors expected;
  if (!c.backward) {
    expected.push_back(states_of(c));
    expected.push_back(zeros());
    truth.forward(d.entering.get(), *expected[1], expected[0].get());
    return expected;
  }
  for (int i = 0; i < Op::inputs; ++i) expected.push_back(zeros());
  expected.push_back(states_of(c));
  truth.backward(expected, *expected.back());
  return expected;
}

Tensors expect(const Case& c, const Data& d) {
  switch (c.op) {
    case ScanOp::linear_scan:
      return expect<LinearScan>(c, d);
    case ScanOp::decay_scan:
      return expect<DecayScan>(c, d);
    case ScanOp::log_scan:
      return expect<LogScan>(c, d);
    case ScanOp::min_gru_g:
      return expect<MinGru<false>>(c, d);
    case ScanOp::min_gru_identity:
      return expect<MinGru<true>>(c, d);
    case ScanOp::min_lstm_g:
      return expect<MinLstm<false>>(c, d);
    default:
      return expect<MinLstm<true>>(c, d);
  }
}

// The call.

const char* launch(const Case& c, const Data& d, const Memory& workspace, ScanCall call) {
  call.rows = c.rows;
  call.time = c.time;
  call.channels = c.channels;
  call.reverse = c.reverse;
  call.sequences = sequences_of(c);
  const auto attach = [&](View& view, int index, const Tensor* tensor) {
    if (!tensor) return;
    view = tensor->view();
    call.wide[index] = tensor->wide();
  };
  for (size_t i = 0; i < d.input.size(); ++i) attach(call.input[i], i, d.input[i].get());
  attach(call.state, 3, d.h.get());
  attach(call.grad_state, 4, d.grad_h.get());
  for (size_t i = 0; i < d.grad_input.size(); ++i) {
    attach(call.grad_input[i], 5 + i, d.grad_input[i].get());
  }
  call.entering = d.entering ? d.entering->data() : nullptr;
  call.leaving = d.leaving->data();
  call.h0 = d.h0 ? d.h0->data() : nullptr;
  call.long_ends = c.long_ends;
  if (c.long_ends) {
    call.cu_seqlens = d.long_ends.data();
  } else if (!d.ends.empty()) {
    call.cu_seqlens = d.ends.data();
  }
  if (!d.resets.empty()) {
    call.resets = d.resets.data();
    call.resets_row = 2 * c.time;
    call.resets_time = 2;
  }
  if (workspace.bytes() > 0) {
    lay_out(call.plan, size_of(state_dtype(c.dtype)), workspace.data(), &call.exchange);
  }
  return launch_scan(c.op, c.dtype, c.backward, call, kStream);
}

// Comparison.

double tolerance(const Case& c) {
  if (c.dtype == DType::float64) return 1e-13;
  return c.slowness ? 6e-7 : 1e-6;
}

// The largest difference beyond the rounding of a result, relative to the largest value; infinite
// where one is not a number or not finite and the other is not the same.
double error_of(const Tensor& actual, const Tensor& expected) {
  double largest = 1e-30, difference = 0;
  expected.for_all([&](int64_t r, int64_t t, int64_t c) {
    const double x = expected.get(r, t, c), y = actual.get(r, t, c);
    if (std::isfinite(x)) largest = std::fmax(largest, std::fabs(x));
    const bool same = x == y || (std::isnan(x) && std::isnan(y));
    if (same) return;
    const double apart = std::fabs(x - y) - half_a_unit(actual.dtype(), x);
    difference = std::isfinite(apart) ? std::fmax(difference, apart) : HUGE_VAL;
  });
  return difference / largest;
}

// FNV-1a over the elements.
uint64_t hash_of(const Tensor& tensor, DType dtype, uint64_t hash) {
  tensor.for_all([&](int64_t r, int64_t t, int64_t c) {
    uint64_t bits = 0;
    memcpy(&bits, tensor.at(r, t, c), size_of(dtype));
    hash = (hash ^ bits) * 0x100000001B3;
  });
  return hash;
}

bool run(const Case& c) {
  Data d = make_data(c);
  const Tensors expected = expect(c, d);
  ScanCall call{};
  call.plan = scan_plan(c.backward, size_of(c.dtype), c.rows, c.time, c.channels);
  const int64_t scalar = size_of(state_dtype(c.dtype));
  const Memory workspace(call.plan.look_back ? lay_out(call.plan, scalar, nullptr, nullptr).bytes
                                             : 0);
  if (const char* error = launch(c, d, workspace, call); error && strcmp(error, "no error") != 0) {
    std::printf("WRONG %s: %s\n", c.name.c_str(), error);
    return false;
  }
  const Tensors outputs = written(d);
  double error = 0;
  uint64_t hash = 0xCBF29CE484222325;
  bool untouched = workspace.guards_untouched();
  for (size_t i = 0; i < outputs.size(); ++i) {
    const bool states = i + 1 == expected.size() ? c.backward : i == 0 && !c.backward;
    error = std::fmax(error, error_of(*outputs[i], *expected[i]));
    hash = hash_of(*outputs[i], states ? state_dtype(c.dtype) : c.dtype, hash);
    untouched = outputs[i]->surroundings_untouched() && untouched;
  }
  const bool right = error <= tolerance(c) && untouched;
  std::printf("%016" PRIx64 " %.1e %s%s%s\n", hash, error, c.name.c_str(),
              error <= tolerance(c) ? "" : "  WRONG: values", untouched ? "" : "  WRONG: overrun");
  return right;
}

}  // namespace
}  // namespace msrnn

int main(int argc, char** argv) {
  return msrnn::run_cases(argc, argv, msrnn::all_cases(), msrnn::run);
}
