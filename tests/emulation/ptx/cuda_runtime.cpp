// In place of the CUDA runtime: host code that nvcc compiled launches its kernels on the machine.
//
// nvcc's objects bring their PTX along (compiled with code=compute_XX and --no-compress) and
// register it before main. What the host code asks of a device is answered as the emulator's
// settings say: as many multiprocessors as EMULATION_CLAIMED, with room for one block each. Other
// grids hold all but EMULATION_RESIDENT of them, and a cooperative launch waits until they are
// gone. Whatever else of the runtime host code calls does not link. A module is read when one of
// its kernels is first launched.
//
// Here nothing runs later than it is asked for, whatever the stream. So what would go wrong on a
// GPU alone ends the process, with code 98 and a report: work in another stream than the caller's,
// a memset out of bounds, a launch that would return the error of an earlier call. What CUDA
// answers with an error is answered so: more shared memory than was allowed, or than any GPU
// allows.
//
// EMULATION_PTX names a file whose kernels take the place of those of the same name, for planted
// bugs.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "launch.h"
#include "memory.h"
#include "program.h"

namespace {

using namespace std::string_literals;

[[noreturn]] void stop(const std::string& message) {
  std::fprintf(stderr, "cuda_runtime: %s\n", message.c_str());
  std::_Exit(98);
}

void load(std::string_view text) {
  try {
    ptx::load_module(text);
  } catch (const ptx::Unknown& unknown) {
    stop("PTX that the machine does not know:\n"s + unknown.what());
  }
}

// Of shared memory, what a block may have unasked, and what it may ask for on the smallest GPU that
// runs PTX for 8.0 (8.6).
constexpr size_t kAllowedShared = 48 << 10, kMostShared = 99 << 10;

struct Runtime {
  std::map<const void*, std::string> kernels;  // by the host function that launches each
  std::map<const void*, size_t> allowed;       // dynamic shared memory, where that was set
  std::mutex mutex;                            // of `allowed`
  std::vector<std::string_view> modules;
  std::mutex reading;
  cudaError_t last_error = cudaSuccess;
};
// Made when the first object registers, and never destroyed: objects unregister at the very end.
Runtime& runtime() {
  static auto& made = *new Runtime;
  return made;
}

cudaError_t noted(cudaError_t error) {
  if (error != cudaSuccess) runtime().last_error = error;
  return error;
}

void load_planted() {
  const char* const path = std::getenv("EMULATION_PTX");
  if (path == nullptr) return;
  std::ifstream file(path);
  if (!file) stop("no file "s + path);
  load(std::string(std::istreambuf_iterator<char>(file), {}));
}

const ptx::Kernel& kernel_of(const void* function) {
  const auto known = runtime().kernels.find(function);
  if (known == runtime().kernels.end()) stop("a launch of what is no kernel");
  const std::string& name = known->second;
  const std::lock_guard lock(runtime().reading);
  if (const ptx::Kernel* const kernel = ptx::find_kernel(name)) return *kernel;
  for (const std::string_view text : runtime().modules) {
    if (text.find(".entry " + name + "(") != text.npos) load(text);
  }
  load_planted();
  const ptx::Kernel* const kernel = ptx::find_kernel(name);
  if (kernel == nullptr) stop("no PTX of " + name);
  return *kernel;
}

emulated::dim3 size(dim3 d) { return {d.x, d.y, d.z}; }

bool has_room(const void* function, size_t shared) {
  const std::lock_guard lock(runtime().mutex);
  const auto set = runtime().allowed.find(function);
  const size_t allowed = set == runtime().allowed.end() ? 0 : set->second;
  const size_t fixed = kernel_of(function).static_shared;
  return shared <= std::max(allowed, kAllowedShared - fixed);
}

// Streams of the caller's are never the null stream, which would wait for all others.
void check_stream(cudaStream_t stream) {
  if (stream == nullptr) stop("work outside of the caller's stream");
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** values, size_t shared,
                   cudaStream_t stream, bool together = false) {
  check_stream(stream);
  if (runtime().last_error != cudaSuccess) stop("a launch would return an earlier call's error");
  if (!has_room(function, shared)) return noted(cudaErrorInvalidValue);
  const bool ran =
      ptx::launch(kernel_of(function), size(grid), size(block), shared, values, together);
  return noted(ran ? cudaSuccess : cudaErrorInvalidConfiguration);
}

// <<<grid, block, shared, stream>>> pushes these, and the kernel's host function pops them.
struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local std::vector<Configuration> configurations;

}  // namespace

extern "C" {

// The wrapper that nvcc emits: two numbers, then a pointer to a container, whose header says how
// long it is.
void** __cudaRegisterFatBinary(void* wrapper) {
  const char* container;
  std::memcpy(&container, static_cast<char*>(wrapper) + 8, sizeof container);
  uint16_t header_bytes;
  uint64_t bytes;
  std::memcpy(&header_bytes, container + 6, sizeof header_bytes);
  std::memcpy(&bytes, container + 8, sizeof bytes);
  const std::string_view all(container, header_bytes + bytes);
  const size_t begin = all.find("\n.version");
  if (begin != all.npos) {
    runtime().modules.push_back(all.substr(begin, all.find('\0', begin) - begin));
  }
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  runtime().kernels[function] = name;
}
cudaError_t __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared;
  std::memcpy(stream, &c.stream, sizeof c.stream);
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** values,
                               size_t shared, cudaStream_t stream) {
  return launch(function, grid, block, values, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** values) {
  bool together = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    if (a.id != cudaLaunchAttributeCooperative) stop("a launch with an unknown attribute");
    const dim3& g = config->gridDim;
    together = a.val.cooperative != 0;
    const bool fit =
        uint64_t{g.x} * g.y * g.z <= static_cast<uint64_t>(emulated::runtime::resident_blocks());
    if (together && !fit) return noted(cudaErrorCooperativeLaunchTooLarge);
  }
  return launch(function, config->gridDim, config->blockDim, values, config->dynamicSmemBytes,
                config->stream, together);
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = runtime().last_error;
  runtime().last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error of the stand-in for CUDA";
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) stop("an unknown attribute of the device");
  *value = emulated::runtime::resident_blocks();
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    stop("an unknown attribute of a kernel");
  }
  const auto bytes = static_cast<size_t>(value);
  if (value < 0 || bytes + kernel_of(function).static_shared > kMostShared) {
    return noted(cudaErrorInvalidValue);
  }
  const std::lock_guard lock(runtime().mutex);
  runtime().allowed[function] = bytes;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                   const void* function,
                                                                   int threads, size_t shared,
                                                                   unsigned) {
  const bool fits = static_cast<uint32_t>(threads) <= kernel_of(function).most_threads;
  *blocks = fits && has_room(function, shared);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  check_stream(stream);
  if (!ptx::is_allocated(p, bytes)) stop("a memset out of bounds");
  std::memset(p, value, bytes);
  return cudaSuccess;
}
}
