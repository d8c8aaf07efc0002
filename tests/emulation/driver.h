// What the drivers share that run kernels on the emulator without torch: their arguments, and
// memory that knows what must not be written.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "dtype.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

// The machine for PTX, if it is linked, knows what memory there is.
extern "C" {
__attribute__((weak)) void ptx_allocated(void* p, uint64_t bytes);
__attribute__((weak)) void ptx_freed(void* p);
}

namespace msrnn {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15 | 1) {}
  double uniform(double low, double high) {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return low + (high - low) * static_cast<double>(state_ >> 11) * 0x1p-53;
  }

 private:
  uint64_t state_;
};

// Of the launches: any but null, which is no stream of a caller.
inline void* const kStream = reinterpret_cast<void*>(uintptr_t{0x57BEA0});

// Bytes between guards, all 0xFFA5: NaN in every dtype, and of no position or flag.
class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(bytes), held_(new Line[lines()]) {
    poison(all(), static_cast<int64_t>(lines() * sizeof(Line)));
    if (ptx_allocated) ptx_allocated(data(), bytes_);
    ASAN_POISON_MEMORY_REGION(all(), kGuard);
    ASAN_POISON_MEMORY_REGION(data() + bytes_, rest());
  }
  ~Memory() {
    ASAN_UNPOISON_MEMORY_REGION(all(), lines() * sizeof(Line));
    if (ptx_freed) ptx_freed(data());
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* data() const { return all() + kGuard; }
  int64_t bytes() const { return bytes_; }
  bool guards_untouched() const {
    ASAN_UNPOISON_MEMORY_REGION(all(), lines() * sizeof(Line));
    return is_poison(all(), kGuard) && is_poison(data() + bytes_, rest());
  }
  static void poison(char* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; ++i) p[i] = poison_at(p + i);
  }
  static bool is_poison(const char* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; ++i) {
      if (p[i] != poison_at(p + i)) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kGuard = 256;
  static char poison_at(const char* p) {
    return reinterpret_cast<uintptr_t>(p) % 2 ? '\xFF' : '\xA5';
  }
  struct alignas(64) Line {
    char bytes[64];
  };
  char* all() const { return held_[0].bytes; }
  size_t lines() const { return (bytes_ + 2 * kGuard) / sizeof(Line) + 1; }
  int64_t rest() const { return static_cast<int64_t>(lines() * sizeof(Line)) - kGuard - bytes_; }

  int64_t bytes_;
  std::unique_ptr<Line[]> held_;
};

// A vector that kernels read.
template <class T>
struct Announced {
  using value_type = T;
  T* allocate(size_t n) {
    T* const p = std::allocator<T>().allocate(n);
    if (ptx_allocated) ptx_allocated(p, n * sizeof(T));
    return p;
  }
  void deallocate(T* p, size_t n) {
    if (ptx_freed) ptx_freed(p);
    std::allocator<T>().deallocate(p, n);
  }
  bool operator==(const Announced&) const = default;
};
template <class T>
using Vector = std::vector<T, Announced<T>>;

inline int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

inline double load(DType dtype, const char* p) {
  const auto as = [p]<class T>(T x) {
    memcpy(&x, p, sizeof x);
    return x;
  };
  switch (dtype) {
    case DType::float32:
      return as(float{});
    case DType::float64:
      return as(double{});
    case DType::bfloat16:
      return to_float(as(BFloat16{}));
    default:
      return to_float(as(Half{}));
  }
}

inline void store(DType dtype, char* p, double x) {
  const auto as = [p](auto value) { memcpy(p, &value, sizeof value); };
  switch (dtype) {
    case DType::float32:
      return as(static_cast<float>(x));
    case DType::float64:
      return as(x);
    case DType::bfloat16:
      return as(to_bfloat16(static_cast<float>(x)));
    default:
      return as(to_half(static_cast<float>(x)));
  }
}

// How far the nearest number of a 16-bit dtype may be from x; of others 0.
inline double half_a_unit(DType dtype, double x) {
  if (size_of(dtype) > 2 || x == 0 || !std::isfinite(x)) return 0;
  const int digits = dtype == DType::float16 ? 11 : 8, least = dtype == DType::float16 ? -14 : -126;
  return std::ldexp(1, std::max(std::ilogb(x), least) - digits);
}

// All cases, or those named, or --quick ones; --list names them. The exit code.
template <class Case, class Run>
int run_cases(int argc, char** argv, const std::vector<Case>& cases, Run run) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const bool list = arguments == std::vector<std::string>{"--list"};
  const bool quick = arguments == std::vector<std::string>{"--quick"};
  size_t chosen = 0, wrong = 0;
  for (const Case& c : cases) {
    bool named = arguments.empty() || list || (quick && c.quick);
    for (const std::string& name : arguments) named = named || name == c.name;
    if (!named) continue;
    ++chosen;
    if (list) std::puts(c.name.c_str());
    if (!list && !run(c)) ++wrong;
    std::fflush(stdout);
  }
  const bool unknown = !arguments.empty() && !list && !quick && chosen != arguments.size();
  if (unknown) std::puts("there is no such case");
  return wrong > 0 || unknown;
}

}  // namespace msrnn
