#include "access.h"

#include "../runtime.h"

namespace ptx {
namespace {

namespace runtime = emulated::runtime;

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
  return sized(bytes, [=]<class T>(T*) -> uint64_t { return *reinterpret_cast<const T*>(p); });
}

void store(char* p, uint32_t bytes, uint64_t x) {
  sized(bytes, [=]<class T>(T*) { *reinterpret_cast<T*>(p) = static_cast<T>(x); });
}

uint64_t load_ordered(const char* p, uint32_t bytes, Order order) {
  runtime::scheduling_point();
  return sized(bytes, [=]<class T>(T*) -> uint64_t {
    const auto* at = reinterpret_cast<const T*>(p);
    return order == Order::acquire ? __atomic_load_n(at, __ATOMIC_ACQUIRE)
                                   : __atomic_load_n(at, __ATOMIC_RELAXED);
  });
}

void store_ordered(char* p, uint32_t bytes, uint64_t x, Order order) {
  runtime::scheduling_point();
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
