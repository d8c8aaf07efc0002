// The loads and stores of translated kernels: all that ThreadSanitizer must see of them.
//
// The machine itself is compiled without sanitizers; this one file is compiled with them.
#pragma once

#include <cstdint>

namespace ptx {

struct Instruction;

// The instruction that accesses memory: ThreadSanitizer names it in reports. Set before a call of
// those below.
extern const Instruction* accessing;

enum class Order { relaxed, acquire, release, both };

uint64_t load(const char* p, uint32_t bytes);
void store(char* p, uint32_t bytes, uint64_t x);

// Of 4 or 8 bytes; other threads may run before them.
uint64_t load_ordered(const char* p, uint32_t bytes, Order order);
void store_ordered(char* p, uint32_t bytes, uint64_t x, Order order);

// Replaces x by y if it is still x. If not, x becomes what it is now.
bool exchange(char* p, uint32_t bytes, uint64_t* x, uint64_t y, Order order);

}  // namespace ptx
