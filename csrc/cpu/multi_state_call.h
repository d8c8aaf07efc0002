// What the step (multi_state.cpp), the prompt (multi_state_prompt.cpp) and the backward pass of a
// sequence (multi_state_backward.cpp) share on the CPU.
#pragma once

#include <algorithm>
#include <new>

#include "../multi_state_ops.h"
#include "multi_state.h"
#include "runtime.h"

namespace msrnn {

inline AttentionKernels kernels_for(DType dtype) {
#if defined(__x86_64__)
  if (capability() >= Capability::avx512_bf16) return attention_kernels_avx512_bf16(dtype);
  if (capability() >= Capability::avx512) return attention_kernels_avx512(dtype);
  if (capability() >= Capability::avx2) return attention_kernels_avx2(dtype);
#endif
  return attention_kernels_baseline(dtype);
}

// Memory that a thread holds on to from call to call, since fresh pages would cost more than a
// small step.
class Workspace {
 public:
  ~Workspace() { ::operator delete(data_, kLine); }
  float* floats(int64_t count) {
    if (count > size_) {
      ::operator delete(data_, kLine);
      data_ = nullptr;
      size_ = 0;
      data_ = ::operator new(count * sizeof(float), kLine);
      size_ = count;
    }
    return static_cast<float*>(data_);
  }

 private:
  static constexpr std::align_val_t kLine{64};
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// Rows of a head's keys or values from a slot on.
inline Rows rows_of(const State& s, char* base, int64_t row, int64_t head, int64_t slot) {
  return {base + s.row_offset(row, head, slot), s.row_bytes()};
}

// Calls f(begin, count) for every run of occupied columns in [begin, end).
template <class F>
void for_runs(const int64_t* position, int64_t begin, int64_t end, F f) {
  int64_t any_empty = 0;  // its sign
  for (int64_t i = begin; i < end; ++i) any_empty |= position[i];
  if (any_empty >= 0) {
    if (begin < end) f(begin, end - begin);
    return;
  }
  for (int64_t i = begin; i < end;) {
    if (position[i] < 0) {
      ++i;
      continue;
    }
    int64_t last = i + 1;
    while (last < end && position[last] >= 0) ++last;
    f(i, last - i);
    i = last;
  }
}

constexpr float kMinusInfinity = -__builtin_inff();

}  // namespace msrnn
