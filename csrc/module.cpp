// msrnn_ops._C: facts about this build and its host. It knows no tensors and no torch: pybind11 and
// torch's limited Python API exclude each other, so the operators live in libraries of their own.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
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

// Asks for huge pages under memory that is still to be touched: a large state is read 5 to 10 %
// faster from them. It is only advice; nothing is reported.
void prefer_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t first = (address + kPage - 1) / kPage * kPage;
  const uintptr_t last = (address + bytes) / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "Version, compiler, targeted torch ABI, CUDA version (None: not built), CUDA "
        "architectures and CPU instruction sets of this build.");
  m.def("prefer_huge_pages", &prefer_huge_pages, py::arg("address"), py::arg("bytes"),
        "Advice to back untouched memory by huge pages.");
}
