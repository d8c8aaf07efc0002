// Loads, stores, atomics and asynchronous copies.
#include "access.h"
#include "memory.h"
#include "number.h"

namespace ptx {
namespace {

uint64_t address(const Thread& t, const Instruction& i, int at) {
  return t.slots[i[at]] + t.slots[i[at + 1]];
}

// ld d, [a] of n numbers; a narrow one is extended by its sign or by zeros.
template <Space space, int n, class T>
void read(Thread& t, const Instruction& i) {
  uint64_t x[n];
  load_checked(t, space, address(t, i, n), sizeof(T), n, x);
  for (int k = 0; k < n; ++k) t.set(i[k], std::bit_cast<T>(static_cast<Bits<sizeof(T)>>(x[k])));
}
template <Space space, int n, class T>
void write(Thread& t, const Instruction& i) {
  uint64_t x[n];
  for (int k = 0; k < n; ++k) x[k] = t.get<Bits<sizeof(T)>>(i[2 + k]);
  store_checked(t, space, address(t, i, 0), sizeof(T), n, x);
}

// Flags between blocks, and counters.

template <Order order, class T>
void read_ordered(Thread& t, const Instruction& i) {
  const char* p = checked(t, Space::global, address(t, i, 1), sizeof(T));
  t.set(i[0], static_cast<T>(load_ordered(p, sizeof(T), order)));
}
template <Order order, class T>
void write_ordered(Thread& t, const Instruction& i) {
  char* p = checked(t, Space::global, address(t, i, 0), sizeof(T));
  store_ordered(p, sizeof(T), t.get<T>(i[2]), order);
}
// d = what was there; there is now f of it and of the operands.
template <Order order, class T, auto f>
void update(Thread& t, const Instruction& i) {
  runtime::scheduling_point();
  char* const p = checked(t, Space::global, address(t, i, 1), sizeof(T));
  uint64_t before = load_ordered(p, sizeof(T), Order::relaxed);
  T after;
  do {
    after = f(static_cast<T>(before), t.get<T>(i[3]));
  } while (!exchange(p, sizeof(T), &before, after, order));
  if (static_cast<T>(before) != after) runtime::progress();
  t.set(i[0], static_cast<T>(before));
}

// cp.async [shared], [global], bytes, given. It copies 16 bytes, or by .ca also 4 or 8.
template <bool some, bool only_16>
void copy(Thread& t, const Instruction& i) {
  const uint32_t bytes = i[4];
  if (bytes != 16 && (only_16 || (bytes != 4 && bytes != 8))) t.fail("cp.async of so many bytes");
  copy_later(t, address(t, i, 0), address(t, i, 2), bytes, some ? t.get<uint32_t>(i[5]) : bytes);
}
void commit(Thread&, const Instruction&) { runtime::commit_copies(); }
void wait_group(Thread& t, const Instruction& i) { finish_copies(t, static_cast<int>(i[0])); }
void wait_all(Thread& t, const Instruction&) {
  runtime::commit_copies();
  finish_copies(t, 0);
}

void to_generic(Thread& t, const Instruction& i) {
  t.set(i[0], generic_of_shared(t, t.get<uint64_t>(i[1])));
}
void to_shared(Thread& t, const Instruction& i) {
  t.set(i[0], shared_of_generic(t, t.get<uint64_t>(i[1])));
}
// Of global memory the generic address is the address.
void same(Thread& t, const Instruction& i) { t.set(i[0], t.get<uint64_t>(i[1])); }

template <Space space, int n>
constexpr auto reads = []<class T> { return read<space, n, T>; };
template <Space space, int n>
constexpr auto writes = []<class T> { return write<space, n, T>; };

}  // namespace

void add_memory(Forms& forms) {
  constexpr auto kParameters = Space::parameters;
  rows<u8, u16, u32, s32, b32, f32, u64, b64>(forms, "ld.param.", "da", reads<kParameters, 1>);
  rows<u32, u64>(forms, "ld.param.v2.", "D2a", reads<kParameters, 2>);

  constexpr auto kGlobal = Space::global;
  rows<u8, b8, u16, b16, u32, s32, b32, f32, u64, b64, f64>(forms, "ld.global.", "da",
                                                            reads<kGlobal, 1>);
  rows<b32, u32, f32, b64, u64>(forms, "ld.global.v2.", "D2a", reads<kGlobal, 2>);
  rows<b32, u32, f32>(forms, "ld.global.v4.", "D4a", reads<kGlobal, 4>);
  // .cg: only the caches differ.
  rows<f32, b64, u64, f64>(forms, "ld.global.cg.", "da", reads<kGlobal, 1>);
  rows<u64>(forms, "ld.global.cg.v2.", "D2a", reads<kGlobal, 2>);
  rows<u8, b8, u16, b16, u32, b32, f32, u64, b64, f64>(forms, "st.global.", "as",
                                                       writes<kGlobal, 1>);
  rows<b32, f32, b64>(forms, "st.global.v2.", "aS2", writes<kGlobal, 2>);
  rows<b32, u32, f32>(forms, "st.global.v4.", "aS4", writes<kGlobal, 4>);

  constexpr auto kGeneric = Space::generic;
  rows<f32, f64>(forms, "ld.", "da", reads<kGeneric, 1>);
  rows<f32, f64>(forms, "st.", "as", writes<kGeneric, 1>);
  rows<f32>(forms, "st.v4.", "aS4", writes<kGeneric, 4>);

  constexpr auto kShared = Space::shared;
  for (const std::string shared : {"shared.", "shared::cta."}) {
    rows<u8, b8, u16, b16, u32, s32, b32, f32, u64, b64, f64>(forms, "ld." + shared, "da",
                                                              reads<kShared, 1>);
    rows<b16, u32, b32, f32, u64, b64, f64>(forms, "ld." + shared + "v2.", "D2a",
                                            reads<kShared, 2>);
    rows<b16, u32, b32, f32>(forms, "ld." + shared + "v4.", "D4a", reads<kShared, 4>);
    rows<u8, b8, u16, b16, u32, b32, f32, u64, b64, f64>(forms, "st." + shared, "as",
                                                         writes<kShared, 1>);
    rows<b8, b32, f32, b64, f64>(forms, "st." + shared + "v2.", "aS2", writes<kShared, 2>);
    rows<b16, b32, u32, f32>(forms, "st." + shared + "v4.", "aS4", writes<kShared, 4>);
  }

  rows<u32, u64>(forms, "ld.acquire.gpu.global.", "da",
                 []<class T> { return read_ordered<Order::acquire, T>; });
  rows<u32, u64>(forms, "ld.relaxed.gpu.global.", "da",
                 []<class T> { return read_ordered<Order::relaxed, T>; });
  rows<u32, u64>(forms, "st.release.gpu.global.", "as",
                 []<class T> { return write_ordered<Order::release, T>; });
  rows<u32, u64>(forms, "st.relaxed.gpu.global.", "as",
                 []<class T> { return write_ordered<Order::relaxed, T>; });
  rows<u32>(forms, "atom.global.add.", "das",
            []<class T> { return update<Order::relaxed, T, sum>; });
  rows<u64>(forms, "atom.global.gpu.acq_rel.add.", "das",
            []<class T> { return update<Order::both, T, sum>; });

  forms.add("cp.async.cg.shared.global", "aai", copy<false, true>);
  forms.add("cp.async.cg.shared.global", "aais", copy<true, true>);
  forms.add("cp.async.ca.shared.global", "aai", copy<false, false>);
  forms.add("cp.async.ca.shared.global", "aais", copy<true, false>);
  forms.add("cp.async.commit_group", "", commit);
  forms.add("cp.async.wait_group", "i", wait_group);
  forms.add("cp.async.wait_all", "", wait_all);

  forms.add("cvta.to.global.u64", "ds", same);
  forms.add("cvta.global.u64", "ds", same);
  forms.add("cvta.shared.u64", "ds", to_generic);
  forms.add("cvta.to.shared.u64", "ds", to_shared);
}

}  // namespace ptx
