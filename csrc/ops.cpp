// Every operator of the library. Python adds the fake and the autograd of each
// (msrnn_ops/operators/), and its public function. cpu/ and cuda/ add the kernels.
//
// Scans. Tensors are (B, T, D) of one dtype: float32, float64, bfloat16 or float16, any strides.
// With cu_seqlens (N+1, int32 or int64; B = 1) the time axis holds N sequences, one behind the
// other; steps before the first and behind the last are zeros in h and in every gradient. h0, last,
// grad_last and grad_h0 are (B, D), or (N, D) with cu_seqlens, in the accumulation dtype: float64
// for float64, float32 otherwise. Where resets (B, T, bool) is set, no state crosses the border
// before that step, in either direction: the step starts from 0 (log 0 for log_scan), not from h0.
// A joint op takes its inputs side by side on the channel axis.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(msrnn_ops, m) {
  m.def(
      "linear_scan(Tensor a, Tensor b, Tensor? h0, Tensor? cu_seqlens, Tensor? resets,"
      " bool reverse) -> (Tensor h, Tensor last)");
  m.def(
      "linear_scan_backward(Tensor? grad_h, Tensor? grad_last, Tensor a, Tensor h, Tensor? h0,"
      " Tensor? cu_seqlens, Tensor? resets, bool reverse)"
      " -> (Tensor grad_a, Tensor grad_b, Tensor grad_h0)");

  // Of complex numbers; made of linear_scan (msrnn_ops/operators/complex_scan.py).
  m.def(
      "complex_linear_scan(Tensor a, Tensor b, Tensor? h0, Tensor? cu_seqlens, Tensor? resets,"
      " bool reverse) -> (Tensor h, Tensor last)");
  m.def(
      "complex_linear_scan_backward(Tensor? grad_h, Tensor? grad_last, Tensor a, Tensor h,"
      " Tensor? h0, Tensor? cu_seqlens, Tensor? resets, bool reverse)"
      " -> (Tensor grad_a, Tensor grad_b, Tensor grad_h0)");

  m.def(
      "decay_scan(Tensor log_a, Tensor b, Tensor? h0, Tensor? cu_seqlens, Tensor? resets,"
      " bool reverse) -> (Tensor h, Tensor last)");
  m.def(
      "decay_scan_backward(Tensor? grad_h, Tensor? grad_last, Tensor log_a, Tensor h, Tensor? h0,"
      " Tensor? cu_seqlens, Tensor? resets, bool reverse)"
      " -> (Tensor grad_log_a, Tensor grad_b, Tensor grad_h0)");

  m.def(
      "log_scan(Tensor log_a, Tensor log_b, Tensor? log_h0, Tensor? cu_seqlens, Tensor? resets,"
      " bool reverse) -> (Tensor log_h, Tensor last)");
  m.def(
      "log_scan_backward(Tensor? grad_log_h, Tensor? grad_last, Tensor log_a, Tensor log_b,"
      " Tensor log_h, Tensor? log_h0, Tensor? cu_seqlens, Tensor? resets, bool reverse)"
      " -> (Tensor grad_log_a, Tensor grad_log_b, Tensor grad_log_h0)");

  m.def(
      "min_gru(Tensor gate, Tensor candidate, Tensor? h0, Tensor? cu_seqlens, Tensor? resets,"
      " bool reverse, bool identity) -> (Tensor h, Tensor last)");
  m.def(
      "min_gru_backward(Tensor? grad_h, Tensor? grad_last, Tensor gate, Tensor candidate,"
      " Tensor h, Tensor? h0, Tensor? cu_seqlens, Tensor? resets, bool reverse, bool identity)"
      " -> (Tensor grad_gate, Tensor grad_candidate, Tensor grad_h0)");
  m.def(
      "min_gru_joint(Tensor projection, Tensor? h0, Tensor? cu_seqlens, Tensor? resets,"
      " bool reverse, bool identity) -> (Tensor h, Tensor last)");
  m.def(
      "min_gru_joint_backward(Tensor? grad_h, Tensor? grad_last, Tensor projection, Tensor h,"
      " Tensor? h0, Tensor? cu_seqlens, Tensor? resets, bool reverse, bool identity)"
      " -> (Tensor grad_projection, Tensor grad_h0)");

  m.def(
      "min_lstm(Tensor forget, Tensor input, Tensor candidate, Tensor? h0, Tensor? cu_seqlens,"
      " Tensor? resets, bool reverse, bool identity) -> (Tensor h, Tensor last)");
  m.def(
      "min_lstm_backward(Tensor? grad_h, Tensor? grad_last, Tensor forget, Tensor input,"
      " Tensor candidate, Tensor h, Tensor? h0, Tensor? cu_seqlens, Tensor? resets, bool reverse,"
      " bool identity)"
      " -> (Tensor grad_forget, Tensor grad_input, Tensor grad_candidate, Tensor grad_h0)");
  m.def(
      "min_lstm_joint(Tensor projection, Tensor? h0, Tensor? cu_seqlens, Tensor? resets,"
      " bool reverse, bool identity) -> (Tensor h, Tensor last)");
  m.def(
      "min_lstm_joint_backward(Tensor? grad_h, Tensor? grad_last, Tensor projection, Tensor h,"
      " Tensor? h0, Tensor? cu_seqlens, Tensor? resets, bool reverse, bool identity)"
      " -> (Tensor grad_projection, Tensor grad_h0)");

  // The linear layer before a joint op with it, time in chunks; made of that op
  // (msrnn_ops/operators/layer.py). x (B, T, F), weight (2 or 3 D, F), bias (2 or 3 D). real
  // (B, T, 1, bool): which steps are there; x is finite in the others. states (chunks - 1, B, D),
  // or (chunks - 1, 1, D) with cu_seqlens: what crosses the borders of chunks. Backward returns an
  // empty tensor for x, or for weight and bias, where they are not needed.
  m.def(
      "min_gru_layer(Tensor x, Tensor weight, Tensor? bias, Tensor? h0, Tensor? cu_seqlens,"
      " Tensor? resets, Tensor? real, bool reverse, bool identity, int chunk)"
      " -> (Tensor h, Tensor last, Tensor states)");
  m.def(
      "min_gru_layer_backward(Tensor? grad_h, Tensor? grad_last, Tensor x, Tensor weight,"
      " Tensor? bias, Tensor? h0, Tensor? cu_seqlens, Tensor? resets, Tensor? real, Tensor h,"
      " Tensor states, bool reverse, bool identity, int chunk, bool needs_x, bool needs_weight)"
      " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_h0)");
  m.def(
      "min_lstm_layer(Tensor x, Tensor weight, Tensor? bias, Tensor? h0, Tensor? cu_seqlens,"
      " Tensor? resets, Tensor? real, bool reverse, bool identity, int chunk)"
      " -> (Tensor h, Tensor last, Tensor states)");
  m.def(
      "min_lstm_layer_backward(Tensor? grad_h, Tensor? grad_last, Tensor x, Tensor weight,"
      " Tensor? bias, Tensor? h0, Tensor? cu_seqlens, Tensor? resets, Tensor? real, Tensor h,"
      " Tensor states, bool reverse, bool identity, int chunk, bool needs_x, bool needs_weight)"
      " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_h0)");

  // One token (B, D) of every row of a batch, in place on row rows[i] (int32 or int64) of a state
  // h (rows of it, D) in the accumulation dtype; out (B, D) is the state after it, likewise. A row
  // that is out of range, or that an earlier one of the batch has, does nothing; its output is 0.
  m.def(
      "min_gru_step(Tensor gate, Tensor candidate, Tensor(a!) h, Tensor rows, bool identity)"
      " -> Tensor out");
  m.def(
      "min_lstm_step(Tensor forget, Tensor input, Tensor candidate, Tensor(a!) h, Tensor rows,"
      " bool identity) -> Tensor out");

  // Multi-state attention. A token: q (B, Hq, Dh), k and v (B, Hkv, Dh); a prompt or sequence with
  // T before Dh. The state: keys and values (B, Hkv, N+1, Dh), position (B, G, N+1) int64, score
  // (B, G, N+1) float32 or (B, G, 0) where nothing accumulates, free and last_evicted (B, G) and
  // seen (B) int64; G is 1 (scope "layer") or Hkv ("head"). The policy (csrc/eviction.h): kind of
  // score (0 position, 1 attention, 2 accumulated), sinks, recent. valid (B, T) bool. With rows
  // (B, int32 or int64) row i of the batch uses row rows[i] of a state that has more of them; one
  // that is out of range or that an earlier one has does nothing, and its output is 0. With
  // cu_seqlens (S+1, int32 or int64) a prompt is q (T, Hq, Dh), k and v (T, Hkv, Dh), and rows (S).
  m.def(
      "attend_evict(Tensor q, Tensor k, Tensor v, Tensor? rows, Tensor(a!) keys, Tensor(b!) values,"
      " Tensor(c!) position, Tensor(d!) score, Tensor(e!) free, Tensor(f!) seen,"
      " Tensor(g!) last_evicted, int kind, int sinks, int recent, float scale) -> Tensor out");
  m.def(
      "attend_scores(Tensor q, Tensor k, Tensor v, Tensor? rows, Tensor(a!) keys, Tensor(b!) "
      "values,"
      " Tensor(c!) position, Tensor free, Tensor seen, float scale)"
      " -> (Tensor out, Tensor scores)");
  m.def(
      "evict(Tensor scores, Tensor? rows, Tensor(a!) position, Tensor(b!) score, Tensor(c!) free,"
      " Tensor(d!) seen, Tensor(e!) last_evicted, int kind, int sinks, int recent) -> ()");
  m.def(
      "attend_prompt(Tensor q, Tensor k, Tensor v, Tensor? valid, Tensor? cu_seqlens, Tensor? "
      "rows, Tensor(a!) keys,"
      " Tensor(b!) values, Tensor(c!) position, Tensor(d!) score, Tensor(e!) free,"
      " Tensor(f!) seen, Tensor(g!) last_evicted, int kind, int sinks, int recent, float scale)"
      " -> Tensor out");
  m.def(
      "store_prompt(Tensor q, Tensor k, Tensor v, Tensor? valid, Tensor? rows, Tensor(a!) keys,"
      " Tensor(b!) values, Tensor(c!) position, Tensor(d!) score, Tensor(e!) free,"
      " Tensor(f!) seen, Tensor(g!) last_evicted, int kind, int sinks, int recent, float scale)"
      " -> ()");
  m.def(
      "attend_sequence(Tensor q, Tensor k, Tensor v, Tensor? valid, int slots, bool per_head,"
      " int kind, int sinks, int recent, float scale) -> (Tensor out, Tensor expiry)");
  m.def(
      "attend_sequence_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor expiry,"
      " Tensor? valid, float scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}
