#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <map>
#include <mutex>
#include <vector>

#include "access.h"

namespace ptx {
namespace {

struct Allocation {
  uint64_t begin, end;
};

// Never destroyed: tensors may outlive it.
struct Allocations {
  std::mutex mutex;
  std::map<uint64_t, uint64_t> now;  // end by begin
  bool changed = false;
  // What the launch in progress may access, in order. A lock would order its threads.
  std::vector<Allocation> seen;
  size_t last = 0;  // that was accessed
};
Allocations& allocations = *new Allocations;

[[noreturn]] void fail(const Thread& t, const char* what, uint64_t address, uint64_t bytes) {
  static char text[300];
  std::snprintf(text, sizeof text, "%s: %llu bytes at 0x%llx", what,
                static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(address));
  t.fail(text);
}

char* shared_memory() { return static_cast<char*>(runtime::running->dynamic_shared); }

Byte* marks(const Thread& t, const char* p) {
  return reinterpret_cast<Byte*>(shared_memory() + t.launch.shared_bytes) + (p - shared_memory());
}

bool in_shared(const Thread& t, uint64_t host_address) {
  return host_address - reinterpret_cast<uint64_t>(shared_memory()) < t.launch.shared_bytes;
}

bool contains(const Allocation& a, uint64_t address, uint64_t bytes) {
  return address >= a.begin && address <= a.end && a.end - address >= bytes;
}

char* in_global(const Thread& t, uint64_t address, uint32_t bytes) {
  const auto& seen = allocations.seen;
  if (allocations.last < seen.size() && contains(seen[allocations.last], address, bytes)) {
    return reinterpret_cast<char*>(address);
  }
  const auto after = std::upper_bound(seen.begin(), seen.end(), address,
                                      [](uint64_t x, const Allocation& a) { return x < a.begin; });
  if (after == seen.begin()) fail(t, "global memory that nobody allocated", address, bytes);
  const Allocation& a = *(after - 1);
  if (!contains(a, address, bytes)) {
    static char text[200];
    std::snprintf(text, sizeof text,
                  "global memory out of bounds (the allocation before has %llu bytes, this begins "
                  "at byte %llu)",
                  static_cast<unsigned long long>(a.end - a.begin),
                  static_cast<unsigned long long>(address - a.begin));
    fail(t, text, address, bytes);
  }
  allocations.last = static_cast<size_t>(&a - seen.data());
  return reinterpret_cast<char*>(address);
}

char* in_window(const Thread& t, char* begin, uint64_t size, uint64_t offset, uint32_t bytes,
                const char* what) {
  if (offset > size || size - offset < bytes) fail(t, what, offset, bytes);
  return begin + offset;
}

Space space_of(const Thread& t, Space space, uint64_t address) {
  if (space != Space::generic) return space;
  return in_shared(t, address) ? Space::shared : Space::global;
}

bool is_unwritten(uint64_t x, uint64_t address, uint32_t bytes) {
  if (bytes == 1) {  // says too little without its neighbour
    return *reinterpret_cast<const uint16_t*>(address & ~uint64_t{1}) == kUnwritten;
  }
  constexpr uint64_t kPattern = uint64_t{kUnwritten} * 0x0001000100010001u;
  return bytes == 8 ? x == kPattern : ((x ^ kPattern) & ((uint64_t{1} << 8 * bytes) - 1)) == 0;
}

}  // namespace

void allocated(void* p, size_t bytes) {
  const std::lock_guard lock(allocations.mutex);
  const auto begin = reinterpret_cast<uint64_t>(p);
  allocations.now[begin] = begin + bytes;
  allocations.changed = true;
}

void freed(void* p) {
  const std::lock_guard lock(allocations.mutex);
  allocations.now.erase(reinterpret_cast<uint64_t>(p));
  allocations.changed = true;
}

bool is_allocated(const void* p, size_t bytes) {
  const std::lock_guard lock(allocations.mutex);
  const auto address = reinterpret_cast<uint64_t>(p);
  const auto after = allocations.now.upper_bound(address);
  if (after == allocations.now.begin()) return false;
  const auto& [begin, end] = *std::prev(after);
  return contains({begin, end}, address, bytes);
}

void take_stock() {
  const std::lock_guard lock(allocations.mutex);
  if (!allocations.changed) return;
  allocations.seen.clear();
  for (const auto& [begin, end] : allocations.now) allocations.seen.push_back({begin, end});
  allocations.last = 0;
  allocations.changed = false;
}

char* checked(const Thread& t, Space space, uint64_t address, uint32_t bytes) {
  accessing = &t.instruction();
  if (address & (bytes - 1)) fail(t, "misaligned access", address, bytes);
  switch (space_of(t, space, address)) {
    case Space::shared: {
      const uint64_t host = reinterpret_cast<uint64_t>(shared_memory());
      const uint64_t offset = space == Space::generic
                                  ? address - host
                                  : uint64_t{static_cast<uint32_t>(address)} - kSharedBase;
      return in_window(t, shared_memory(), t.launch.shared_bytes, offset, bytes,
                       "shared memory out of bounds (offset)");
    }
    case Space::parameters:
      return in_window(t, const_cast<char*>(t.launch.parameters), t.launch.kernel->parameter_bytes,
                       address - kParameterBase, bytes, "parameters out of bounds (offset)");
    default:
      return in_global(t, address, bytes);
  }
}

void load_checked(Thread& t, Space space, uint64_t address, uint32_t bytes, int count,
                  uint64_t* x) {
  const char* p = checked(t, space, address, bytes * count);
  const Space where = space_of(t, space, address);
  for (int i = 0; i < count; ++i, p += bytes) {
    x[i] = load(p, bytes);
    if (where == Space::shared) {
      const Byte* const mark = marks(t, p);
      for (uint32_t b = 0; b < bytes; ++b) {
        if (mark[b] == Byte::awaited) {
          fail(t, "shared memory that waits for an asynchronous copy", p - shared_memory(), bytes);
        }
      }
    } else if (where == Space::global && is_unwritten(x[i], reinterpret_cast<uint64_t>(p), bytes)) {
      fail(t, "global memory that nobody wrote", reinterpret_cast<uint64_t>(p), bytes);
    }
  }
}

void store_checked(Thread& t, Space space, uint64_t address, uint32_t bytes, int count,
                   const uint64_t* x) {
  char* p = checked(t, space, address, bytes * count);
  if (space == Space::parameters) fail(t, "a store to parameters", address, bytes);
  if (space_of(t, space, address) == Space::shared) {
    Byte* const mark = marks(t, p);
    for (uint32_t b = 0; b < bytes * count; ++b) {
      if (mark[b] == Byte::awaited) {
        fail(t, "a store to what an asynchronous copy will write", p - shared_memory(), bytes);
      }
    }
  }
  for (int i = 0; i < count; ++i, p += bytes) store(p, bytes, x[i]);
}

void copy_later(Thread& t, uint64_t shared, uint64_t global, uint32_t bytes, uint32_t given) {
  if (given > bytes) fail(t, "cp.async of more bytes than it writes", global, given);
  char* const to = checked(t, Space::shared, shared, bytes);
  if (global & (bytes - 1)) fail(t, "misaligned access", global, bytes);
  const char* const from = given > 0 ? in_global(t, global, given) : nullptr;
  Byte* const mark = marks(t, to);
  if (std::find(mark, mark + bytes, Byte::awaited) != mark + bytes) {
    fail(t, "two asynchronous copies to one place", to - shared_memory(), bytes);
  }
  for (uint32_t b = 0; b < bytes; b += 4) store(to + b, 4, ~0u);
  std::fill_n(mark, bytes, Byte::awaited);
  runtime::queue_copy({to, from, bytes, given, 0}, t.where());
}

void finish_copies(Thread& t, int pending_groups) {
  accessing = &t.instruction();
  runtime::AsyncCopy copy;
  while (runtime::take_copy(pending_groups, &copy)) {
    auto* const to = static_cast<char*>(copy.shared);
    auto* const from = static_cast<const char*>(copy.global);
    for (uint32_t b = 0; b < copy.bytes; b += 4) {
      uint64_t x = 0;
      if (b + 4 <= copy.given) {
        x = load(from + b, 4);
      } else {
        for (uint32_t k = 0; b + k < copy.given; ++k) x |= load(from + b + k, 1) << 8 * k;
      }
      const auto address = reinterpret_cast<uint64_t>(from + b);
      if (b + 4 <= copy.given && is_unwritten(x, address, 4)) {
        fail(t, "a copy of global memory that nobody wrote", address, 4);
      }
      store(to + b, 4, x);
    }
    std::fill_n(marks(t, to), copy.bytes, Byte::there);
  }
}

uint64_t generic_of_shared(const Thread&, uint64_t address) {
  return reinterpret_cast<uint64_t>(shared_memory()) + static_cast<uint32_t>(address) - kSharedBase;
}

uint64_t shared_of_generic(const Thread& t, uint64_t address) {
  const uint64_t offset = address - reinterpret_cast<uint64_t>(shared_memory());
  if (offset > t.launch.shared_bytes) fail(t, "not an address of shared memory", address, 0);
  return kSharedBase + offset;
}

}  // namespace ptx
