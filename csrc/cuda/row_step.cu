// One token of minGRU or minLSTM for every row of a batch, in place on rows of a larger state.
//
// A thread has one channel of one row: it reads the inputs and the state, walks one step of the
// recurrence, and writes the state and the output. Neighbouring threads have neighbouring channels.
//
// Traffic. Each input is read once, each state is read and written once, and the output is written
// once. A batch of 64 rows of 2048 channels moves 2.6 MB, for which an H200 has to take 0.6 us,
// less than a launch; so we left 16-byte loads out, which would need a second kernel for channels
// that do not lie side by side. A scan of one step with states gathered before and scattered after
// it reads and writes every state twice more.
#include "memory.h"
#include "row_step.h"

namespace msrnn {
namespace gpu {

constexpr int kRowStepThreads = 256;

MSRNN_FN float number_at(const float* p) { return *p; }
MSRNN_FN double number_at(const double* p) { return *p; }
template <class Narrow>
MSRNN_FN float number_at(const Narrow* p) {
  return low_half(Narrow{}, p->bits);
}

template <class Op, class T>
__global__ void __launch_bounds__(kRowStepThreads)
    row_step_kernel(const __grid_constant__ RowStep call) {
  using V = typename Stored<T>::V;
  using S = typename V::Scalar;
  using Space = typename Op::Space;
  const int64_t pieces = (call.channels + kRowStepThreads - 1) / kRowStepThreads;
  const int64_t b = blockIdx.x / pieces;
  const int64_t channel = blockIdx.x % pieces * kRowStepThreads + threadIdx.x;
  const int64_t row = find_row(call.rows, b);
  if (channel >= call.channels) return;
  S* const out = reinterpret_cast<S*>(call.out) + b * call.channels + channel;
  if (row < 0) {
    *out = 0;
    return;
  }
  S* const state = reinterpret_cast<S*>(call.state + row * call.state_row) + channel;
  V x[Op::inputs];
#pragma unroll
  for (int i = 0; i < Op::inputs; ++i) {
    const View& v = call.input[i];
    x[i] = V(number_at(reinterpret_cast<const T*>(v.data + b * v.row + channel * v.channel)));
  }
  const auto after = Space::walk(Space::enter(V(*state)), Space::reduce(Op::gates(x)));
  *state = *out = Space::value_of(after).v;
}

template <class T>
cudaError_t launch_row_step_of(const RowStep& step, cudaStream_t stream) {
  const int64_t pieces = (step.channels + kRowStepThreads - 1) / kRowStepThreads;
  const auto blocks = static_cast<uint32_t>(step.batch * pieces);
  const auto of = [&]<class Op>(Op) {
    return launch(row_step_kernel<Op, T>, blocks, kRowStepThreads, 0, stream, step);
  };
  switch (step.op) {
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

const char* launch_row_step(const RowStep& step, void* stream) {
  const auto of = [&] {
    switch (step.dtype) {
      case DType::float32:
        return gpu::launch_row_step_of<float>;
      case DType::float64:
        return gpu::launch_row_step_of<double>;
      case DType::bfloat16:
        return gpu::launch_row_step_of<BFloat16>;
      default:
        return gpu::launch_row_step_of<Half>;
    }
  }();
  const cudaError_t error = of(step, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace msrnn
