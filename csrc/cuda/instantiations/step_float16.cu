// The step of float16 states; step.cuh has the kernel.
#include "../step.cuh"

namespace msrnn {
namespace gpu {
template cudaError_t step_fits_of<Half>(StepCall, Fits*);
template cudaError_t launch_step_of<Half>(StepCall, cudaStream_t);
}  // namespace gpu
}  // namespace msrnn
