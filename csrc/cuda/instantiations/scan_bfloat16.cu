// All scans of bfloat16, forward and backward; scan.cuh has the kernel.
#include "../scan.cuh"

namespace msrnn {
namespace gpu {
template cudaError_t launch_scan_of<BFloat16>(ScanOp, bool, const ScanCall&, cudaStream_t);
}
}  // namespace msrnn
