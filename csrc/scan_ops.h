// The scan operators as every backend registers them. We check their tensors, view them, and unpack
// each schema of ops.cpp into the three functions that a backend provides:
//
//   forward(op, inputs, like, h0, cu_seqlens, resets, reverse) returns (h, last);
//   backward(op, inputs, gradients, h, grad_h, grad_last, h0, cu_seqlens, resets, reverse) fills
//     `gradients` and returns grad_h0;
//   new_like(tensor) makes an output.
//
// and a fourth, of the steps that change rows of a larger state: step(RowStep, like).
#pragma once

#include <algorithm>

#include "common.h"
#include "scan.h"

namespace msrnn {

struct Shape {
  int64_t rows, time, channels;
};

inline Shape check_inputs(std::initializer_list<const Tensor*> tensors) {
  const Tensor& first = **tensors.begin();
  for (const Tensor* x : tensors) {
    STD_TORCH_CHECK(x->dim() == 3, "expected tensors of shape (B, T, D)");
    STD_TORCH_CHECK(x->scalar_type() == first.scalar_type(), "expected tensors of one dtype");
    for (int64_t d = 0; d < 3; ++d) {
      STD_TORCH_CHECK(x->size(d) == first.size(d), "expected tensors of one shape");
    }
  }
  return {first.size(0), first.size(1), first.size(2)};
}

inline void check_state(const OptionalTensor& x, int64_t segments, int64_t channels,
                        ScalarType type) {
  if (!x) return;
  STD_TORCH_CHECK(x->dim() == 2 && x->size(0) == segments && x->size(1) == channels,
                  "expected a state of shape (sequences, D)");
  STD_TORCH_CHECK(x->scalar_type() == type, "expected a state in the accumulation dtype");
}

inline const void* state_data(OptionalTensor& x) {
  if (!x) return nullptr;
  if (!x->is_contiguous()) x = torch::stable::contiguous(*x);
  return memory_of(*x);
}

struct Inputs {
  Shape shape;
  DType dtype;
  View view[3] = {};
  int count;
};

inline Inputs separate(std::initializer_list<const Tensor*> tensors) {
  Inputs in{check_inputs(tensors), dtype_of(**tensors.begin()), {}, 0};
  for (const Tensor* x : tensors) in.view[in.count++] = view_of(*x);
  return in;
}

inline Inputs joint(const Tensor& projection, int parts) {
  Inputs in{check_inputs({&projection}), dtype_of(projection), {}, parts};
  STD_TORCH_CHECK(in.shape.channels % parts == 0, "expected a last size divisible by ", parts);
  in.shape.channels /= parts;
  for (int i = 0; i < parts; ++i) {
    in.view[i] = slice_channels(view_of(projection), i, in.shape.channels);
  }
  return in;
}

// Inputs (B, D) as a sequence of one step.
inline Inputs separate_step(std::initializer_list<const Tensor*> tensors) {
  const Tensor& first = **tensors.begin();
  Inputs in{{first.size(0), 1, first.size(1)}, dtype_of(first), {}, 0};
  for (const Tensor* x : tensors) {
    STD_TORCH_CHECK(x->dim() == 2 && x->size(0) == first.size(0) && x->size(1) == first.size(1) &&
                        x->scalar_type() == first.scalar_type(),
                    "expected tensors (B, D) of one shape and dtype");
    const int64_t size = size_of(in.dtype);
    in.view[in.count++] = {memory_of(*x), x->stride(0) * size, 0, x->stride(1) * size};
  }
  return in;
}

inline bool is_constant(const Tensor& x) {
  return x.stride(0) == 0 && x.stride(1) == 0 && x.stride(2) == 0;
}

// The gradient of h, in the shape of h. Of a constant, such as .sum().backward() makes, we view one
// step for all.
inline View view_of_gradient(OptionalTensor& grad_h, const Tensor& h) {
  if (!grad_h) return {};
  check_inputs({&h, &*grad_h});
  const bool constant = is_constant(*grad_h) && h.numel() > 0;
  if (constant) {
    Tensor row = torch::stable::narrow(*grad_h, 0, 0, 1);
    row = torch::stable::narrow(row, 1, 0, 1);
    grad_h = torch::stable::contiguous(row);
  }
  View v = view_of(*grad_h);
  if (constant) v.row = v.time = 0;
  return v;
}

inline View view_of_states(const Tensor& h, const Inputs& in) {
  const Inputs states = separate({&h});
  STD_TORCH_CHECK(states.shape.rows == in.shape.rows && states.shape.time == in.shape.time &&
                      states.shape.channels == in.shape.channels && states.dtype == in.dtype,
                  "expected h in the shape and dtype of the inputs");
  return states.view[0];
}

template <class Backend>
struct ScanOps {
  template <ScanOp op>
  static std::tuple<Tensor, Tensor> forward2(const Tensor& x0, const Tensor& x1, OptionalTensor h0,
                                             OptionalTensor cu_seqlens, OptionalTensor resets,
                                             bool reverse) {
    return Backend::forward(op, separate({&x0, &x1}), x0, h0, cu_seqlens, resets, reverse);
  }

  // linear_scan and decay_scan need only their first input again.
  template <ScanOp op>
  static std::tuple<Tensor, Tensor, Tensor> backward_of_decay(
      OptionalTensor grad_h, OptionalTensor grad_last, const Tensor& a, const Tensor& h,
      OptionalTensor h0, OptionalTensor cu_seqlens, OptionalTensor resets, bool reverse) {
    Tensor grad_a = Backend::new_like(a), grad_b = Backend::new_like(a);
    Tensor grad_h0 = Backend::backward(op, separate({&a}), separate({&grad_a, &grad_b}), h, grad_h,
                                       grad_last, h0, cu_seqlens, resets, reverse);
    return {grad_a, grad_b, grad_h0};
  }

  static std::tuple<Tensor, Tensor, Tensor> backward2(ScanOp op, OptionalTensor grad_h,
                                                      OptionalTensor grad_last, const Tensor& x0,
                                                      const Tensor& x1, const Tensor& h,
                                                      OptionalTensor h0, OptionalTensor cu_seqlens,
                                                      OptionalTensor resets, bool reverse) {
    Tensor grad0 = Backend::new_like(x0), grad1 = Backend::new_like(x1);
    Tensor grad_h0 = Backend::backward(op, separate({&x0, &x1}), separate({&grad0, &grad1}), h,
                                       grad_h, grad_last, h0, cu_seqlens, resets, reverse);
    return {grad0, grad1, grad_h0};
  }

  static std::tuple<Tensor, Tensor, Tensor> log_scan_backward(
      OptionalTensor grad_h, OptionalTensor grad_last, const Tensor& log_a, const Tensor& log_b,
      const Tensor& log_h, OptionalTensor log_h0, OptionalTensor cu_seqlens, OptionalTensor resets,
      bool reverse) {
    return backward2(ScanOp::log_scan, grad_h, grad_last, log_a, log_b, log_h, log_h0, cu_seqlens,
                     resets, reverse);
  }

  static Tensor step(ScanOp op, const Inputs& in, const Tensor& like, const Tensor& h,
                     const Tensor& rows) {
    const ScalarType type = rows.scalar_type();
    STD_TORCH_CHECK((type == ScalarType::Int || type == ScalarType::Long) && rows.dim() == 1 &&
                        rows.size(0) == in.shape.rows && rows.is_contiguous(),
                    "expected rows (B,) of int32 or int64");
    const ScalarType carry = accumulation_type(in.dtype);
    const int64_t channels = in.shape.channels, size = carry == ScalarType::Double ? 8 : 4;
    STD_TORCH_CHECK(h.dim() == 2 && h.size(1) == channels && h.scalar_type() == carry &&
                        (channels < 2 || h.stride(1) == 1) &&
                        (h.size(0) < 2 || h.stride(0) >= channels),
                    "expected a state (rows, D) in the accumulation dtype, channels side by side");
    Tensor out = allocate(like, {in.shape.rows, channels}, carry);
    RowStep step{op,
                 in.dtype,
                 in.shape.rows,
                 channels,
                 {},
                 {memory_of(rows), type == ScalarType::Long, h.size(0)},
                 memory_of(h),
                 h.stride(0) * size,
                 static_cast<char*>(out.data_ptr())};
    std::copy_n(in.view, in.count, step.input);
    if (out.numel() > 0) Backend::step(step, like);
    return out;
  }
  static Tensor min_gru_step(const Tensor& gate, const Tensor& candidate, const Tensor& h,
                             const Tensor& rows, bool identity) {
    return step(gated<2>(identity), separate_step({&gate, &candidate}), gate, h, rows);
  }
  static Tensor min_lstm_step(const Tensor& forget, const Tensor& input, const Tensor& candidate,
                              const Tensor& h, const Tensor& rows, bool identity) {
    return step(gated<3>(identity), separate_step({&forget, &input, &candidate}), forget, h, rows);
  }

  // minGRU has two inputs and minLSTM three.
  template <int parts>
  static ScanOp gated(bool identity) {
    if (parts == 2) return identity ? ScanOp::min_gru_identity : ScanOp::min_gru_g;
    return identity ? ScanOp::min_lstm_identity : ScanOp::min_lstm_g;
  }

  static std::tuple<Tensor, Tensor> min_gru(const Tensor& gate, const Tensor& candidate,
                                            OptionalTensor h0, OptionalTensor cu_seqlens,
                                            OptionalTensor resets, bool reverse, bool identity) {
    return Backend::forward(gated<2>(identity), separate({&gate, &candidate}), gate, h0, cu_seqlens,
                            resets, reverse);
  }

  static std::tuple<Tensor, Tensor, Tensor> min_gru_backward(
      OptionalTensor grad_h, OptionalTensor grad_last, const Tensor& gate, const Tensor& candidate,
      const Tensor& h, OptionalTensor h0, OptionalTensor cu_seqlens, OptionalTensor resets,
      bool reverse, bool identity) {
    return backward2(gated<2>(identity), grad_h, grad_last, gate, candidate, h, h0, cu_seqlens,
                     resets, reverse);
  }

  static std::tuple<Tensor, Tensor> min_lstm(const Tensor& forget, const Tensor& input,
                                             const Tensor& candidate, OptionalTensor h0,
                                             OptionalTensor cu_seqlens, OptionalTensor resets,
                                             bool reverse, bool identity) {
    return Backend::forward(gated<3>(identity), separate({&forget, &input, &candidate}), forget, h0,
                            cu_seqlens, resets, reverse);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> min_lstm_backward(
      OptionalTensor grad_h, OptionalTensor grad_last, const Tensor& forget, const Tensor& input,
      const Tensor& candidate, const Tensor& h, OptionalTensor h0, OptionalTensor cu_seqlens,
      OptionalTensor resets, bool reverse, bool identity) {
    Tensor grad_forget = Backend::new_like(forget), grad_input = Backend::new_like(input);
    Tensor grad_candidate = Backend::new_like(candidate);
    Tensor grad_h0 = Backend::backward(gated<3>(identity), separate({&forget, &input, &candidate}),
                                       separate({&grad_forget, &grad_input, &grad_candidate}), h,
                                       grad_h, grad_last, h0, cu_seqlens, resets, reverse);
    return {grad_forget, grad_input, grad_candidate, grad_h0};
  }

  // The inputs as parts of one projection, side by side on the channel axis.
  template <int parts>
  static std::tuple<Tensor, Tensor> joint_forward(const Tensor& projection, OptionalTensor h0,
                                                  OptionalTensor cu_seqlens, OptionalTensor resets,
                                                  bool reverse, bool identity) {
    return Backend::forward(gated<parts>(identity), joint(projection, parts), projection, h0,
                            cu_seqlens, resets, reverse);
  }

  template <int parts>
  static std::tuple<Tensor, Tensor> joint_backward(OptionalTensor grad_h, OptionalTensor grad_last,
                                                   const Tensor& projection, const Tensor& h,
                                                   OptionalTensor h0, OptionalTensor cu_seqlens,
                                                   OptionalTensor resets, bool reverse,
                                                   bool identity) {
    Tensor grad = Backend::new_like(projection);
    Tensor grad_h0 =
        Backend::backward(gated<parts>(identity), joint(projection, parts), joint(grad, parts), h,
                          grad_h, grad_last, h0, cu_seqlens, resets, reverse);
    return {grad, grad_h0};
  }
};

template <class Backend>
void register_scans(torch::stable::detail::StableLibrary& m) {
  using Ops = ScanOps<Backend>;
  m.impl("linear_scan", TORCH_BOX(&Ops::template forward2<ScanOp::linear_scan>));
  m.impl("linear_scan_backward", TORCH_BOX(&Ops::template backward_of_decay<ScanOp::linear_scan>));
  m.impl("decay_scan", TORCH_BOX(&Ops::template forward2<ScanOp::decay_scan>));
  m.impl("decay_scan_backward", TORCH_BOX(&Ops::template backward_of_decay<ScanOp::decay_scan>));
  m.impl("log_scan", TORCH_BOX(&Ops::template forward2<ScanOp::log_scan>));
  m.impl("log_scan_backward", TORCH_BOX(&Ops::log_scan_backward));
  m.impl("min_gru", TORCH_BOX(&Ops::min_gru));
  m.impl("min_gru_backward", TORCH_BOX(&Ops::min_gru_backward));
  m.impl("min_gru_joint", TORCH_BOX(&Ops::template joint_forward<2>));
  m.impl("min_gru_joint_backward", TORCH_BOX(&Ops::template joint_backward<2>));
  m.impl("min_lstm", TORCH_BOX(&Ops::min_lstm));
  m.impl("min_lstm_backward", TORCH_BOX(&Ops::min_lstm_backward));
  m.impl("min_lstm_joint", TORCH_BOX(&Ops::template joint_forward<3>));
  m.impl("min_lstm_joint_backward", TORCH_BOX(&Ops::template joint_backward<3>));
  m.impl("min_gru_step", TORCH_BOX(&Ops::min_gru_step));
  m.impl("min_lstm_step", TORCH_BOX(&Ops::min_lstm_step));
}

}  // namespace msrnn
