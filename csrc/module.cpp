// msrnn_ops._C: facts about this build. It knows no tensors and no torch: pybind11 and torch's
// limited Python API exclude each other, so the operators live in libraries of their own.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

py::dict build_info() {
  py::dict info;
  info["version"] = MSRNN_VERSION;
  info["compiler"] = kCompiler;
  info["torch_target"] = MSRNN_TORCH_TARGET;
  info["cuda"] = py::none();
  info["cuda_archs"] = std::vector<std::string>{};
#if defined(__x86_64__)
  info["cpu"] = std::vector<std::string>{"baseline", "avx2", "avx512", "avx512_bf16"};
#else
  info["cpu"] = std::vector<std::string>{"baseline"};
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "Version, compiler, targeted torch ABI, CUDA version (None: not built), CUDA "
        "architectures and CPU instruction sets of this build.");
}
