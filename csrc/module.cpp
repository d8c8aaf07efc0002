// msrnn_ops._C: facts about this build and its host. It knows no tensors and no torch: pybind11 and
// torch's limited Python API exclude each other, so the operators live in libraries of their own.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/runtime.h"
#include "cuda/multi_state.h"
#include "cuda/scan.h"

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
  const std::string cuda = MSRNN_CUDA;
  info["cuda"] = cuda.empty() ? py::object(py::none()) : py::object(py::str(cuda));
  std::istringstream archs(MSRNN_CUDA_ARCHS);
  using Word = std::istream_iterator<std::string>;
  info["cuda_archs"] = std::vector<std::string>(Word(archs), Word());
#if defined(__x86_64__)
  info["cpu"] = std::vector<std::string>{"baseline", "avx2", "avx512", "avx512_bf16"};
#else
  info["cpu"] = std::vector<std::string>{"baseline"};
#endif
  return info;
}

py::dict scan_plan(bool backward, int64_t element_size, int64_t rows, int64_t time,
                   int64_t channels) {
  const msrnn::ScanPlan p = msrnn::scan_plan(backward, element_size, rows, time, channels);
  const int64_t scalar = element_size == 8 ? 8 : 4;
  py::dict plan;
  plan["path"] = p.look_back ? "look_back" : "walk";
  plan["threads"] = p.lanes * p.rows;
  plan["tile_steps"] = p.tile_steps;
  plan["tile_channels"] = p.tile_channels;
  plan["chains"] = p.chains;
  plan["tiles"] = p.tiles;
  plan["group"] = p.group;
  plan["workspace"] = p.look_back ? msrnn::lay_out(p, scalar, nullptr, nullptr).bytes : 0;
  return plan;
}

py::dict step_plan(int64_t rows, int64_t query_heads, int64_t kv_heads, int64_t slots,
                   int64_t head_dim, int64_t element_size) {
  const msrnn::StepPlan p =
      msrnn::step_plan(rows, query_heads, kv_heads, slots, head_dim, element_size);
  py::dict plan;
  plan["block_slots"] = p.block_slots;
  plan["splits"] = p.splits;
  plan["one_launch"] = p.one_launch;
  return plan;
}

// A large state is read 5 to 10 % faster from huge pages.
void prefer_huge_pages(uintptr_t address, size_t bytes) {
  msrnn::prefer_huge_pages(reinterpret_cast<void*>(address), bytes);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "Version, compiler, targeted torch ABI, CUDA version (None: not built), CUDA "
        "architectures and CPU instruction sets of this build.");
  m.def("scan_plan", &scan_plan, py::arg("backward"), py::arg("element_size"), py::arg("rows"),
        py::arg("time"), py::arg("channels"),
        "How the CUDA scans cut up a call: a pure function of its shape and dtype. With cu_seqlens "
        "rows is 1. workspace is in bytes.");
  m.def("step_plan", &step_plan, py::arg("rows"), py::arg("query_heads"), py::arg("kv_heads"),
        py::arg("slots"), py::arg("head_dim"), py::arg("element_size"),
        "How the CUDA step of multi-state attention cuts up a call, a pure function of its shape "
        "and dtype: the slots of a block, the blocks of a row, and whether these may wait for each "
        "other in "
        "one launch. slots is that of the state, N + 1.");
  m.def("prefer_huge_pages", &prefer_huge_pages, py::arg("address"), py::arg("bytes"),
        "Advice to back untouched memory by huge pages.");
}
