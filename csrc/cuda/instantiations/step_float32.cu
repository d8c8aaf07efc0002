// The step of float32 states; step.cuh has the kernel.
#include "../step.cuh"

namespace msrnn {
namespace gpu {
template cudaError_t step_fits_of<float>(StepCall, Fits*);
template cudaError_t launch_step_of<float>(StepCall, cudaStream_t);
}  // namespace gpu
}  // namespace msrnn
