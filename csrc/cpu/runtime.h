// What the host side asks of the processor and of the operating system.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdlib>
#include <cstring>

#include "../dtype.h"

namespace msrnn {

// Each includes those before it.
enum class Capability { baseline, avx2, avx512, avx512_bf16 };

// The widest instruction set that this processor has and MSRNN_CPU_CAPABILITY allows.
inline Capability capability() {
  static const Capability chosen = [] {
    Capability allowed = Capability::avx512_bf16;
    const char* wanted = std::getenv("MSRNN_CPU_CAPABILITY");  // backend.py knows its names
    if (wanted && *wanted) {
      allowed = !std::strcmp(wanted, "avx512_bf16") ? Capability::avx512_bf16
                : !std::strcmp(wanted, "avx512")    ? Capability::avx512
                : !std::strcmp(wanted, "avx2")      ? Capability::avx2
                                                    : Capability::baseline;
    }
    Capability supported = Capability::baseline;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      supported = Capability::avx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        supported = Capability::avx512;
        if (__builtin_cpu_supports("avx512bf16")) supported = Capability::avx512_bf16;
      }
    }
#endif
    return supported < allowed ? supported : allowed;
  }();
  return chosen;
}

// Huge pages that lie within some memory.
struct HugePages {
  static constexpr uintptr_t kSize = uintptr_t{2} << 20;

  uintptr_t first;  // address
  int64_t count;
};

// Asks for huge pages under memory that is still to be touched. This is only advice, so nothing is
// reported.
inline HugePages prefer_huge_pages(const void* memory, size_t bytes) {
  HugePages pages{0, 0};
#if defined(__linux__)
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + HugePages::kSize - 1) / HugePages::kSize;
  const uintptr_t last = (begin + bytes) / HugePages::kSize;
  if (last <= first) return pages;
  pages = {first * HugePages::kSize, static_cast<int64_t>(last - first)};
  madvise(reinterpret_cast<void*>(pages.first), pages.count * HugePages::kSize, MADV_HUGEPAGE);
#endif
  return pages;
}

// Reads and writes denormals as zero while in scope. A decaying state spends a long time in them.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  explicit FlushDenormals(bool on) : saved_(_mm_getcsr()) {
    if (on) _mm_setcsr(saved_ | 0x8040);
  }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  explicit FlushDenormals(bool on) {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    if (on) asm volatile("msr fpcr, %0" ::"r"(saved_ | (1ull << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
  explicit FlushDenormals(bool) {}
#endif
};

}  // namespace msrnn
