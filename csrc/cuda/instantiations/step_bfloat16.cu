// The step of bfloat16 states; step.cuh has the kernel.
#include "../step.cuh"

namespace msrnn {
namespace gpu {
template cudaError_t step_fits_of<BFloat16>(StepCall, Fits*);
template cudaError_t launch_step_of<BFloat16>(StepCall, cudaStream_t);
}  // namespace gpu
}  // namespace msrnn
