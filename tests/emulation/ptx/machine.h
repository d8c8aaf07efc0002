// A machine for PTX: what an instruction is, and what it sees of the thread that executes it.
//
// Compilers emit PTX for a virtual machine, and this is one. program.cpp reads the text of a module
// and decodes every instruction into a function and the numbers of its operands. A CUDA thread is a
// fiber of ../runtime.cpp that runs these functions one after the other (run, below). Nothing is
// compiled for a kernel, so a mistake that is planted into its text is tried within a second.
//
// The files, from the text to the numbers:
//   program.h    text -> kernels; a form of instruction that nobody described stops the reading
//   forms.h      the table of all forms that are known: "add.s32" and what executes it
//   forms_*.cpp  its rows: arithmetic, conversions, memory, threads
//   registers.h  registers share slots
//   number.h     the functions behind them: rounding, comparing, shifting
//   memory.h     the state spaces, and what makes an access a fault
//   access.h     the loads and stores themselves, which ThreadSanitizer sees
//   launch.h     a grid of a kernel; what Python calls
//   cuda_runtime.cpp  in place of the CUDA runtime, for host code that nvcc compiled
//
// What is not modelled: ptxas, which schedules, allocates registers, and may fuse a product and a
// sum that have no rounding of their own; the accuracy of ex2, lg2, rcp and their like, exact here;
// the order in which tensor cores add; weak memory, for which ThreadSanitizer stands; local memory,
// functions, textures, clusters, TMA and wgmma, which the project's kernels do not use.
#pragma once

#include <bit>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "../runtime.h"

namespace ptx {

using emulated::Where;
namespace runtime = emulated::runtime;

struct Thread;
struct Instruction;
using Execute = void (*)(Thread&, const Instruction&);

// Registers, constants and special registers all lie in slots of 64 bits; an operand is the number
// of one. Only labels (the index of an instruction) and immediates that select what an instruction
// does are numbers themselves.
struct Instruction {
  static constexpr uint32_t kNoGuard = ~0u;

  Execute execute;
  const char* kinds = "";     // of its operands (forms.h)
  uint32_t line;              // of the text
  uint32_t guard = kNoGuard;  // the predicate under which it is executed
  bool unless = false;        // or, with @!, is not
  uint32_t operand[16] = {};

  uint32_t operator[](int i) const { return operand[i]; }
};

struct Parameter {
  uint64_t offset, size;
};

// A special register, such as %tid.x, and the slot that holds it.
struct Special {
  uint32_t slot;
  uint64_t (*read)();
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  uint64_t parameter_bytes = 0;
  uint64_t static_shared = 0;
  uint32_t fewest_threads = 1, most_threads = 1024;  // of a block
  uint32_t registers = 0;  // slots 0 to registers - 1; the constants follow
  uint32_t poisoned = 0;   // so many of them may be read before they are written
  std::vector<uint64_t> constants;
  std::vector<Special> specials;
  uint32_t slots = 0;
  std::vector<Instruction> code;
};

struct Launch {
  const Kernel* kernel;
  const char* parameters;
  uint64_t shared_bytes;
  uint64_t most_jumps;  // backwards, of a thread: beyond, it runs for ever
};

// The unsigned integer of so many bytes.
template <int bytes>
using Bits = std::conditional_t<
    bytes == 1, uint8_t,
    std::conditional_t<bytes == 2, uint16_t, std::conditional_t<bytes == 4, uint32_t, uint64_t>>>;

struct Thread {
  const Launch& launch;
  uint64_t* slots;
  uint32_t next = 0;  // instruction
  bool ended = false;
  uint64_t jumps = 0;

  // A register as a T. Instructions decide what its bits mean.
  template <class T>
  T get(uint32_t slot) const {
    if constexpr (std::is_same_v<T, bool>) {
      return slots[slot] & 1;
    } else {
      return std::bit_cast<T>(static_cast<Bits<sizeof(T)>>(slots[slot]));
    }
  }
  // Registers wider than T get its sign, if T has one, or zeros.
  template <class T>
  void set(uint32_t slot, T x) {
    if constexpr (std::is_integral_v<T>) {
      slots[slot] = static_cast<uint64_t>(x);
    } else {
      slots[slot] = std::bit_cast<Bits<sizeof(T)>>(x);
    }
  }

  const Instruction& instruction() const { return launch.kernel->code[next - 1]; }
  Where where() const { return {launch.kernel->name.c_str(), instruction().line}; }
  // Ends the process with a report.
  [[noreturn]] void fail(const char* message) const { runtime::fail(message, where()); }
};

}  // namespace ptx
