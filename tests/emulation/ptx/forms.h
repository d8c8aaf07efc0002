// The table of all forms of instructions that are known.
//
// A form is an opcode with all its modifiers and the kinds of its operands. Whatever is not in the
// table is an error when a program is read: no modifier is skipped. Every form has a self-test
// (../../test_ptx_forms.py), whose values come from the text of the PTX ISA.
//
// The kinds of operands, one letter each:
//   d  a register to write, or _          D2 D4  a vector of them, {a, b}; {a} is a
//   s  a register or a number to read     S2 S4  a vector of them
//   p  a predicate to write, or two, p|q  (two operands; the second may be absent)
//   a  an address, [register + number]    (two operands: the slot and the slot of the number)
//   i  a number that selects what is done l  a label
#pragma once

#include <map>
#include <string>
#include <vector>

#include "machine.h"

namespace ptx {

struct Form {
  std::string operands;
  Execute execute;
};

class Forms {
 public:
  void add(std::string name, std::string operands, Execute execute) {
    known_[std::move(name)].push_back({std::move(operands), execute});
  }
  // Those of one name differ in their operands. Null if there is none.
  const std::vector<Form>* find(const std::string& name) const {
    const auto found = known_.find(name);
    return found == known_.end() ? nullptr : &found->second;
  }
  const std::map<std::string, std::vector<Form>>& all() const { return known_; }

 private:
  std::map<std::string, std::vector<Form>> known_;
};

void add_arithmetic(Forms&);
void add_conversions(Forms&);
void add_memory(Forms&);
void add_threads(Forms&);

inline const Forms& known_forms() {
  static const Forms* const all = [] {
    auto* const forms = new Forms;
    add_arithmetic(*forms), add_conversions(*forms), add_memory(*forms), add_threads(*forms);
    return forms;
  }();
  return *all;
}

// The types of the PTX ISA, and what their bits are in C++.

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Half2 {  // two numbers, the first in the low half
  uint32_t bits;
};
struct BFloat162 {
  uint32_t bits;
};
struct Float2 {  // two floats, the first in the low half
  uint64_t bits;
};
struct Tf32 {
  uint32_t bits;
};

#define PTX_TYPE(ptx, cpp)                    \
  struct ptx {                                \
    using type = cpp;                         \
    static constexpr const char* name = #ptx; \
  };
PTX_TYPE(pred, bool)
PTX_TYPE(b8, uint8_t)
PTX_TYPE(u8, uint8_t)
PTX_TYPE(s8, int8_t)
PTX_TYPE(b16, uint16_t)
PTX_TYPE(u16, uint16_t)
PTX_TYPE(s16, int16_t)
PTX_TYPE(f16, Half)
PTX_TYPE(bf16, BFloat16)
PTX_TYPE(b32, uint32_t)
PTX_TYPE(u32, uint32_t)
PTX_TYPE(s32, int32_t)
PTX_TYPE(f32, float)
PTX_TYPE(f16x2, Half2)
PTX_TYPE(bf16x2, BFloat162)
PTX_TYPE(tf32, Tf32)
PTX_TYPE(b64, uint64_t)
PTX_TYPE(u64, uint64_t)
PTX_TYPE(s64, int64_t)
PTX_TYPE(f64, double)
PTX_TYPE(f32x2, Float2)
#undef PTX_TYPE

// A row for each type: its name is `before` with that of the type; `execute` is given the type.
template <class... Types, class Of>
void rows(Forms& forms, const std::string& before, const char* operands, Of of) {
  (forms.add(before + Types::name, operands, of.template operator()<typename Types::type>()), ...);
}

// Instructions that read numbers of one type and write one.

template <class T, auto f>
void unary(Thread& t, const Instruction& i) {
  t.set(i[0], f(t.get<T>(i[1])));
}
template <class T, auto f>
void binary(Thread& t, const Instruction& i) {
  t.set(i[0], f(t.get<T>(i[1]), t.get<T>(i[2])));
}
template <class T, auto f>
void ternary(Thread& t, const Instruction& i) {
  t.set(i[0], f(t.get<T>(i[1]), t.get<T>(i[2]), t.get<T>(i[3])));
}

}  // namespace ptx
