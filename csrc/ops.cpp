// Every operator of the library. Python adds fake, autograd and the public wrapper of each
// (msrnn_ops/scan.py); cpu/ and cuda/ add the kernels.
//
// Tensors are (B, T, D) of one dtype: float32, float64, bfloat16 or float16, any strides. With
// cu_seqlens (N+1, int32 or int64; B = 1) the time axis holds N sequences. h0, last, grad_last and
// grad_h0 are (B, D), or (N, D) with cu_seqlens, in the accumulation dtype: float64 for float64,
// float32 otherwise. A joint op takes its inputs side by side on the channel axis.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(msrnn_ops, m) {
  m.def(
      "linear_scan(Tensor a, Tensor b, Tensor? h0, Tensor? cu_seqlens, bool reverse)"
      " -> (Tensor h, Tensor last)");
  m.def(
      "linear_scan_backward(Tensor? grad_h, Tensor? grad_last, Tensor a, Tensor h, Tensor? h0,"
      " Tensor? cu_seqlens, bool reverse) -> (Tensor grad_a, Tensor grad_b, Tensor grad_h0)");

  m.def(
      "decay_scan(Tensor log_a, Tensor b, Tensor? h0, Tensor? cu_seqlens, bool reverse)"
      " -> (Tensor h, Tensor last)");
  m.def(
      "decay_scan_backward(Tensor? grad_h, Tensor? grad_last, Tensor log_a, Tensor h, Tensor? h0,"
      " Tensor? cu_seqlens, bool reverse) -> (Tensor grad_log_a, Tensor grad_b, Tensor grad_h0)");

  m.def(
      "log_scan(Tensor log_a, Tensor log_b, Tensor? log_h0, Tensor? cu_seqlens, bool reverse)"
      " -> (Tensor log_h, Tensor last)");
  m.def(
      "log_scan_backward(Tensor? grad_log_h, Tensor? grad_last, Tensor log_a, Tensor log_b,"
      " Tensor log_h, Tensor? log_h0, Tensor? cu_seqlens, bool reverse)"
      " -> (Tensor grad_log_a, Tensor grad_log_b, Tensor grad_log_h0)");

  m.def(
      "min_gru(Tensor gate, Tensor candidate, Tensor? h0, Tensor? cu_seqlens, bool reverse,"
      " bool identity) -> (Tensor h, Tensor last)");
  m.def(
      "min_gru_backward(Tensor? grad_h, Tensor? grad_last, Tensor gate, Tensor candidate,"
      " Tensor h, Tensor? h0, Tensor? cu_seqlens, bool reverse, bool identity)"
      " -> (Tensor grad_gate, Tensor grad_candidate, Tensor grad_h0)");
  m.def(
      "min_gru_joint(Tensor projection, Tensor? h0, Tensor? cu_seqlens, bool reverse,"
      " bool identity) -> (Tensor h, Tensor last)");
  m.def(
      "min_gru_joint_backward(Tensor? grad_h, Tensor? grad_last, Tensor projection, Tensor h,"
      " Tensor? h0, Tensor? cu_seqlens, bool reverse, bool identity)"
      " -> (Tensor grad_projection, Tensor grad_h0)");

  m.def(
      "min_lstm(Tensor forget, Tensor input, Tensor candidate, Tensor? h0, Tensor? cu_seqlens,"
      " bool reverse, bool identity) -> (Tensor h, Tensor last)");
  m.def(
      "min_lstm_backward(Tensor? grad_h, Tensor? grad_last, Tensor forget, Tensor input,"
      " Tensor candidate, Tensor h, Tensor? h0, Tensor? cu_seqlens, bool reverse, bool identity)"
      " -> (Tensor grad_forget, Tensor grad_input, Tensor grad_candidate, Tensor grad_h0)");
  m.def(
      "min_lstm_joint(Tensor projection, Tensor? h0, Tensor? cu_seqlens, bool reverse,"
      " bool identity) -> (Tensor h, Tensor last)");
  m.def(
      "min_lstm_joint_backward(Tensor? grad_h, Tensor? grad_last, Tensor projection, Tensor h,"
      " Tensor? h0, Tensor? cu_seqlens, bool reverse, bool identity)"
      " -> (Tensor grad_projection, Tensor grad_h0)");
}
