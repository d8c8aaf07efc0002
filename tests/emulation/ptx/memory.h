// The state spaces of PTX, and what makes an access a fault.
//
// An address of global memory is that of the host. An access must be aligned to its size, a vector
// as a whole, and lie within one allocation, of those that were announced (allocated, freed).
// Shared memory has addresses of its own, of 32 bits, and so have parameters.
//
// Memory that nobody wrote. Fresh global memory holds a pattern that nobody computes, and a load
// that finds it is a fault; but for flags that blocks poll, whose loads say acquire or relaxed.
// Shared memory and registers begin as poison, EMULATION_POISON, by default NaN: threads beyond the
// last channel read it and store nothing, so a load is no fault, but results must not depend on it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "machine.h"

namespace ptx {

enum class Space { generic, global, shared, parameters };

// What fresh memory holds, two bytes at a time: NaN as a float of any size.
constexpr uint16_t kUnwritten = 0xFFA5;

// Host: memory that kernels may access from now on, and no longer.
void allocated(void* p, size_t bytes);
void freed(void* p);
// Host: whether all of this is memory that was announced.
bool is_allocated(const void* p, size_t bytes);
// Host: launches see what was announced before.
void take_stock();

constexpr uint32_t kSharedBase = 1024;  // 0 is no address
constexpr uint32_t kParameterBase = 1 << 28;

// Shared memory is followed by a byte for each of its bytes: whether an asynchronous copy that has
// not been waited for will write it. It begins as poison, too, which is neither.
enum class Byte : unsigned char { there = 0, awaited = 1 };
inline uint64_t with_marks(uint64_t shared_bytes) { return 2 * shared_bytes; }

// An address that may be accessed, or there is a report.
char* checked(const Thread&, Space, uint64_t address, uint32_t bytes);

// Checked, of `bytes` bytes each: `count` numbers side by side.
void load_checked(Thread&, Space, uint64_t address, uint32_t bytes, int count, uint64_t* x);
void store_checked(Thread&, Space, uint64_t address, uint32_t bytes, int count, const uint64_t* x);

// Copies from global to shared memory that happen as late as they may.
void copy_later(Thread&, uint64_t shared, uint64_t global, uint32_t bytes, uint32_t given);
void finish_copies(Thread&, int pending_groups);

uint64_t generic_of_shared(const Thread&, uint64_t address);
uint64_t shared_of_generic(const Thread&, uint64_t address);

}  // namespace ptx
