// The entry from the host. It finds the kernels of a dtype, which instantiations/scan_<dtype>.cu
// compile, a file each.
#include "scan.cuh"

namespace msrnn {
namespace gpu {
extern template cudaError_t launch_scan_of<float>(ScanOp, bool, const ScanCall&, cudaStream_t);
extern template cudaError_t launch_scan_of<double>(ScanOp, bool, const ScanCall&, cudaStream_t);
extern template cudaError_t launch_scan_of<BFloat16>(ScanOp, bool, const ScanCall&, cudaStream_t);
extern template cudaError_t launch_scan_of<Half>(ScanOp, bool, const ScanCall&, cudaStream_t);
}  // namespace gpu

const char* launch_scan(ScanOp op, DType dtype, bool backward, const ScanCall& call, void* stream) {
  const auto of = [&] {
    switch (dtype) {
      case DType::float32:
        return gpu::launch_scan_of<float>;
      case DType::float64:
        return gpu::launch_scan_of<double>;
      case DType::bfloat16:
        return gpu::launch_scan_of<BFloat16>;
      default:
        return gpu::launch_scan_of<Half>;
    }
  }();
  const cudaError_t error = of(op, backward, call, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace msrnn
