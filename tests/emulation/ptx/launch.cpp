#include "launch.h"

#include <alloca.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>

#include "forms.h"
#include "memory.h"
#include "program.h"

namespace ptx {
namespace {

// Made when the first module is loaded, which may be before main, and never destroyed: other
// threads may be launching when the process ends.
auto& kernels() {
  static auto& made = *new std::map<std::string, std::unique_ptr<Kernel>, std::less<>>;
  return made;
}

uint64_t setting(const char* name, uint64_t otherwise) {
  const char* const text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

// What one thread does, from its first instruction to its last.
void run(void* argument) {
  const Launch& launch = *static_cast<const Launch*>(argument);
  const Kernel& kernel = *launch.kernel;
  auto* const slots = static_cast<uint64_t*>(alloca(kernel.slots * sizeof(uint64_t)));
  std::memset(slots, runtime::poison(), kernel.poisoned * sizeof(uint64_t));
  std::copy(kernel.constants.begin(), kernel.constants.end(), slots + kernel.registers);
  for (const Special& s : kernel.specials) slots[s.slot] = s.read();
  Thread thread{launch, slots};
  const Instruction* const code = kernel.code.data();
  while (!thread.ended) {
    const Instruction& i = code[thread.next++];
    if (i.guard != Instruction::kNoGuard && thread.get<bool>(i.guard) == i.unless) continue;
    i.execute(thread, i);
  }
}

}  // namespace

void load_module(std::string_view text) {
  for (Kernel& kernel : read_module(text)) {
    const std::string name = kernel.name;
    kernels()[name] = std::make_unique<Kernel>(std::move(kernel));
  }
}

const Kernel* find_kernel(std::string_view name) {
  const auto found = kernels().find(name);
  return found == kernels().end() ? nullptr : found->second.get();
}

bool launch(const Kernel& kernel, emulated::dim3 grid, emulated::dim3 block,
            uint64_t dynamic_shared, void** values, bool together) {
  const uint32_t threads = block.x * block.y * block.z;
  if (threads < kernel.fewest_threads || threads > kernel.most_threads) return false;
  // In words, so that the first parameter is aligned to 16 bytes.
  const auto memory =
      std::make_unique<std::max_align_t[]>(kernel.parameter_bytes / sizeof(std::max_align_t) + 1);
  auto* const parameters = reinterpret_cast<char*>(memory.get());
  for (size_t i = 0; i < kernel.parameters.size(); ++i) {
    const Parameter& p = kernel.parameters[i];
    std::memcpy(parameters + p.offset, values[i], p.size);
  }
  Launch call{&kernel, parameters, kernel.static_shared + dynamic_shared,
              setting("EMULATION_SPINS", 20'000'000)};
  take_stock();
  return runtime::launch(grid, block, with_marks(call.shared_bytes), run, &call, together);
}

}  // namespace ptx

extern "C" {

// ThreadSanitizer asks for the name of an instruction (access.cpp).
void __tsan_symbolize_external_ex(uint64_t place,
                                  void (*add_frame)(void* of, const char* function,
                                                    const char* file, int line, int column),
                                  void* of) {
  const auto* const at = reinterpret_cast<const ptx::Instruction*>(place & ((1ull << 60) - 1));
  for (const auto& [name, kernel] : ptx::kernels()) {
    const std::vector<ptx::Instruction>& code = kernel->code;
    if (code.data() <= at && at < code.data() + code.size()) {
      add_frame(of, name.c_str(), "PTX", static_cast<int>(at->line), 0);
    }
  }
}

// For Python:

// Null, or what is wrong.
const char* ptx_load(const char* text) {
  static std::string message;
  try {
    ptx::load_module(text);
    return nullptr;
  } catch (const ptx::Unknown& unknown) {
    message = unknown.what();
    return message.c_str();
  }
}

// Of a kernel, or -1 if there is none of this name.
int ptx_parameters(const char* name) {
  const ptx::Kernel* const kernel = ptx::find_kernel(name);
  return kernel ? static_cast<int>(kernel->parameters.size()) : -1;
}

// 0 if it ran.
int ptx_launch(const char* name, const unsigned* grid, const unsigned* block,
               uint64_t dynamic_shared, void** values) {
  const ptx::Kernel* const kernel = ptx::find_kernel(name);
  if (kernel == nullptr) return 1;
  const emulated::dim3 blocks(grid[0], grid[1], grid[2]), threads(block[0], block[1], block[2]);
  return ptx::launch(*kernel, blocks, threads, dynamic_shared, values) ? 0 : 2;
}

void ptx_allocated(void* p, uint64_t bytes) { ptx::allocated(p, bytes); }
void ptx_freed(void* p) { ptx::freed(p); }

// "name operands" of all forms that are known, a line each.
const char* ptx_forms() {
  static const std::string all = [] {
    std::string text;
    for (const auto& [name, forms] : ptx::known_forms().all()) {
      for (const ptx::Form& form : forms) text += name + " " + form.operands + "\n";
    }
    return text;
  }();
  return all.c_str();
}
}
