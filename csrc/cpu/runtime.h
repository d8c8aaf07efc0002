// What a kernel's host code asks of the processor.
#pragma once

#include <cstdlib>
#include <cstring>

#include "numbers.h"

namespace msrnn {

// Each includes those before it.
enum class Capability { baseline, avx2, avx512, avx512_bf16 };

// The widest instruction set of this processor, at most that of MSRNN_CPU_CAPABILITY.
inline Capability capability() {
  static const Capability chosen = [] {
    Capability allowed = Capability::avx512_bf16;
    if (const char* wanted = std::getenv("MSRNN_CPU_CAPABILITY")) {
      allowed = !std::strcmp(wanted, "avx512_bf16") ? Capability::avx512_bf16
                : !std::strcmp(wanted, "avx512")    ? Capability::avx512
                : !std::strcmp(wanted, "avx2")      ? Capability::avx2
                                                    : Capability::baseline;
    }
    Capability found = Capability::baseline;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      found = Capability::avx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        found = Capability::avx512;
        if (__builtin_cpu_supports("avx512bf16")) found = Capability::avx512_bf16;
      }
    }
#endif
    return found < allowed ? found : allowed;
  }();
  return chosen;
}

// Denormals read and written as zero while in scope: a decaying state spends long in them.
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
