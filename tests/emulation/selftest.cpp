// Proves that cuda_on_cpu.h and runtime.cpp work, with tiny kernels.
//
//   selftest            runs every kernel and compares with what CUDA defines
//   selftest MISTAKE    plants a mistake; the emulator, a sanitizer or the comparison must notice
//   selftest speed      times a kernel that does little but shuffle
//
// Built and run by
//   g++ -std=c++20 -O2 -c runtime.cpp -o runtime.o
//   g++ -std=c++20 -O2 selftest.cpp runtime.o -o plain
//   g++ -std=c++20 -O1 -g -fsanitize=address,undefined selftest.cpp runtime.o -o asan
//   g++ -std=c++20 -O1 -g -fsanitize=thread selftest.cpp runtime.o -o tsan
//   for build in plain asan tsan; do
//     for seed in 1 2 3; do EMULATION_SEED=$seed EMULATION_SHUFFLE=2 ./$build; done
//     for mistake in $(./$build mistakes); do
//       EMULATION_SPINS=100000 EMULATION_STRICT_WARPS=1 ./$build $mistake; echo "exit code $?"
//     done
//   done
//   ./plain speed
//
// Who notices which mistake: the runtime itself or the comparison all but three, in every build;
// AddressSanitizer also says where a shared_overrun or global_overrun is; ThreadSanitizer alone
// sees relaxed_flag, relaxed_poll and missing_syncwarp (the latter with EMULATION_STRICT_WARPS=1).
//
// Exit codes: 0 all well, 1 wrong result (or AddressSanitizer), 99 the runtime, 66 ThreadSanitizer.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "cuda_on_cpu.h"

namespace {

const char* const kMistakes[] = {
    "missing_barrier",  "divergent_barrier",   "mask_mismatch",  "absent_lane",  "missing_syncwarp",
    "mixed_operations", "shared_overrun",      "global_overrun", "missing_wait", "weak_wait",
    "early_overwrite",  "misaligned_copy",     "relaxed_flag",   "relaxed_poll", "deadlock",
    "barrier_deadlock", "exit_before_barrier", "exit_at_barrier"};

std::string planted_mistake;
int failures = 0;

// Decided on the host: a kernel takes it as a parameter.
bool planted(const char* mistake) { return planted_mistake == mistake; }

void check(bool passed, const char* what) {
  if (passed && planted_mistake.empty()) std::printf("ok      %s\n", what);
  if (passed) return;
  std::printf("WRONG   %s\n", what);
  ++failures;
}

void run(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(error));
  ++failures;
}

using emulated::launch;

// Indices, dimensions, dynamic shared memory as the block finds it.

__global__ void __launch_bounds__(64) write_indices(unsigned* __restrict__ out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
  out[i] = i;
}

__global__ void look_at_shared(int* good, int bytes) {
  auto* shared = static_cast<unsigned char*>(msrnn_dynamic_shared());
  bool poisoned = reinterpret_cast<uintptr_t>(shared) % 128 == 0;
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) poisoned = poisoned && shared[i] == 0xFF;
  good[blockIdx.x * blockDim.x + threadIdx.x] = poisoned;
}

void test_indices() {
  std::vector<unsigned> out(30 * 30, ~0u);
  run(launch(write_indices, dim3(5, 3, 2), dim3(5, 3, 2), 0, nullptr, out.data()));
  std::vector<unsigned> expected(out.size());
  std::iota(expected.begin(), expected.end(), 0u);
  check(out == expected, "threadIdx, blockIdx, blockDim, gridDim");

  std::vector<int> good(10 * 33);
  run(launch(look_at_shared, 10, 33, 1001, nullptr, good.data(), 1001));
  check(good == std::vector<int>(good.size(), 1), "dynamic shared memory");
  check(launch(look_at_shared, 1, 1025, 0, nullptr, good.data(), 0) != cudaSuccess, "block size");
}

// Barriers: a rotation of the block's values through shared memory, several times.

struct BarrierMistakes {
  bool missing, divergent, overrun, global_overrun, exit_before, exit_at;
};

__global__ void rotate(unsigned* data, int rounds, const __grid_constant__ BarrierMistakes wrong) {
  auto* shared = static_cast<unsigned*>(msrnn_dynamic_shared());
  const unsigned self = threadIdx.x;
  const unsigned next = (self + 1) % blockDim.x;
  unsigned value = data[blockIdx.x * blockDim.x + self];
  if (wrong.exit_before && self == 5) return;
  for (int i = 0; i < rounds; ++i) {
    shared[self + wrong.overrun] = value;
    if (wrong.divergent && self < 32) {
      __syncthreads();
    } else if (!wrong.missing) {
      __syncthreads();
    }
    value = shared[next];
    if (wrong.exit_at && self == 5) return;
    __syncthreads();
  }
  data[blockIdx.x * blockDim.x + self + wrong.global_overrun] = value;
}

void test_barriers() {
  constexpr unsigned kBlocks = 6, kThreads = 96, kRounds = 7;
  std::vector<unsigned> data(kBlocks * kThreads);
  std::iota(data.begin(), data.end(), 0u);
  const BarrierMistakes wrong{.missing = planted("missing_barrier"),
                              .divergent = planted("divergent_barrier"),
                              .overrun = planted("shared_overrun"),
                              .global_overrun = planted("global_overrun"),
                              .exit_before = planted("exit_before_barrier"),
                              .exit_at = planted("exit_at_barrier")};
  run(launch(rotate, kBlocks, kThreads, kThreads * sizeof(unsigned), nullptr, data.data(), kRounds,
             wrong));
  bool right = true;
  for (unsigned i = 0; i < data.size(); ++i) {
    const unsigned block = i / kThreads;
    right = right && data[i] == block * kThreads + (i + kRounds) % kThreads;
  }
  check(right, "__syncthreads");
}

// Shuffles and votes.

struct WarpResults {
  int direct, segment, up, down, exchanged, absent;
  double wide;
  unsigned ballot;
  int any, all, none;
};

__global__ void exchange_in_warp(WarpResults* out, bool mismatch, bool absent_lane, bool mixed) {
  const int lane = threadIdx.x % warpSize;
  const unsigned everyone = mismatch && lane == 3 ? 0xFFFFu : ~0u;
  WarpResults r{};
  r.direct = __shfl_sync(everyone, 100 + lane, 7);
  r.segment = __shfl_sync(~0u, 100 + lane, 2, 8);
  r.up = __shfl_up_sync(~0u, 100 + lane, 3);
  r.down = __shfl_down_sync(~0u, 100 + lane, 2, 16);
  r.exchanged = __shfl_xor_sync(~0u, 100 + lane, 5);
  r.wide = __shfl_xor_sync(~0u, 0.5 + lane, 16);
  if (mixed && lane == 9) __syncwarp();
  r.ballot = __ballot_sync(~0u, lane % 3 == 0);
  r.any = __any_sync(~0u, lane == 31);
  r.all = __all_sync(~0u, lane >= 0);
  r.none = __all_sync(~0u, lane != 4);
  if (lane < 10 || (absent_lane && lane == 10)) r.absent = __shfl_sync(0x3FFu, lane, lane + 1);
  out[threadIdx.x] = r;
}

// Values meet under masks that change, while slower lanes have yet to take theirs.
__global__ void halves(int* out) {
  const int lane = threadIdx.x;
  int sum = __shfl_xor_sync(~0u, lane, 1);
  for (int i = 0; i < 5; ++i) {
    if (lane < 16) sum += __shfl_xor_sync(0xFFFFu, lane, 1);
  }
  __syncwarp();
  if (lane >= 16) sum += __shfl_xor_sync(0xFFFF0000u, lane, 1);
  out[lane] = sum;
}

// Lanes 30 and 31 do not exist, and 20 has gone.
__global__ void partial_warp(unsigned* out) {
  if (threadIdx.x == 20) return;
  out[threadIdx.x] = __ballot_sync(~0u, 1);
}

void test_warps() {
  std::vector<WarpResults> out(64);
  run(launch(exchange_in_warp, 1, 64, 0, nullptr, out.data(), planted("mask_mismatch"),
             planted("absent_lane"), planted("mixed_operations")));
  bool shuffles = true, votes = true, absent = true;
  for (int i = 0; i < 64; ++i) {
    const WarpResults& r = out[i];
    const int lane = i % 32;
    shuffles = shuffles && r.direct == 107 && r.segment == 102 + lane / 8 * 8 &&
               r.up == 100 + (lane < 3 ? lane : lane - 3) &&
               r.down == 100 + (lane % 16 > 13 ? lane : lane + 2) &&
               r.exchanged == 100 + (lane ^ 5) && r.wide == 0.5 + (lane ^ 16);
    votes = votes && r.ballot == 0x49249249u && r.any == 1 && r.all == 1 && r.none == 0;
    absent = absent && r.absent == (lane < 9 ? lane + 1 : lane == 9 ? -1 : 0);
  }
  check(shuffles, "__shfl_sync, up, down, xor");
  check(votes, "__ballot_sync, __any_sync, __all_sync");
  check(absent, "a shuffle from a lane that takes no part is poison");

  std::vector<int> sums(32);
  run(launch(halves, 1, 32, 0, nullptr, sums.data()));
  bool right = true;
  for (int i = 0; i < 32; ++i) right = right && sums[i] == (i ^ 1) * (i < 16 ? 6 : 2);
  check(right, "masks that change");

  std::vector<unsigned> ballots(30);
  run(launch(partial_warp, 1, 30, 0, nullptr, ballots.data()));
  bool early = true;  // whether lane 20 left before or after the others came: not in the ballot
  for (int i = 0; i < 30; ++i) early = early && ballots[i] == (i == 20 ? 0 : 0x3FEFFFFFu);
  check(early, "warps with missing lanes");
}

// Memory between the lanes of a warp.

__global__ void reverse_in_warp(int* out, bool missing) {
  auto* shared = static_cast<int*>(msrnn_dynamic_shared());
  shared[threadIdx.x] = threadIdx.x;
  const unsigned all = __ballot_sync(~0u, 1);
  if (!missing) __syncwarp();
  out[threadIdx.x] = shared[31 - threadIdx.x] + (all != ~0u);
}

void test_syncwarp() {
  std::vector<int> out(32);
  run(launch(reverse_in_warp, 1, 32, 32 * sizeof(int), nullptr, out.data(),
             planted("missing_syncwarp")));
  bool right = true;
  for (int i = 0; i < 32; ++i) right = right && out[i] == 31 - i;
  check(right, "__syncwarp");
}

// Atomics.

struct Counters {
  unsigned sum, smallest, largest, last, locked, lock;
  unsigned long long wide_sum, wide_largest;
};

__global__ void count(Counters* c) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&c->sum, i);
  atomicAdd(&c->wide_sum, 1ull << 32);
  atomicMin(&c->smallest, i + 3);
  atomicMax(&c->largest, i);
  atomicMax(&c->wide_largest, 5ull << 32 | i);
  atomicExch(&c->last, 77u);
  while (atomicCAS(&c->lock, 0u, 1u) != 0) emulated::spin_pause();
  const unsigned locked = emulated::load_relaxed(&c->locked);
  emulated::store_relaxed(&c->locked, locked + 1);
  emulated::store_release(&c->lock, 0u);
}

void test_atomics() {
  constexpr unsigned n = 9 * 40;
  Counters c{.sum = 0,
             .smallest = ~0u,
             .largest = 0,
             .last = 0,
             .locked = 0,
             .lock = 0,
             .wide_sum = 0,
             .wide_largest = 0};
  run(launch(count, 9, 40, 0, nullptr, &c));
  check(c.sum == n * (n - 1) / 2 && c.wide_sum == uint64_t{n} << 32, "atomicAdd");
  check(c.smallest == 3 && c.largest == n - 1 && c.wide_largest == (5ull << 32 | (n - 1)),
        "atomicMin, atomicMax");
  check(c.last == 77 && c.locked == n && c.lock == 0, "atomicExch, atomicCAS");
}

// Blocks that hand a sum on: release and acquire, polls, tickets.

struct Chain {
  unsigned* ticket;
  unsigned* flags;
  float* sums;
  bool relaxed_store, relaxed_load, forgotten;
};

__global__ void running_sum(const float* in, float* out, Chain chain) {
  auto* shared = static_cast<float*>(msrnn_dynamic_shared());
  auto* shared_ticket = reinterpret_cast<unsigned*>(shared + 1);
  if (threadIdx.x == 0) {
    const unsigned ticket = atomicAdd(chain.ticket, 1u);
    float before = 0;
    if (ticket > 0) {
      const unsigned* flag = &chain.flags[ticket - 1];
      while ((chain.relaxed_load ? emulated::load_relaxed(flag) : emulated::load_acquire(flag)) ==
             0) {
        emulated::spin_pause();
      }
      before = emulated::load_plain_coherent(&chain.sums[ticket - 1]);
    }
    chain.sums[ticket] = before + in[ticket];
    if (chain.relaxed_store) {
      emulated::store_relaxed(&chain.flags[ticket], 1u);
    } else if (!chain.forgotten || ticket != 10) {
      emulated::store_release(&chain.flags[ticket], 1u);
    }
    *shared = before + in[ticket];
    *shared_ticket = ticket;
  }
  __syncthreads();
  out[*shared_ticket * blockDim.x + threadIdx.x] = *shared;
}

void test_chain() {
  constexpr unsigned kBlocks = 50, kThreads = 40;
  std::vector<float> in(kBlocks), sums(kBlocks), out(kBlocks * kThreads);
  std::vector<unsigned> words(kBlocks + 1, ~0u);
  std::iota(in.begin(), in.end(), 1.0f);
  cudaMemsetAsync(words.data(), 0, words.size() * sizeof(unsigned), nullptr);
  const Chain chain{.ticket = &words[kBlocks],
                    .flags = words.data(),
                    .sums = sums.data(),
                    .relaxed_store = planted("relaxed_flag"),
                    .relaxed_load = planted("relaxed_poll"),
                    .forgotten = planted("deadlock")};
  run(launch(running_sum, kBlocks, kThreads, 8, nullptr, in.data(), out.data(), chain));
  bool right = true;
  for (unsigned i = 0; i < out.size(); ++i) {
    const unsigned block = i / kThreads;
    right = right && out[i] == static_cast<float>((block + 1) * (block + 2) / 2);
  }
  check(right, "release and acquire between blocks");
}

// Asynchronous copies: two buffers in turn.

struct CopyMistakes {
  bool missing, weak, overwrite, misaligned;
};

struct alignas(16) Chunk {
  float x[4];
};

__global__ void sum_pipelined(Chunk* in, float* out, int steps, CopyMistakes wrong) {
  auto* buffers = static_cast<Chunk*>(msrnn_dynamic_shared());
  const int threads = blockDim.x;
  auto issue = [&](int step) {
    Chunk* to = &buffers[step % 2 * threads + threadIdx.x];
    const Chunk* from = &in[step * threads + threadIdx.x];
    if (step < steps) copy_async_16(to, reinterpret_cast<const char*>(from) + 4 * wrong.misaligned);
    copy_async_commit();
  };
  float sum = 0;
  issue(0);
  for (int step = 0; step < steps; ++step) {
    issue(step + 1);
    if (wrong.overwrite && step == 1) in[step * threads + threadIdx.x] = Chunk{};
    if (wrong.weak) {
      copy_async_wait<2>();
    } else if (!wrong.missing) {
      copy_async_wait<1>();
    }
    const Chunk& chunk = buffers[step % 2 * threads + threadIdx.x];
    for (float x : chunk.x) sum += x;
  }
  out[threadIdx.x] = sum;
}

void test_copies() {
  constexpr int kThreads = 64, kSteps = 9;
  std::vector<Chunk> in(kThreads * kSteps + 1);
  for (size_t i = 0; i < in.size(); ++i) in[i] = Chunk{{1, 2, 3, static_cast<float>(i)}};
  std::vector<float> out(kThreads);
  const CopyMistakes wrong{.missing = planted("missing_wait"),
                           .weak = planted("weak_wait"),
                           .overwrite = planted("early_overwrite"),
                           .misaligned = planted("misaligned_copy")};
  run(launch(sum_pipelined, 1, kThreads, 2 * kThreads * sizeof(Chunk), nullptr, in.data(),
             out.data(), kSteps, wrong));
  bool right = true;
  for (int i = 0; i < kThreads; ++i) {
    const int sum = kSteps * (6 + i) + kThreads * kSteps * (kSteps - 1) / 2;
    right = right && out[i] == static_cast<float>(sum);
  }
  check(right, "copy_async_16, copy_async_commit, copy_async_wait");
}

// What needs no runtime, launches from several threads, and dead-lock at barriers.

void test_math() {
  check(__ffs(0) == 0 && __ffs(8) == 4 && __popc(0xF0F0u) == 8 && __clz(1) == 31 && __clz(0) == 32,
        "__ffs, __popc, __clz");
  check(exp2_approx(3.0f) == 8 && exp2_approx(-126.0f) == FLT_MIN && exp2_approx(-127.0f) == 0 &&
            log2_approx(8.0f) == 3 && reciprocal_approx(4.0f) == 0.25f &&
            __uint_as_float(__float_as_uint(1.5f)) == 1.5f && std::isnan(exp2_approx(NAN)),
        "fast math");
}

void test_host_threads() {
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) threads.emplace_back(test_chain);
  for (std::thread& thread : threads) thread.join();
}

__global__ void wait_apart() {
  if (threadIdx.x < 16) __syncthreads();
  __ballot_sync(~0u, 1);
}

// A warp-wide inclusive scan with shuffles, over and over.
__global__ void shuffle_much(float* data, int elements_per_thread) {
  const int lane = threadIdx.x % warpSize;
  const size_t first = (size_t{blockIdx.x} * blockDim.x + threadIdx.x) * elements_per_thread;
  float value = data[first];
  for (int repeat = 0; repeat < 16; ++repeat) {
    for (int distance = 1; distance < warpSize; distance *= 2) {
      const float other = __shfl_up_sync(~0u, value, distance);
      if (lane >= distance) value = fmaf(other, 0.5f, value);
    }
  }
  for (int i = 0; i < elements_per_thread; ++i) data[first + i] += value;
}

void measure_speed() {
  constexpr int kBlocks = 200, kThreads = 256, kElements = 32;
  std::vector<float> data(size_t{kBlocks} * kThreads * kElements, 1.0f);
  run(launch(shuffle_much, 8, kThreads, 0, nullptr, data.data(), kElements));
  const auto start = std::chrono::steady_clock::now();
  run(launch(shuffle_much, kBlocks, kThreads, 0, nullptr, data.data(), kElements));
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::printf("%.3g elements/s, %.1f ns per shuffle and thread\n", data.size() / took.count(),
              took.count() * 1e9 / (80.0 * kBlocks * kThreads));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) planted_mistake = argv[1];
  if (planted_mistake == "speed") {
    measure_speed();
    return 0;
  }
  if (planted_mistake == "mistakes") {
    for (const char* mistake : kMistakes) std::puts(mistake);
    return 0;
  }
  if (planted("barrier_deadlock")) run(launch(wait_apart, 1, 32, 0, nullptr));
  test_indices();
  test_barriers();
  test_warps();
  test_syncwarp();
  test_atomics();
  test_chain();
  test_copies();
  test_math();
  test_host_threads();
  if (failures == 0 && !planted_mistake.empty()) std::printf("%s: not noticed\n", argv[1]);
  return failures == 0 ? 0 : 1;
}
