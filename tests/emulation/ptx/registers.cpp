#include "registers.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace ptx {
namespace {

enum class Role { reads, writes, number };

// Calls f with the place of each operand of an instruction, and its role.
template <class F>
void each_operand(const Instruction& i, F f) {
  int at = 0;
  for (const char* kind = i.kinds; *kind != '\0'; ++kind) {
    int count = kind[1] >= '0' && kind[1] <= '9' ? kind[1] - '0' : 1;
    const bool two = *kind == 'p' || *kind == 'a';
    const Role role = std::strchr("dDp", *kind)  ? Role::writes
                      : std::strchr("il", *kind) ? Role::number
                                                 : Role::reads;
    if (kind[1] >= '0' && kind[1] <= '9') ++kind;
    for (count *= two ? 2 : 1; count > 0; --count) f(at++, role);
  }
}

// Whether another instruction than the next may follow.
bool jumps(const Instruction& i) { return std::strchr(i.kinds, 'l') != nullptr; }

// The number of its stretch for each instruction.
std::vector<uint32_t> stretches(const std::vector<Instruction>& code) {
  std::vector<bool> first(code.size() + 1);
  for (size_t n = 0; n < code.size(); ++n) {
    if (!jumps(code[n])) continue;
    first[n + 1] = true;
    each_operand(code[n], [&](int at, Role role) {
      if (role == Role::number) first[code[n].operand[at]] = true;
    });
  }
  std::vector<uint32_t> stretch(code.size());
  for (size_t n = 1; n < code.size(); ++n) stretch[n] = stretch[n - 1] + first[n];
  return stretch;
}

struct Register {
  static constexpr uint32_t kNone = ~0u;
  uint32_t stretch = kNone;  // in which it occurs
  uint32_t last = 0;         // instruction
  bool own = false;
  uint32_t slot = kNone;
};

}  // namespace

void share_slots(Kernel* kernel) {
  std::vector<Instruction>& code = kernel->code;
  const std::vector<uint32_t> stretch = stretches(code);
  std::vector<Register> registers(kernel->registers);
  const auto meet = [&](uint32_t slot, size_t n, bool writes) {
    if (slot >= registers.size()) return;  // a constant
    Register& r = registers[slot];
    if (r.stretch == Register::kNone) {
      r.stretch = stretch[n];
      r.own = !writes;
    }
    r.own |= r.stretch != stretch[n];
    r.last = static_cast<uint32_t>(n);
  };
  const auto each_register = [&](size_t n, auto f) {
    Instruction& i = code[n];
    const bool guarded = i.guard != Instruction::kNoGuard;
    if (guarded) f(i.guard, false);
    for (const Role turn : {Role::reads, Role::writes}) {  // what is read was there before
      each_operand(i, [&](int at, Role role) {
        if (role == turn) f(i.operand[at], role == Role::writes && !guarded);
      });
    }
  };
  for (size_t n = 0; n < code.size(); ++n) {
    each_register(n, [&](uint32_t& slot, bool writes) { meet(slot, n, writes); });
  }

  uint32_t own = 0;
  for (Register& r : registers) {
    if (r.own) r.slot = own++;
  }
  // Slots of a stretch are given out at the first write, and come back behind the last instruction.
  std::vector<uint32_t> free;
  uint32_t most = own, given = own;
  for (size_t n = 0; n < code.size(); ++n) {
    if (n > 0 && stretch[n] != stretch[n - 1]) free.clear(), given = own;
    std::vector<uint32_t> done;
    each_register(n, [&](uint32_t& slot, bool) {
      if (slot >= registers.size()) return;
      Register& r = registers[slot];
      if (r.slot == Register::kNone) {
        if (free.empty()) free.push_back(given++);
        r.slot = free.back();
        free.pop_back();
      }
      if (!r.own && r.last == n) done.push_back(r.slot);
    });
    most = std::max(most, given);
    std::sort(done.begin(), done.end());
    free.insert(free.end(), done.begin(), std::unique(done.begin(), done.end()));
  }

  const auto old = static_cast<uint32_t>(registers.size());
  for (size_t n = 0; n < code.size(); ++n) {
    each_register(n, [&](uint32_t& slot, bool) {
      slot = slot < old ? registers[slot].slot : slot - old + most;
    });
  }
  for (Special& s : kernel->specials) s.slot = s.slot - old + most;
  kernel->slots = kernel->slots - old + most;
  kernel->poisoned = own;
  kernel->registers = most;
}

}  // namespace ptx
