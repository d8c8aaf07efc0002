// Multi-state attention on CUDA: checks, the plan, memory and the launch. The kernel is
// multi_state.cuh.
//
// No call synchronises with the host and every call has its own memory from torch's allocator, in
// the current stream: any stream, any device, captured in a graph or not.
#include "multi_state.h"

#include "../multi_state_ops.h"
#include "on_device.h"

namespace msrnn {
namespace {

// Rows of head_dim elements that can be read 16 bytes at a time; a copy where they cannot.
Tensor readable(const Tensor& x) {
  const int64_t size = size_of(dtype_of(x));
  bool aligned = x.stride(-1) == 1 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) aligned = aligned && x.stride(d) * size % 16 == 0;
  if (aligned) return x;
  Tensor copy = torch::stable::new_empty(x, x.sizes());
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
  call.policy = step.policy;
  call.scale = step.scale;
  call.query_heads = step.query_heads;
  call.plan = step_plan(state.batch, call.query_heads, state.kv_heads, state.slots, state.head_dim,
                        size_of(state.dtype));
  STD_TORCH_CHECK(state.slots < kMost && state.batch * call.plan.splits < kMost,
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
  if (call.state.batch == 0 || call.last == call.first) return;
  const OnDevice device(like);
  if (call.plan.one_launch) {
    const char* error = step_fits(call, &call.fits);
    call.plan.one_launch = call.fits != Fits::not_at_all;
    STD_TORCH_CHECK(error == nullptr, "the step was not launched: ", error ? error : "");
  }
  const int64_t bytes = lay_out(call.plan, call.state, call.query_heads, nullptr, nullptr).bytes;
  Tensor workspace = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  lay_out(call.plan, call.state, call.query_heads, static_cast<char*>(workspace.data_ptr()),
          &call.exchange);
  const char* error = launch_step(call, device.stream());
  STD_TORCH_CHECK(error == nullptr, "the step was not launched: ", error ? error : "");
}

struct Cuda {
  static Tensor readable(const Tensor& x) { return msrnn::readable(x); }
  static void run(const TokenStep& step, const Tensor& like) {
    StepCall call = describe(step);
    msrnn::run(call, like);
  }
  static void evict(const State& s, const Policy& policy, const Tensor& scores) {
    if (s.batch == 0) return;
    const OnDevice device(scores);
    const auto* sums = static_cast<const float*>(scores.data_ptr());
    const char* error = launch_evict(s, policy, sums, device.stream());
    STD_TORCH_CHECK(error == nullptr, "evict was not launched: ", error ? error : "");
  }
};

std::tuple<Tensor, Tensor> attend_sequence(const Tensor& q_in, const Tensor& k_in,
                                           const Tensor& v_in, OptionalTensor valid, int64_t kept,
                                           bool per_head, int64_t kind, int64_t sinks,
                                           int64_t recent, double scale) {
  check_heads(q_in, k_in, v_in, 4);
  STD_TORCH_CHECK(kept >= 1, "expected at least one slot");
  const Policy policy = policy_of(kind, sinks, recent);
  const Tensor q = readable(q_in), k = readable(k_in), v = readable(v_in);
  const int64_t batch = q.size(0), time = q.size(2), kv_heads = k.size(1), head_dim = q.size(3);
  const int64_t groups = per_head ? kv_heads : 1;
  Tensor out = torch::stable::new_zeros(q, q.sizes());
  Tensor expiry = torch::stable::new_empty(q, {batch, groups, time}, ScalarType::Long);
  if (batch == 0 || time == 0) return {out, expiry};

  // A state of its own; never more slots than tokens.
  const int64_t slots = std::min(kept, time) + 1;
  const auto longs = [&](std::initializer_list<int64_t> sizes, double value) {
    Tensor x = torch::stable::new_empty(q, sizes, ScalarType::Long);
    torch::stable::fill_(x, value);
    return x;
  };
  const bool scored = policy.score == ScoreKind::accumulated;
  Tensor keys = torch::stable::new_empty(k, {batch, kv_heads, slots, head_dim});
  Tensor values = torch::stable::new_empty(k, {batch, kv_heads, slots, head_dim});
  Tensor position = longs({batch, groups, slots}, -1), free = longs({batch, groups}, 0);
  Tensor last_evicted = longs({batch, groups}, -1), seen = longs({batch}, 0);
  Tensor times = torch::stable::new_empty(q, {batch, time}, ScalarType::Long);
  Tensor score =
      torch::stable::new_zeros(q, {batch, groups, scored ? slots : 0}, ScalarType::Float);
  const State marks = marks_of(position, score, free, seen, last_evicted, policy.score);
  const State state = state_of(k, keys, values, marks);
  StepCall call = describe(step_of(state, policy, scale, true, q, k, v, out, nullptr));
  call.last = call.time = time;
  call.valid = mask_of(valid, q);
  call.expiry = static_cast<int64_t*>(expiry.data_ptr());
  call.times = static_cast<int64_t*>(times.data_ptr());
  run(call, q);
  return {out, expiry};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(msrnn_ops, MSRNN_DEVICE_KEY, m) {
  register_steps<Cuda>(m);
  m.impl("attend_sequence", TORCH_BOX(&attend_sequence));
}

}  // namespace msrnn
