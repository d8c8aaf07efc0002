// The step of float16 states; multi_state.cuh has the kernel.
#include "multi_state.cuh"

namespace msrnn {
namespace gpu {
template cudaError_t step_fits_of<Half>(StepCall, Fits*);
template cudaError_t launch_step_of<Half>(StepCall, cudaStream_t);
}  // namespace gpu
}  // namespace msrnn
