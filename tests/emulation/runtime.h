// The fibers that stand for CUDA threads, and how they meet: the services of runtime.cpp.
//
// Two readers of kernels are built on it: cuda_on_cpu.h runs their source, and ptx/ runs what
// compilers made of it. runtime.cpp is compiled without sanitizers, so that the scheduler's own
// data is invisible to them; whatever a kernel does to memory is done by the readers, where they
// see it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

namespace emulated {

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The place of an operation in a kernel's text, for the reports.
struct Where {
  const char* file = "";
  uint32_t line = 0;

  static constexpr Where current(std::source_location here = std::source_location::current()) {
    return {here.file_name(), static_cast<uint32_t>(here.line())};
  }
};

namespace runtime {

struct Coordinates {
  int lane;
  void* dynamic_shared;
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};

struct Factors {  // of one lane
  uint32_t left[4], right[2];
};

// Of `bytes`, those beyond `given` become zeros.
struct AsyncCopy {
  void* shared;
  const void* global;
  uint32_t bytes, given;
  int64_t group;
};

extern const Coordinates* running;  // of the CUDA thread that runs now

void sync_block(Where where);
void sync_warp(uint32_t mask, Where where);
uint64_t shuffle(uint32_t mask, uint64_t value, int source_lane, Where where);
uint32_t ballot(uint32_t mask, bool vote, Where where);
const Factors* bring(const Factors& mine, Where where);  // those of all 32 lanes

void scheduling_point();  // others may run here
void poll(Where where);   // others must run here
void progress();          // a value that others may wait for has changed
[[noreturn]] void fail(const char* message, Where where);

void queue_copy(AsyncCopy copy, Where where);
void commit_copies();
bool take_copy(int pending_groups, AsyncCopy* copy);  // the next one that a wait covers

int resident_blocks();  // what kernels are told
int poison();           // a byte of what nobody has written

// Returns false if no GPU could run such a grid. If `together`, it waits for the rest of the
// device, and all blocks that kernels are told of can be resident at once.
bool launch(dim3 grid, dim3 block, size_t shared_bytes, void (*thread)(void*), void* argument,
            bool together = false);

}  // namespace runtime
}  // namespace emulated
