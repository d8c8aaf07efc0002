// The entry from the host. It finds the kernels of a dtype, which instantiations/step_<dtype>.cu
// compile, a file each.
#include "step.cuh"

namespace msrnn {
namespace gpu {
#define MSRNN_STEP(T)                                           \
  extern template cudaError_t step_fits_of<T>(StepCall, Fits*); \
  extern template cudaError_t launch_step_of<T>(StepCall, cudaStream_t);
MSRNN_STEP(float)
MSRNN_STEP(BFloat16)
MSRNN_STEP(Half)
#undef MSRNN_STEP

const char* text_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace gpu

const char* step_fits(const StepCall& call, Fits* fits) {
  switch (call.state.dtype) {
    case DType::bfloat16:
      return gpu::text_of(gpu::step_fits_of<BFloat16>(call, fits));
    case DType::float16:
      return gpu::text_of(gpu::step_fits_of<Half>(call, fits));
    default:
      return gpu::text_of(gpu::step_fits_of<float>(call, fits));
  }
}

const char* launch_step(const StepCall& call, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (call.state.dtype) {
    case DType::bfloat16:
      return gpu::text_of(gpu::launch_step_of<BFloat16>(call, on));
    case DType::float16:
      return gpu::text_of(gpu::launch_step_of<Half>(call, on));
    default:
      return gpu::text_of(gpu::launch_step_of<float>(call, on));
  }
}

}  // namespace msrnn
