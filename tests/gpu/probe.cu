// What the design of the kernels assumes of a GPU, measured: the step `probe` of check.py.
//
//   probe [copy] [launch] [special] [hop]    some experiments, or all of them
//
// Prints a JSON object a line as soon as it knows it, so that a probe that is stopped has said what
// it had found. Exit status: 0, all was measured; 1, something failed; 2, there is no usable GPU.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cuda/number.h"

using namespace msrnn;
using namespace msrnn::gpu;

using Figures = std::vector<std::pair<std::string, double>>;

int processors;
cudaStream_t stream;

void check(cudaError_t error, const char* what) {
  if (error) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
#define CHECK(call) check((call), #call)

void say(const char* experiment, const std::string& name, const Figures& figures) {
  std::printf("{\"experiment\": \"%s\", \"case\": \"%s\"", experiment, name.c_str());
  for (const auto& [key, x] : figures) {
    std::printf(", \"%s\": ", key.c_str());
    std::isfinite(x) ? std::printf("%.9g", x) : std::printf("null");
  }
  std::printf("}\n");
  std::fflush(stdout);
}

template <class T>
T* allocate(size_t count) {
  void* p;
  CHECK(cudaMalloc(&p, count * sizeof(T)));
  return static_cast<T*>(p);
}

double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  return x[x.size() / 2];
}

// Microseconds for each of `count` calls, recorded in a graph: no time of the host is in it.
double in_graph(int count, const std::function<void(int)>& call) {
  call(0);
  CHECK(cudaGetLastError());
  CHECK(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < count; ++i) call(i);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&replay, graph, 0));
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  std::vector<double> times;
  for (int repetition = -2; repetition < 11; ++repetition) {
    CHECK(cudaEventRecord(start, stream));
    CHECK(cudaGraphLaunch(replay, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float milliseconds;
    CHECK(cudaEventElapsedTime(&milliseconds, start, end));
    if (repetition >= 0) times.push_back(milliseconds * 1e3 / count);
  }
  CHECK(cudaGraphExecDestroy(replay));
  CHECK(cudaGraphDestroy(graph));
  return median(times);
}

// How fast memory moves: by the driver, and 16 bytes at a time as in the kernels. Buffers take
// turns, so that the L2 holds nothing of them.

constexpr int kThreads = 256, kAhead = 4;

__global__ void fill(uint32_t* words, size_t count) {
  const size_t step = size_t{gridDim.x} * blockDim.x;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u;
    words[i] = (x ^ x >> 15) * 2246822519u;
  }
}

__global__ void __launch_bounds__(kThreads) copy(const uint4* from, uint4* to, size_t count) {
  const size_t step = size_t{gridDim.x} * kThreads;
  for (size_t i = size_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += kAhead * step) {
    uint4 x[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k * step < count) x[k] = from[i + k * step];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k * step < count) to[i + k * step] = x[k];
    }
  }
}

void measure_copy() {
  const size_t arena = size_t{1} << 30;  // bytes read, and as many written
  auto *from = allocate<uint4>(arena / 16), *to = allocate<uint4>(arena / 16);
  fill<<<processors * 8, kThreads, 0, stream>>>(reinterpret_cast<uint32_t*>(from), arena / 4);
  CHECK(cudaGetLastError());
  int resident;
  CHECK(resident_blocks(&resident, copy, kThreads, 0));
  for (const size_t traffic : {size_t{6} << 20, size_t{96} << 20, size_t{2} << 30}) {
    const size_t bytes = traffic / 2, sets = arena / bytes, count = bytes / 16;
    const int calls = static_cast<int>(std::max<size_t>(2, sets));
    const double driver = in_graph(calls, [&](int i) {
      const size_t at = i % sets * count;
      CHECK(cudaMemcpyAsync(to + at, from + at, bytes, cudaMemcpyDeviceToDevice, stream));
    });
    const double ours = in_graph(calls, [&](int i) {
      const size_t at = i % sets * count;
      copy<<<resident, kThreads, 0, stream>>>(from + at, to + at, count);
    });
    say("copy", std::to_string(traffic >> 20) + " MiB",
        {{"driver_gb_per_second", traffic / driver / 1e3},
         {"kernel_gb_per_second", traffic / ours / 1e3}});
  }
  CHECK(cudaFree(from));
  CHECK(cudaFree(to));
}

// What a launch costs, and the memset before a look-back (csrc/cuda/look_back.h takes it for 2 us).

__global__ void nothing() {}

void measure_launch() {
  auto* flags = allocate<char>(1 << 20);
  for (const int blocks : {1, 8 * processors}) {
    const auto empty = [&](int) { nothing<<<blocks, kThreads, 0, stream>>>(); };
    say("launch", std::to_string(blocks) + " blocks in a graph", {{"us", in_graph(256, empty)}});
  }
  for (const size_t bytes : {size_t{4} << 10, size_t{256} << 10}) {
    const double pair = in_graph(256, [&](int) {
      CHECK(cudaMemsetAsync(flags, 0, bytes, stream));
      nothing<<<1, kThreads, 0, stream>>>();
    });
    say("launch", std::to_string(bytes >> 10) + " KiB cleared before", {{"us", pair}});
  }
  CHECK(cudaFree(flags));
}

// The error of the special functions over every float of a range, relative to the true value: the
// largest, where it is, and the mean, which a recurrence would sum up.

template <class V>
struct Exponential {
  static constexpr const char* name = "exp";
  static constexpr float first = -0.0f, last = -80.0f;
  static __device__ float value(float x) { return exponential(V(x)).v; }
  static __device__ double truth(double x) { return exp(x); }
};
template <class V>
struct Reciprocal {
  static constexpr const char* name = "1/x";
  static constexpr float first = 1.0f, last = 4.0f;
  static __device__ float value(float x) { return reciprocal(V(x)).v; }
  static __device__ double truth(double x) { return 1 / x; }
};
template <class V>
struct Logarithm {
  static constexpr const char* name = "log";
  static constexpr float first = 1.0625f, last = 1048576.0f;
  static __device__ float value(float x) { return logarithm(V(x)).v; }
  static __device__ double truth(double x) { return log(x); }
};

struct Error {
  unsigned long long largest;  // bits of the error above those of the argument
  double sum;
};

template <class Function>
__global__ void __launch_bounds__(kThreads) compare(uint32_t first, uint32_t count, Error* error) {
  double sum = 0;
  unsigned long long largest = 0;
  for (size_t i = size_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += size_t{gridDim.x} * kThreads) {
    const float x = __uint_as_float(first + static_cast<uint32_t>(i));
    const double truth = Function::truth(x), relative = (Function::value(x) - truth) / truth;
    const auto size = static_cast<unsigned long long>(__float_as_uint(fabsf(float(relative))));
    sum += relative;
    largest = max(largest, size << 32 | __float_as_uint(x));
  }
  atomicMax(&error->largest, largest);
  atomicAdd(&error->sum, sum);
}

template <class Function>
void measure_error(Error* error, const char* numbers) {
  const uint32_t first = bits_of(Function::first), count = bits_of(Function::last) - first + 1;
  CHECK(cudaMemsetAsync(error, 0, sizeof *error, stream));
  compare<Function><<<processors * 8, kThreads, 0, stream>>>(first, count, error);
  CHECK(cudaGetLastError());
  Error found;
  CHECK(cudaMemcpyAsync(&found, error, sizeof found, cudaMemcpyDeviceToHost, stream));
  CHECK(cudaStreamSynchronize(stream));
  say("special", std::string(Function::name) + ", " + numbers,
      {{"largest", float_of(static_cast<uint32_t>(found.largest >> 32))},
       {"at", float_of(static_cast<uint32_t>(found.largest))},
       {"mean", found.sum / count},
       {"floats", double(count)}});
}

void measure_special() {
  auto* error = allocate<Error>(1);
  measure_error<Exponential<Float>>(error, "exact");
  measure_error<Exponential<Brief>>(error, "brief");
  measure_error<Reciprocal<Float>>(error, "exact");
  measure_error<Reciprocal<Brief>>(error, "brief");
  measure_error<Logarithm<Float>>(error, "exact");
  CHECK(cudaFree(error));
}

// How long a carry takes from one block to the next, as look_back.h hands it on: a warp writes a
// span, releases a flag, and the next warp, which waits for that flag, reads it. The blocks form a
// ring, and the token in it counts its hops.

constexpr int kSpan = 3;                  // floats of a channel
constexpr uint32_t kMostPolls = 1 << 22;  // of one wait: seconds
constexpr uint32_t kLaps = 101;

struct Slot {
  float span[kSpan][32];
  alignas(128) uint32_t lap;
};
struct Found {
  uint32_t gave_up, hops;
  unsigned long long nanoseconds;
};

__device__ unsigned long long nanoseconds() {
  unsigned long long t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

template <bool pauses>
__global__ void __launch_bounds__(32) ring(Slot* slots, Found* found) {
  Slot *own = slots + blockIdx.x, *next = slots + (blockIdx.x + 1) % gridDim.x;
  const int lane = threadIdx.x;
  unsigned long long start = 0;
  float x[kSpan] = {};
  for (uint32_t lap = 1; lap <= kLaps; ++lap) {
    if (blockIdx.x || lap > 1) {  // block 0 starts the token
      const uint32_t awaited = blockIdx.x ? lap : lap - 1;
      for (uint32_t polls = 0; load_acquire(&own->lap) != awaited; ++polls) {
        if (polls == kMostPolls || (polls % 1024 == 1023 && load_coherent(&found->gave_up))) {
          found->gave_up = 1;
          return;
        }
        if (pauses) spin_pause();
      }
      __syncwarp();
      for (int i = 0; i < kSpan; ++i) x[i] = load_coherent(&own->span[i][lane]);
    }
    if (blockIdx.x == 0 && lap == 2) start = nanoseconds();  // the first lap warms up
    for (int i = 0; i < kSpan; ++i) next->span[i][lane] = x[i] + 1;
    __syncwarp();
    if (lane == 0) store_release(&next->lap, lap);
  }
  if (blockIdx.x) return;
  while (load_acquire(&own->lap) != kLaps && !load_coherent(&found->gave_up)) {
  }
  if (lane) return;
  found->nanoseconds = nanoseconds() - start;
  found->hops = static_cast<uint32_t>(load_coherent(&own->span[kSpan - 1][0]));
}

template <bool pauses>
void measure_ring(int blocks) {
  auto* slots = allocate<Slot>(blocks);
  auto* found = allocate<Found>(1);
  CHECK(cudaMemsetAsync(slots, 0, blocks * sizeof *slots, stream));
  CHECK(cudaMemsetAsync(found, 0, sizeof *found, stream));
  ring<pauses><<<blocks, 32, 0, stream>>>(slots, found);
  CHECK(cudaGetLastError());
  Found host;
  CHECK(cudaMemcpyAsync(&host, found, sizeof host, cudaMemcpyDeviceToHost, stream));
  CHECK(cudaStreamSynchronize(stream));
  if (host.gave_up) throw std::runtime_error("a block waited in vain");
  if (host.hops != kLaps * blocks) throw std::runtime_error("a hop was lost");
  say("hop", std::to_string(blocks) + (pauses ? " blocks, pausing" : " blocks"),
      {{"ns", double(host.nanoseconds) / ((kLaps - 1) * blocks)}});
  CHECK(cudaFree(slots));
  CHECK(cudaFree(found));
}

void measure_hop() {
  for (const int blocks : {2, processors}) {
    measure_ring<true>(blocks);
    measure_ring<false>(blocks);
  }
}

int main(int count, char** words) {
  const std::pair<const char*, void (*)()> experiments[] = {{"copy", measure_copy},
                                                            {"launch", measure_launch},
                                                            {"special", measure_special},
                                                            {"hop", measure_hop}};
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error || devices == 0) {
    std::printf("no usable GPU: %s\n", error ? cudaGetErrorString(error) : "none found");
    return 2;
  }
  int status = 0;
  for (const auto& [name, measure] : experiments) {
    const auto wanted = [name = name](const char* word) { return !std::strcmp(word, name); };
    if (count > 1 && std::none_of(words + 1, words + count, wanted)) continue;
    try {
      CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
      if (stream == nullptr) CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      measure();
    } catch (const std::exception& problem) {
      std::printf("{\"experiment\": \"%s\", \"failed\": \"%s\"}\n", name, problem.what());
      std::fflush(stdout);
      status = 1;
    }
  }
  return status;
}
