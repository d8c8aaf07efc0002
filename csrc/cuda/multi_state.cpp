// The host side of multi-state attention on CUDA: checks, the plan, memory and the launch. step.cuh
// has the kernel.
//
// No call waits for the device. Every call takes its own memory from torch's allocator and runs in
// the current stream, so any stream and device will do, captured in a graph or not.
#include "multi_state.h"

#include "../multi_state_ops.h"
#include "on_device.h"

namespace msrnn {
namespace {

// The tensor itself if its rows of head_dim elements can be read 16 bytes at a time, or else a
// copy.
Tensor readable(const Tensor& x) {
  const int64_t size = size_of(dtype_of(x));
  bool aligned = x.stride(-1) == 1 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) aligned = aligned && x.stride(d) * size % 16 == 0;
  if (aligned) return x;
  Tensor copy = allocate(x, x.sizes());
  torch::stable::copy_(copy, x);
  return copy;
}

void check_aligned(const State& s) {
  STD_TORCH_CHECK(
      (reinterpret_cast<uintptr_t>(s.keys) | reinterpret_cast<uintptr_t>(s.values)) % 16 == 0,
      "expected keys and values of a state aligned to 16 bytes");
}

StepCall describe(const TokenStep& step) {
  constexpr int64_t kMost = int64_t{1} << 31;
  const State& state = step.state;
  check_aligned(state);
  StepCall call{};
  call.state = state;
  call.batch = step.batch;
  call.rows = step.rows;
  call.policy = step.policy;
  call.scale = step.scale;
  call.query_heads = step.query_heads;
  call.plan = step_plan(call.batch, call.query_heads, state.kv_heads, state.slots, state.head_dim,
                        size_of(state.dtype));
  STD_TORCH_CHECK(
      state.slots < kMost && state.batch < kMost && call.batch * call.plan.splits < kMost,
      "expected fewer rows and slots");
  STD_TORCH_CHECK(call.query_heads <= 256, "expected at most 256 query heads");
  call.first = 0;
  call.last = 1;
  call.q = step.q;
  call.k = step.k;
  call.v = step.v;
  call.out = step.out;
  call.evicting = step.evicting;
  call.scores = step.scores;
  return call;
}

void run(StepCall& call, const Tensor& like) {
  if (call.batch == 0 || call.last == call.first) return;
  const OnDevice device(like);
  if (call.plan.one_launch) {
    const char* error = step_fits(call, &call.fits);
    call.plan.one_launch = call.fits != Fits::not_at_all;
    STD_TORCH_CHECK(error == nullptr, "the step was not launched: ", error ? error : "");
  }
  const int64_t bytes =
      lay_out(call.plan, call.state, call.batch, call.query_heads, nullptr, nullptr).bytes;
  Tensor workspace = allocate(like, {bytes}, ScalarType::Byte);
  lay_out(call.plan, call.state, call.batch, call.query_heads,
          static_cast<char*>(workspace.data_ptr()), &call.exchange);
  const char* error = launch_step(call, device.stream());
  STD_TORCH_CHECK(error == nullptr, "the step was not launched: ", error ? error : "");
}

struct Cuda {
  static Tensor readable(const Tensor& x) { return msrnn::readable(x); }
  static void run(const TokenStep& step, const Tensor& like) {
    StepCall call = describe(step);
    msrnn::run(call, like);
  }
  static void run(const TokenStep& step, const TokenSequence& sequence, const Tensor& like) {
    StepCall call = describe(step);
    call.last = call.time = sequence.time;
    call.valid = sequence.valid;
    call.expiry = sequence.expiry;
    call.times = sequence.times;
    msrnn::run(call, like);
  }
  static void evict(const State& s, const RowIndex& rows, const Policy& policy,
                    const Tensor& scores) {
    const int64_t batch = scores.size(0);
    if (batch == 0) return;
    const OnDevice device(scores);
    const auto* sums = memory_of<const float>(scores);
    const char* error = launch_evict(s, batch, rows, policy, sums, device.stream());
    STD_TORCH_CHECK(error == nullptr, "evict was not launched: ", error ? error : "");
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(msrnn_ops, MSRNN_DEVICE_KEY, m) { register_multi_state<Cuda>(m); }

}  // namespace msrnn
