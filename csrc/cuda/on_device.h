// The device and stream of a call, for the host side of the CUDA operators, or those of the
// emulator, which takes the place of the CPU's kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#if defined(MSRNN_EMULATED)
#define MSRNN_DEVICE_KEY CPU
#else
#include <torch/csrc/stable/accelerator.h>
#define MSRNN_DEVICE_KEY CUDA
#if defined(MSRNN_TORCH_WITHOUT_CUDA)
// The torch at hand lacks this function, and the library still loads.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif
#endif

namespace msrnn {

#if defined(MSRNN_EMULATED)
struct OnDevice {
  explicit OnDevice(const torch::stable::Tensor&) {}
  // Any but the null stream, which no caller's work may get into.
  void* stream() const { return reinterpret_cast<void*>(uintptr_t{0x57BEA0}); }
};
#else
// Makes the device of a tensor current.
struct OnDevice {
  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;

  explicit OnDevice(const torch::stable::Tensor& x) : index(x.get_device_index()), guard(index) {}

  void* stream() const {
#if defined(MSRNN_TORCH_WITHOUT_CUDA)
    STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr,
                    "msrnn_ops was built with a torch without CUDA; build it again");
#endif
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    return stream;
  }
};
#endif

}  // namespace msrnn
