// All scans of float64, forward and backward; scan.cuh has the kernel.
#include "../scan.cuh"

namespace msrnn {
namespace gpu {
template cudaError_t launch_scan_of<double>(ScanOp, bool, const ScanCall&, cudaStream_t);
}
}  // namespace msrnn
