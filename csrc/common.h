// Checks and views between torch tensors and the torch-free kernels.
//
// Python raises the errors that users meet (msrnn_ops/checks.py). The checks here keep calls that
// come without Python's, as torch.ops.msrnn_ops.* and decoding engines make them, from reading out
// of bounds: they come before anything is written.
//
// What torch itself refuses, such as memory that is not there, keeps torch's own words.
#pragma once

#include <torch/headeronly/util/shim_utils.h>

#include <cstring>
#include <stdexcept>
#include <string>

// Torch's words for the last error of this thread. Torch has the function from 2.13 on, and the
// stable ABI of 2.11 does not name it, so the loader looks for it.
extern "C" __attribute__((weak, visibility("default"))) const char*
torch_exception_get_what_without_backtrace();

namespace msrnn {

// `call` is source text: torch's function, and what it was to do, before the first comma.
[[noreturn, gnu::noinline]] inline void throw_error_of_torch(const char* call) {
  if (torch_exception_get_what_without_backtrace != nullptr) {
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
  }
  throw std::runtime_error("PyTorch failed in " + std::string(call, std::strcspn(call, ",")) +
                           ", often for lack of memory; from 2.13 on it says why");
}

}  // namespace msrnn

// The headers below check each call of torch by this.
#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call)      \
  if ((call) != TORCH_SUCCESS) {          \
    ::msrnn::throw_error_of_torch(#call); \
  }

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <sstream>

#include "dtype.h"
#include "scan.h"

// Torch's own check says in which file of the machine that built this it stands.
#undef STD_TORCH_CHECK
#define STD_TORCH_CHECK(condition, ...) \
  if (!(condition)) throw std::runtime_error(::msrnn::words(__VA_ARGS__));

namespace msrnn {

template <class... Parts>
std::string words(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}

inline int64_t size_of(DType t) { return t == DType::float32 ? 4 : t == DType::float64 ? 8 : 2; }

// Carries are float32, or float64 for float64.
inline ScalarType accumulation_type(DType t) {
  return t == DType::float64 ? ScalarType::Double : ScalarType::Float;
}

// A tensor's memory. Calls that come past PyTorch's dispatcher may bring what no kernel can read.
template <class T = char>
T* memory_of(const Tensor& x) {
  int32_t layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(x.get(), &layout));
  STD_TORCH_CHECK(layout == aoti_torch_layout_strided(), "expected strided tensors");
#if !defined(USE_CUDA)
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  STD_TORCH_CHECK(device == aoti_torch_device_type_cpu(), "expected tensors on the CPU");
#endif
  void* memory = x.data_ptr();
  STD_TORCH_CHECK(memory || x.numel() == 0, "expected tensors with memory");
  return static_cast<T*>(memory);
}

// As torch::stable::new_empty, which looks its operator up by name at each call.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       std::optional<ScalarType> type = std::nullopt) {
  int32_t dtype, layout, device, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  if (type) dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*type));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(),
                                                   static_cast<int64_t>(sizes.size()), &dtype,
                                                   &layout, &device, index, nullptr, &made));
  return Tensor(made);
}

inline View view_of(const Tensor& x) {
  const int64_t size = size_of(dtype_of(x));
  return {memory_of(x), x.stride(0) * size, x.stride(1) * size, x.stride(2) * size};
}

// Channels [part * channels, (part + 1) * channels) of a view.
inline View slice_channels(View v, int64_t part, int64_t channels) {
  v.data += part * channels * v.channel;
  return v;
}

}  // namespace msrnn
