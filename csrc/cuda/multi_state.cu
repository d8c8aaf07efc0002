// The entry from the host: finds and launches the kernels of multi_state.cuh.
#include "multi_state.cuh"

namespace msrnn {
namespace gpu {
namespace {

// Calls `with` for the kernel of a call.
template <class With>
cudaError_t with_kernel(StepCall& call, const With& with) {
  const auto of = [&]<class T, int chunks>(T, std::integral_constant<int, chunks>) {
    call.shared = StepBlock<T, chunks>::lay_out_shared(call);
    const auto bytes = static_cast<size_t>(call.shared.bytes);
    if (auto e = allow_shared(step_kernel<T, chunks>, bytes)) return e;
    return with(step_kernel<T, chunks>, bytes);
  };
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 2> two;
  switch (call.state.dtype) {
    case DType::bfloat16:
      return of(BFloat16{}, one);
    case DType::float16:
      return of(Half{}, one);
    default:
      return call.state.row_bytes() <= 512 ? of(float{}, one) : of(float{}, two);
  }
}

const char* text_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace gpu

const char* step_fits(const StepCall& call, bool* fits) {
  StepCall copy = call;
  return gpu::text_of(gpu::with_kernel(copy, [&](auto kernel, size_t shared) {
    int most = 0;
    const cudaError_t error = resident_blocks(&most, kernel, kStepThreads, shared);
    *fits = most >= call.plan.splits;
    return error;
  }));
}

const char* launch_step(StepCall call, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const StepExchange& exchange = call.exchange;
  const int64_t cleared =
      reinterpret_cast<char*>(exchange.summaries) - reinterpret_cast<char*>(exchange.ticket);
  const auto blocks = static_cast<uint32_t>(call.state.batch * call.plan.splits);
  return gpu::text_of(gpu::with_kernel(call, [&](auto kernel, size_t shared) {
    const auto launch_half = [&](bool attends, bool finishes, int64_t first, int64_t last) {
      call.attends = attends;
      call.finishes = finishes;
      call.first = first;
      call.last = last;
      if (auto e = cudaMemsetAsync(exchange.ticket, 0, cleared, on)) return e;
      return launch(kernel, blocks, kStepThreads, shared, on, call);
    };
    const int64_t first = call.first, last = call.last;
    if (call.plan.one_launch) return launch_half(true, true, first, last);
    for (int64_t t = first; t < last; ++t) {
      if (auto e = launch_half(true, false, t, t + 1)) return e;
      if (auto e = launch_half(false, true, t, t + 1)) return e;
    }
    return cudaSuccess;
  }));
}

const char* launch_evict(const State& state, const Policy& policy, const float* scores,
                         void* stream) {
  const auto blocks = static_cast<uint32_t>(state.batch);
  return gpu::text_of(launch(gpu::evict_kernel, blocks, kStepThreads, kStepWarps * sizeof(Summary),
                             static_cast<cudaStream_t>(stream),
                             gpu::EvictCall{state, policy, scores}));
}

}  // namespace msrnn
