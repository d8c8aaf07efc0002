#include "access.h"

#include "../runtime.h"

#if defined(__SANITIZE_THREAD__)
extern "C" {
void __tsan_func_entry(void* pc);
void __tsan_func_exit();
}
#endif

namespace ptx {

const Instruction* accessing = nullptr;

namespace {

namespace runtime = emulated::runtime;

// While it lives, the instruction is a function that calls the one that accesses memory.
#if defined(__SANITIZE_THREAD__)
struct Caller {
  const Instruction* const instruction;
  // A mark of ThreadSanitizer: a place that launch.cpp has the name of.
  static constexpr uint64_t kExternal = uint64_t{1} << 60;

  [[gnu::no_sanitize_thread]] Caller() : instruction(accessing) {
    __tsan_func_entry(reinterpret_cast<void*>(reinterpret_cast<uint64_t>(instruction) | kExternal));
  }
  ~Caller() { __tsan_func_exit(); }
  [[gnu::no_sanitize_thread]] void let_others_run() const {
    runtime::scheduling_point();
    accessing = instruction;
  }
};
#else
struct Caller {
  Caller() {}
  static void let_others_run() { runtime::scheduling_point(); }
};
#endif

template <class T>
using Aliased [[gnu::may_alias]] = T;

// Calls f with a null pointer of the unsigned integer of so many bytes.
template <class F>
auto sized(uint32_t bytes, F f) {
  switch (bytes) {
    case 1:
      return f(static_cast<Aliased<uint8_t>*>(nullptr));
    case 2:
      return f(static_cast<Aliased<uint16_t>*>(nullptr));
    case 4:
      return f(static_cast<Aliased<uint32_t>*>(nullptr));
    default:
      return f(static_cast<Aliased<uint64_t>*>(nullptr));
  }
}

}  // namespace

uint64_t load(const char* p, uint32_t bytes) {
  const Caller caller;
  return sized(bytes, [=]<class T>(T*) -> uint64_t { return *reinterpret_cast<const T*>(p); });
}

void store(char* p, uint32_t bytes, uint64_t x) {
  const Caller caller;
  sized(bytes, [=]<class T>(T*) { *reinterpret_cast<T*>(p) = static_cast<T>(x); });
}

uint64_t load_ordered(const char* p, uint32_t bytes, Order order) {
  const Caller caller;
  caller.let_others_run();
  return sized(bytes, [=]<class T>(T*) -> uint64_t {
    const auto* at = reinterpret_cast<const T*>(p);
    return order == Order::acquire ? __atomic_load_n(at, __ATOMIC_ACQUIRE)
                                   : __atomic_load_n(at, __ATOMIC_RELAXED);
  });
}

void store_ordered(char* p, uint32_t bytes, uint64_t x, Order order) {
  const Caller caller;
  caller.let_others_run();
  sized(bytes, [=]<class T>(T*) {
    auto* at = reinterpret_cast<T*>(p);
    if (order == Order::release) {
      __atomic_store_n(at, static_cast<T>(x), __ATOMIC_RELEASE);
    } else {
      __atomic_store_n(at, static_cast<T>(x), __ATOMIC_RELAXED);
    }
  });
  runtime::progress();
}

bool exchange(char* p, uint32_t bytes, uint64_t* x, uint64_t y, Order order) {
  const Caller caller;
  return sized(bytes, [=]<class T>(T*) {
    auto* at = reinterpret_cast<T*>(p);
    auto before = static_cast<T>(*x);
    bool done = false;
    switch (order) {
      case Order::relaxed:
        done = __atomic_compare_exchange_n(at, &before, static_cast<T>(y), false, __ATOMIC_RELAXED,
                                           __ATOMIC_RELAXED);
        break;
      case Order::acquire:
        done = __atomic_compare_exchange_n(at, &before, static_cast<T>(y), false, __ATOMIC_ACQUIRE,
                                           __ATOMIC_ACQUIRE);
        break;
      case Order::release:
        done = __atomic_compare_exchange_n(at, &before, static_cast<T>(y), false, __ATOMIC_RELEASE,
                                           __ATOMIC_RELAXED);
        break;
      default:
        done = __atomic_compare_exchange_n(at, &before, static_cast<T>(y), false, __ATOMIC_ACQ_REL,
                                           __ATOMIC_ACQUIRE);
    }
    *x = before;
    return done;
  });
}

}  // namespace ptx
