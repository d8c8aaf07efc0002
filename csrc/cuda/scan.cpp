// The host side of the scans on CUDA: checks, the plan, memory and the launch. scan.cuh has the
// kernel.
//
// No call waits for the device. Every call takes its own memory from torch's allocator and runs in
// the current stream, so any stream and device will do, captured in a graph or not.
#include "scan.h"

#include "../scan_ops.h"
#include "on_device.h"
#include "row_step.h"

namespace msrnn {
namespace {

// Whether a view can be read or written 16 bytes at a time.
bool is_wide(const View& v, int64_t size, int64_t channels) {
  return v.channel == size && channels * size % 16 == 0 &&
         (reinterpret_cast<uintptr_t>(v.data) | v.row | v.time) % 16 == 0;
}

int64_t count_sequences(const Shape& shape, const OptionalTensor& cu_seqlens) {
  if (!cu_seqlens) return shape.rows;
  STD_TORCH_CHECK(shape.rows == 1, "cu_seqlens needs B = 1");
  STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1,
                  "expected cu_seqlens of shape (N + 1,)");
  const ScalarType type = cu_seqlens->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long,
                  "expected int32 or int64 cu_seqlens");
  return cu_seqlens->size(0) - 1;
}

ScanCall describe(const Inputs& in, OptionalTensor& cu_seqlens, const OptionalTensor& resets,
                  bool reverse, bool backward) {
  const int64_t size = size_of(in.dtype);
  // Positions are 32 bits wide in the kernel.
  constexpr int64_t kMost = (int64_t{1} << 31) - 1024;
  STD_TORCH_CHECK(in.shape.time < kMost && in.shape.channels < kMost,
                  "expected less than 2^31 - 1024 steps and channels");
  ScanCall call{};
  call.rows = in.shape.rows;
  call.time = in.shape.time;
  call.channels = in.shape.channels;
  call.sequences = count_sequences(in.shape, cu_seqlens);
  call.reverse = reverse;
  call.plan = scan_plan(backward, size, call.rows, call.time, call.channels);
  for (int i = 0; i < in.count; ++i) call.input[i] = in.view[i];
  if (cu_seqlens) {
    if (!cu_seqlens->is_contiguous()) cu_seqlens = torch::stable::contiguous(*cu_seqlens);
    call.cu_seqlens = memory_of(*cu_seqlens);
    call.long_ends = cu_seqlens->scalar_type() == ScalarType::Long;
  }
  if (resets) {
    STD_TORCH_CHECK(resets->dim() == 2 && resets->size(0) == call.rows &&
                        resets->size(1) == call.time && resets->scalar_type() == ScalarType::Bool,
                    "expected resets (B, T) of bool");
    call.resets = memory_of(*resets);
    call.resets_row = resets->stride(0);
    call.resets_time = resets->stride(1);
  }
  STD_TORCH_CHECK(call.plan.chains < kMost, "expected fewer rows and channels");
  return call;
}

void run(ScanOp op, DType dtype, bool backward, const Tensor& like, ScanCall& call) {
  if (call.rows == 0 || call.channels == 0) return;  // there is nothing to write
  const View* views[8] = {&call.input[0],      &call.input[1],     &call.input[2],
                          &call.state,         &call.grad_state,   &call.grad_input[0],
                          &call.grad_input[1], &call.grad_input[2]};
  for (int i = 0; i < 8; ++i) {
    call.wide[i] = is_wide(*views[i], size_of(dtype), call.channels);
  }
  const OnDevice device(like);
  OptionalTensor workspace;
  if (call.plan.look_back) {
    const int64_t scalar = dtype == DType::float64 ? 8 : 4;
    const int64_t bytes = lay_out(call.plan, scalar, nullptr, nullptr).bytes;
    workspace = allocate(like, {bytes}, ScalarType::Byte);
    lay_out(call.plan, scalar, static_cast<char*>(workspace->data_ptr()), &call.exchange);
  }
  const char* error = launch_scan(op, dtype, backward, call, device.stream());
  STD_TORCH_CHECK(error == nullptr, "the scan was not launched: ", error ? error : "");
}

struct Cuda {
  static std::tuple<Tensor, Tensor> forward(ScanOp op, const Inputs& in, const Tensor& like,
                                            OptionalTensor h0, OptionalTensor cu_seqlens,
                                            OptionalTensor resets, bool reverse) {
    ScanCall call = describe(in, cu_seqlens, resets, reverse, false);
    const ScalarType carry = accumulation_type(in.dtype);
    check_state(h0, call.sequences, call.channels, carry);
    Tensor h = allocate(like, {call.rows, call.time, call.channels});
    Tensor last = allocate(like, {call.sequences, call.channels}, carry);
    call.state = view_of(h);
    call.entering = state_data(h0);
    call.leaving = last.data_ptr();
    run(op, in.dtype, false, like, call);
    return {h, last};
  }

  static Tensor backward(ScanOp op, const Inputs& in, const Inputs& gradients, const Tensor& h,
                         OptionalTensor grad_h, OptionalTensor grad_last, OptionalTensor h0,
                         OptionalTensor cu_seqlens, OptionalTensor resets, bool reverse) {
    ScanCall call = describe(in, cu_seqlens, resets, reverse, true);
    const ScalarType carry = accumulation_type(in.dtype);
    check_state(h0, call.sequences, call.channels, carry);
    check_state(grad_last, call.sequences, call.channels, carry);
    Tensor grad_h0 = allocate(h, {call.sequences, call.channels}, carry);
    call.state = view_of_states(h, in);
    call.grad_state = view_of_gradient(grad_h, h);
    for (int i = 0; i < gradients.count; ++i) call.grad_input[i] = gradients.view[i];
    call.entering = state_data(grad_last);
    call.leaving = grad_h0.data_ptr();
    call.h0 = state_data(h0);
    run(op, in.dtype, true, h, call);
    return grad_h0;
  }

  static void step(const RowStep& step, const Tensor& like) {
    constexpr int64_t kMost = int64_t{1} << 31;
    STD_TORCH_CHECK(step.channels < kMost && step.batch * (step.channels / 256 + 1) < kMost,
                    "expected fewer rows and channels");
    const OnDevice device(like);
    const char* error = launch_row_step(step, device.stream());
    STD_TORCH_CHECK(error == nullptr, "the step was not launched: ", error ? error : "");
  }

  static Tensor new_like(const Tensor& x) { return allocate(x, x.sizes()); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(msrnn_ops, MSRNN_DEVICE_KEY, m) { register_scans<Cuda>(m); }

}  // namespace msrnn
