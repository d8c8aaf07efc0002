// Runs CUDA kernels on the CPU: fibers and their scheduler. cuda_on_cpu.h describes the model.
//
// Compile this file without sanitizers, whatever the kernels are compiled with. It tells
// AddressSanitizer and ThreadSanitizer about fibers through hooks that are null without them.
// ThreadSanitizer must not take the scheduler for synchronisation between CUDA threads. Hence
//   - switches between fibers are announced as such that synchronise nothing,
//   - barriers tell it explicitly which threads they order,
//   - no fiber allocates, frees or copies by a library function (it intercepts these), and
//   - memory of a block is freed when the launch has ended, and never passed on to another block.
#include "runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

extern "C" {
#define OPTIONAL_HOOK __attribute__((weak))
OPTIONAL_HOOK void* __tsan_get_current_fiber();
OPTIONAL_HOOK void* __tsan_create_fiber(unsigned flags);
OPTIONAL_HOOK void __tsan_destroy_fiber(void* fiber);
OPTIONAL_HOOK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
OPTIONAL_HOOK void __tsan_set_fiber_name(void* fiber, const char* name);
OPTIONAL_HOOK void __tsan_acquire(void* address);
OPTIONAL_HOOK void __tsan_release(void* address);
OPTIONAL_HOOK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t);
OPTIONAL_HOOK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t*);
}

// Where no context switch is written out below, the C library has a slower one.
#if !defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
#define EMULATION_UCONTEXT
#endif
#ifdef EMULATION_UCONTEXT
#include <ucontext.h>
#endif

namespace emulated::runtime {

const Coordinates* running = nullptr;

namespace {

constexpr uint32_t kLanes = 32;
constexpr uint64_t kPoison = ~uint64_t{0};

bool under_tsan() { return __tsan_create_fiber != nullptr; }

// What precedes release() in one thread happens before what follows acquire() in another.
struct Order {
  char address;
  void release() {
    if (__tsan_release) __tsan_release(&address);
  }
  void acquire() {
    if (__tsan_acquire) __tsan_acquire(&address);
  }
};

// A barrier is met again before all have left it. Two orders in turn keep the meetings apart.
struct MeetingOrder {
  Order orders[2];
  uint32_t meetings = 0;
  Order& now() { return orders[meetings % 2]; }
};

// Stacks and switches between them.

#ifdef EMULATION_UCONTEXT

using Registers = ucontext_t;

void prepare(Registers* registers, char* stack, size_t bytes, void (*entry)()) {
  getcontext(registers);
  registers->uc_stack.ss_sp = stack;
  registers->uc_stack.ss_size = bytes;
  registers->uc_link = nullptr;
  makecontext(registers, entry, 0);
}

void switch_registers(Registers* save, Registers* load) { swapcontext(save, load); }

#else

// The registers that a call preserves lie on the stack, below the address to return to.
using Registers = void*;
constexpr size_t kPreservedRegisters = 6;

// noipa: the compiler must not conclude from the absence of C++ that registers survive.
__attribute__((naked, noipa)) void switch_registers(Registers* /*save*/, Registers* /*load*/) {
  asm(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
  )");
}

void prepare(Registers* registers, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // the entry has no caller; this also aligns the stack as after a call
  *--top = reinterpret_cast<void*>(entry);
  top -= kPreservedRegisters;
  std::fill_n(top, kPreservedRegisters, nullptr);
  *registers = top;
}

#endif

struct Context {
  Registers registers;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* tsan_fiber = nullptr;
  void* asan_fake_stack = nullptr;
};

// AddressSanitizer and kernels of thousands of registers need much; what is not touched costs
// nothing.
constexpr size_t kStackBytes = 256 << 10;

// A stack above a page that may not be touched.
struct Stack {
  static constexpr size_t kGuard = 4096;
  char* bottom = nullptr;

  void map() {
    void* pages = mmap(nullptr, kGuard + kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages, kGuard, PROT_NONE) != 0) {
      std::fprintf(stderr, "cuda_on_cpu: no memory for the stacks of CUDA threads\n");
      _Exit(99);
    }
    bottom = static_cast<char*>(pages) + kGuard;
  }
  void unmap() {
    munmap(bottom - kGuard, kGuard + kStackBytes);
    bottom = nullptr;
  }
};

// Asynchronous copies of one thread, oldest first.
struct CopyQueue {
  static constexpr uint32_t kCapacity = 256;
  AsyncCopy copies[kCapacity];
  uint32_t first, end;
  int64_t open_group;

  void clear() {
    first = end = 0;
    open_group = 0;
  }
};

enum class Doing {
  starts,
  waits_for_block,
  waits_for_warp,
  shuffles,
  votes,
  multiplies,
  polls,
  runs,
  ended
};

const char* describe(Doing doing) {
  constexpr const char* kTexts[] = {
      "not started",  "at __syncthreads",    "at __syncwarp",
      "at a shuffle", "at a vote",           "at a multiplication of matrices",
      "polling",      "runnable, last seen", "ended"};
  return kTexts[static_cast<int>(doing)];
}

struct Block;
struct Warp;

// What every switch touches comes first, in as few cache lines as can be.
struct alignas(64) Thread {
  Context context;
  Warp* warp;
  Where where;
  Doing doing;
  Coordinates at;
  Block* block;
  Stack stack;
  CopyQueue copies;

  uint32_t bit() const { return 1u << at.lane; }
  void note(Doing what, Where line) {
    doing = what;
    where = line;
  }
};

// Lanes that meet in an operation of their warp: __syncwarp, a shuffle, a vote or a multiplication.
struct Meeting {
  uint32_t mask;
  uint32_t arrived = 0;
  uint32_t votes = 0;
  Doing operation;
  MeetingOrder order;
};

struct Warp {
  uint32_t alive = 0;
  uint32_t last_lane = kLanes - 1;  // that ran
  uint32_t index = 0;               // in Machine::runnable
  uint32_t meetings_used = 0;
  Thread* threads[kLanes] = {};

  // What the lanes bring to the meeting that they wait in, and take from it.
  uint64_t values[kLanes];
  uint64_t results[kLanes];
  uint8_t sources[kLanes];
  Factors factors[kLanes];
  Factors brought[kLanes];

  // By mask. Lanes of different masks may be in different meetings, and are not ordered by them.
  Meeting meetings[kLanes];

  bool complete(const Meeting& meeting) const {
    return meeting.arrived != 0 && (meeting.mask & alive & ~meeting.arrived) == 0;
  }
};

struct Block {
  size_t slot = 0;
  uint32_t alive = 0;
  uint32_t arrived = 0;  // at __syncthreads
  Where where;           // of the first that arrived
  MeetingOrder order;
  void* dynamic_shared = nullptr;
  std::vector<Warp> warps;
};

struct Settings {
  uint64_t seed;
  bool shuffle_threads, shuffle_blocks, starve, strict_warps;
  size_t resident;
  uint64_t spins;
  int poison;

  static long read(const char* name, long otherwise) {
    const char* text = std::getenv(name);
    return text ? std::atol(text) : otherwise;
  }
  static Settings from_environment() {
    const long shuffle = read("EMULATION_SHUFFLE", 1);
    return {.seed = static_cast<uint64_t>(read("EMULATION_SEED", 1)),
            .shuffle_threads = shuffle >= 1,
            .shuffle_blocks = shuffle >= 2,
            .starve = shuffle >= 3,
            .strict_warps = read("EMULATION_STRICT_WARPS", 0) != 0,
            .resident = static_cast<size_t>(std::max(1l, read("EMULATION_RESIDENT", 4))),
            .spins = static_cast<uint64_t>(read("EMULATION_SPINS", 20'000'000)),
            .poison = static_cast<int>(read("EMULATION_POISON", 0xFF))};
  }
};

// The launch in progress, and the threads that launches share.
struct Machine {
  std::mutex mutex;  // one launch at a time

  Settings settings;
  dim3 grid, block_dim;
  size_t shared_bytes;
  void (*kernel)(void*);
  void* argument;

  std::vector<std::unique_ptr<Block>> blocks;    // by slot; a new one when the old one has ended
  std::vector<std::unique_ptr<Thread>> threads;  // of all slots; kept for the next launch
  std::vector<uint32_t> runnable;                // by warp: lanes that are ready to run
  std::vector<void*> freed_at_end;

  Context host;
  Context* current = &host;
  Context* previous = nullptr;
  Thread* thread = nullptr;  // that runs now
  uint32_t warp = 0;         // its index in `runnable`
  uint32_t favourite = 0;    // the warp that goes first, if others may starve
  Block* ended_block = nullptr;

  uint64_t random_state;
  uint64_t polls;  // since there was progress
  Order end_of_grid;

  uint64_t random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state * 0x2545F4914F6CDD1D;
  }
};

// Never destroyed: other threads may be launching when the process ends.
Machine& machine = *new Machine;

// Reports.

void print(const uint3& p) { std::fprintf(stderr, "(%u,%u,%u)", p.x, p.y, p.z); }

void print_place(Doing doing, const Where& where) {
  std::fprintf(stderr, " %s", describe(doing));
  if (where.line != 0) std::fprintf(stderr, " %s:%u", where.file, where.line);
  std::fputc('\n', stderr);
}

bool same_line(const Where& a, const Where& b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0;
}

bool alike(const Thread& a, const Thread& b) {
  return a.block == b.block && a.doing == b.doing && same_line(a.where, b.where);
}

void print_range(const Thread& first, const Thread& last) {
  std::fprintf(stderr, "  block ");
  print(first.at.block);
  std::fprintf(stderr, &first == &last ? " thread " : " threads ");
  print(first.at.thread);
  if (&first != &last) {
    std::fprintf(stderr, " to ");
    print(last.at.thread);
  }
  print_place(first.doing, first.where);
}

// Lists the resident threads; those in succession that do the same share a line.
void print_threads() {
  std::vector<const Thread*> threads;
  for (const auto& block : machine.blocks) {
    if (block == nullptr) continue;
    for (const Warp& warp : block->warps) {
      std::copy_if(warp.threads, warp.threads + kLanes, std::back_inserter(threads),
                   [](const Thread* t) { return t != nullptr; });
    }
  }
  int lines_left = 24;
  for (size_t first = 0, end; first < threads.size() && lines_left > 0; first = end, --lines_left) {
    end = first + 1;
    while (end < threads.size() && alike(*threads[first], *threads[end])) ++end;
    print_range(*threads[first], *threads[end - 1]);
  }
  if (lines_left == 0) std::fprintf(stderr, "  (the list ends here)\n");
}

[[noreturn]] void die(const char* message) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", message);
  if (machine.thread) {
    std::fprintf(stderr, "seen by block ");
    print(machine.thread->at.block);
    std::fprintf(stderr, " thread ");
    print(machine.thread->at.thread);
    print_place(machine.thread->doing, machine.thread->where);
  }
  std::fprintf(stderr, "all threads:\n");
  print_threads();
  std::fflush(nullptr);
  _Exit(99);
}

// The scheduler.

// Every fiber calls this first when it runs (again).
void finish_switch() {
  if (!__sanitizer_finish_switch_fiber) return;
  __sanitizer_finish_switch_fiber(machine.current->asan_fake_stack, &machine.previous->stack,
                                  &machine.previous->stack_bytes);
}

void switch_to(Context& next, bool for_ever = false) {
  Context& self = *machine.current;
  machine.previous = &self;
  machine.current = &next;
  constexpr unsigned kNoSynchronisation = 1;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(next.tsan_fiber, kNoSynchronisation);
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &self.asan_fake_stack, next.stack,
                                   next.stack_bytes);
  }
  switch_registers(&self.registers, &next.registers);
  finish_switch();
}

// The first warp from `start` on, in a circle, that has a runnable lane.
bool find_runnable_warp(uint32_t start, uint32_t* warp) {
  const auto warps = static_cast<uint32_t>(machine.runnable.size());
  for (uint32_t i = 0; i < warps; ++i, ++start) {
    if (start >= warps) start = 0;
    if (machine.runnable[start] == 0) continue;
    *warp = start;
    return true;
  }
  return false;
}

// Who runs next. Lanes of one warp run in bursts, of random length if at random: their stacks are
// in the cache then.
Thread* choose_thread(bool leave_warp) {
  constexpr uint32_t kBurst = 16;
  const bool shuffle = machine.settings.shuffle_threads;
  const uint64_t random = shuffle ? machine.random() : 0;
  if (leave_warp || machine.runnable[machine.warp] == 0 || (shuffle && random % kBurst == 0)) {
    const auto any_warp = static_cast<uint32_t>((random >> 32) * machine.runnable.size() >> 32);
    const uint32_t start = machine.settings.starve ? machine.favourite
                           : shuffle               ? any_warp
                                                   : machine.warp + 1;
    if (!find_runnable_warp(start, &machine.warp)) return nullptr;
  }
  uint32_t& lanes = machine.runnable[machine.warp];
  Warp& warp = *machine.threads[machine.warp * kLanes]->warp;
  const uint32_t start = (shuffle ? random >> 8 : warp.last_lane + 1) % kLanes;
  const uint32_t lane = (start + std::countr_zero(std::rotr(lanes, start))) % kLanes;
  lanes &= ~(1u << lane);
  warp.last_lane = lane;
  return warp.threads[lane];
}

void resume(Thread* thread, bool for_ever = false) {
  machine.thread = thread;
  running = &thread->at;
  switch_to(thread->context, for_ever);
}

// Lets others run until someone makes this thread runnable, or for ever.
void wait(bool for_ever = false) {
  Thread* next = choose_thread(/*leave_warp=*/false);
  if (next == nullptr) die("dead-lock: every thread waits");
  resume(next, for_ever);
}

// Lets others run, if possible of another warp; this thread stays runnable.
void yield() {
  Thread* self = machine.thread;
  machine.runnable[self->warp->index] |= self->bit();
  machine.favourite = machine.warp + 1;
  Thread* next = choose_thread(/*leave_warp=*/true);
  if (next != self) resume(next);
}

// Meetings of threads.

// The meeting of `mask`: the pending one, or one that is free. There are as many as lanes, hence
// always a free one.
Meeting& find_meeting(Warp& warp, uint32_t mask) {
  Meeting* free = nullptr;
  for (uint32_t i = 0; i < warp.meetings_used; ++i) {
    Meeting& meeting = warp.meetings[i];
    if (meeting.mask == mask) return meeting;
    if (meeting.arrived == 0) free = &meeting;
  }
  if (warp.meetings_used < kLanes) free = &warp.meetings[warp.meetings_used++];
  free->mask = mask;
  return *free;
}

// Lanes that wait for each other in different meetings contradict each other.
void check_masks(const Warp& warp, uint32_t mask, uint32_t self) {
  if ((mask & self) == 0) die("a lane is absent from the mask of its own warp operation");
  for (uint32_t i = 0; i < warp.meetings_used; ++i) {
    const Meeting& other = warp.meetings[i];
    if (other.mask != mask && (other.mask & self) && (other.arrived & mask)) {
      die("the masks of a warp operation differ between lanes");
    }
  }
}

uint64_t result_of_lane(const Warp& warp, const Meeting& meeting, uint32_t lane) {
  if (meeting.operation == Doing::votes) return meeting.votes;
  const uint32_t source = warp.sources[lane];
  return meeting.arrived >> source & 1 ? warp.values[source] : kPoison;
}

// Hands out the results and makes all lanes that arrived runnable.
void end_meeting(Warp& warp, Meeting& meeting) {
  if (meeting.operation == Doing::multiplies) {
    if (meeting.arrived != ~0u) die("a multiplication of matrices without all lanes of the warp");
    std::memcpy(warp.brought, warp.factors, sizeof warp.brought);
  } else if (meeting.operation != Doing::waits_for_warp) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      if (meeting.arrived >> lane & 1) warp.results[lane] = result_of_lane(warp, meeting, lane);
    }
  }
  machine.runnable[warp.index] |= meeting.arrived;
  meeting.arrived = meeting.votes = 0;
  meeting.order.meetings++;
}

// The calling lane meets the others of `mask`. It has deposited what it brings, but for its vote.
uint64_t meet(Doing operation, uint32_t mask, bool vote, Where where) {
  Thread& self = *machine.thread;
  Warp& warp = *self.warp;
  self.note(operation, where);
  check_masks(warp, mask, self.bit());
  Meeting& meeting = find_meeting(warp, mask);
  if (meeting.arrived == 0) meeting.operation = operation;
  if (meeting.operation != operation) die("lanes of one warp meet in different operations");
  meeting.arrived |= self.bit();
  if (vote) meeting.votes |= self.bit();

  const bool orders = operation == Doing::waits_for_warp || !machine.settings.strict_warps;
  Order& order = meeting.order.now();
  if (orders) order.release();
  if (warp.complete(meeting)) {
    end_meeting(warp, meeting);
    machine.runnable[warp.index] &= ~self.bit();  // goes on at once
  } else {
    wait();
  }
  if (orders) order.acquire();
  self.doing = Doing::runs;
  return warp.results[self.at.lane];
}

// All threads that are alive wait at the same __syncthreads.
void complete_barrier(Block& block) {
  block.arrived = 0;
  block.order.meetings++;
  for (Warp& warp : block.warps) machine.runnable[warp.index] |= warp.alive;
}

// Threads and blocks: begin and end.

void end_thread() {
  Thread& self = *machine.thread;
  Block& block = *self.block;
  Warp& warp = *self.warp;
  machine.end_of_grid.release();
  progress();
  if (block.arrived != 0) die("a thread ends while others of its block wait at __syncthreads");
  self.doing = Doing::ended;
  block.alive--;
  warp.alive &= ~self.bit();
  for (uint32_t i = 0; i < warp.meetings_used; ++i) {
    if (warp.complete(warp.meetings[i])) end_meeting(warp, warp.meetings[i]);
  }

  if (block.alive != 0) wait(/*for_ever=*/true);
  machine.ended_block = &block;
  machine.thread = nullptr;
  running = nullptr;
  switch_to(machine.host, /*for_ever=*/true);
}

void thread_entry() {
  finish_switch();
  machine.thread->doing = Doing::runs;
  machine.kernel(machine.argument);
  end_thread();
  __builtin_unreachable();
}

uint3 unravel(uint32_t index, const dim3& size) {
  return {index % size.x, index / size.x % size.y, index / size.x / size.y};
}

// Threads of one lane number would touch the same cache sets if all stacks began alike.
size_t stack_offset(uint32_t index) { return index % 37 * 128; }

void start_fiber(Thread& thread, uint32_t index) {
  if (thread.stack.bottom == nullptr) thread.stack.map();
  Context& context = thread.context;
  context.stack = thread.stack.bottom;
  context.stack_bytes = kStackBytes;
  context.asan_fake_stack = nullptr;
  prepare(&context.registers, thread.stack.bottom, kStackBytes - stack_offset(index), thread_entry);
  if (!under_tsan()) return;
  context.tsan_fiber = __tsan_create_fiber(0);
  char name[100];
  const uint3& b = thread.at.block;
  const uint3& t = thread.at.thread;
  std::snprintf(name, sizeof name, "block (%u,%u,%u) thread (%u,%u,%u)", b.x, b.y, b.z, t.x, t.y,
                t.z);
  __tsan_set_fiber_name(context.tsan_fiber, name);
}

// A new thread must find neither the clock of an older fiber nor its traces on the stack, or
// ThreadSanitizer would take the two for ordered, or for racing.
void end_fiber(Thread& thread) {
  if (!under_tsan()) return;
  __tsan_destroy_fiber(thread.context.tsan_fiber);
  thread.stack.unmap();
}

void* poisoned_memory(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes) != 0) die("no memory for dynamic shared memory");
  std::memset(memory, machine.settings.poison, bytes);
  return memory;
}

void start_block(size_t slot, uint32_t block_index) {
  const dim3 size = machine.block_dim;
  const uint32_t threads = size.x * size.y * size.z;
  const uint32_t warps = (threads + kLanes - 1) / kLanes;
  machine.blocks[slot] = std::make_unique<Block>();
  Block& block = *machine.blocks[slot];
  block.slot = slot;
  block.alive = threads;
  block.dynamic_shared = poisoned_memory(machine.shared_bytes);
  block.warps.resize(warps);
  for (uint32_t i = 0; i < threads; ++i) {
    const uint32_t warp_index = static_cast<uint32_t>(slot) * warps + i / kLanes;
    Warp& warp = block.warps[i / kLanes];
    Thread& thread = *machine.threads[warp_index * kLanes + i % kLanes];
    thread.at = {.lane = static_cast<int>(i % kLanes),
                 .dynamic_shared = block.dynamic_shared,
                 .thread = unravel(i, size),
                 .block = unravel(block_index, machine.grid),
                 .block_dim = size,
                 .grid_dim = machine.grid};
    thread.block = &block;
    thread.warp = &warp;
    thread.note(Doing::starts, {});
    thread.copies.clear();
    warp.threads[thread.at.lane] = &thread;
    warp.index = warp_index;
    warp.alive |= thread.bit();
    machine.runnable[warp_index] |= thread.bit();
    start_fiber(thread, warp_index * kLanes + i % kLanes);
  }
}

void end_block(size_t slot) {
  Block& block = *machine.blocks[slot];
  for (Warp& warp : block.warps) {
    for (Thread* thread : warp.threads) {
      if (thread) end_fiber(*thread);
    }
  }
  if (under_tsan()) {
    machine.freed_at_end.push_back(block.dynamic_shared);
  } else {
    std::free(block.dynamic_shared);
  }
  machine.blocks[slot].reset();
}

std::vector<uint32_t> order_of_blocks() {
  std::vector<uint32_t> order(size_t{machine.grid.x} * machine.grid.y * machine.grid.z);
  std::iota(order.begin(), order.end(), 0u);
  if (machine.settings.shuffle_blocks) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[machine.random() % i]);
  }
  return order;
}

void prepare_machine(size_t resident) {
  const uint32_t threads = machine.block_dim.x * machine.block_dim.y * machine.block_dim.z;
  const size_t warps = resident * ((threads + kLanes - 1) / kLanes);
  machine.blocks.resize(resident);
  machine.runnable.assign(warps, 0);
  while (machine.threads.size() < warps * kLanes) {
    machine.threads.push_back(std::unique_ptr<Thread>(new Thread));
  }
  machine.host.tsan_fiber = under_tsan() ? __tsan_get_current_fiber() : nullptr;
  machine.warp = static_cast<uint32_t>(warps) - 1;  // the first comes next
  machine.polls = 0;
}

void run_grid() {
  const std::vector<uint32_t> order = order_of_blocks();
  const size_t resident = std::min(order.size(), machine.settings.resident);
  prepare_machine(resident);
  size_t started = 0;
  for (; started < resident; ++started) start_block(started, order[started]);
  for (size_t ended = 0; ended < order.size(); ++ended) {
    resume(choose_thread(/*leave_warp=*/false));  // returns when a block has ended
    const size_t slot = machine.ended_block->slot;
    end_block(slot);
    if (started < order.size()) start_block(slot, order[started++]);
  }
  machine.end_of_grid.acquire();
  for (void* memory : machine.freed_at_end) std::free(memory);
  machine.freed_at_end.clear();
}

// As the CUDA Programming Guide has it, but for grids of more blocks than we would count.
bool launchable(const dim3& grid, const dim3& block) {
  constexpr unsigned kMostAlongYZ = 65535, kMostThreads = 1024, kMostAlongZ = 64;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return blocks > 0 && blocks <= INT32_MAX && grid.y <= kMostAlongYZ && grid.z <= kMostAlongYZ &&
         threads > 0 && threads <= kMostThreads && block.z <= kMostAlongZ;
}

}  // namespace

// The services, as cuda_on_cpu.h declares them.

void sync_block(Where where) {
  Thread& self = *machine.thread;
  Block& block = *self.block;
  self.note(Doing::waits_for_block, where);
  const dim3& size = machine.block_dim;
  if (block.alive != size.x * size.y * size.z) die("__syncthreads after a thread has ended");
  if (block.arrived == 0) block.where = where;
  if (!same_line(block.where, where)) die("divergent __syncthreads: threads wait at two lines");
  Order& order = block.order.now();
  order.release();
  if (++block.arrived < block.alive) {
    wait();
  } else {
    complete_barrier(block);
    machine.runnable[self.warp->index] &= ~self.bit();  // goes on at once
  }
  order.acquire();
  self.doing = Doing::runs;
}

void sync_warp(uint32_t mask, Where where) {
  meet(Doing::waits_for_warp, mask, /*vote=*/false, where);
}

uint64_t shuffle(uint32_t mask, uint64_t value, int source_lane, Where where) {
  const Thread& self = *machine.thread;
  self.warp->values[self.at.lane] = value;
  self.warp->sources[self.at.lane] = static_cast<uint8_t>(source_lane % static_cast<int>(kLanes));
  return meet(Doing::shuffles, mask, /*vote=*/false, where);
}

uint32_t ballot(uint32_t mask, bool vote, Where where) {
  return static_cast<uint32_t>(meet(Doing::votes, mask, vote, where));
}

// What it returns stays until all lanes have come to the next one.
const Factors* bring(const Factors& mine, Where where) {
  const Thread& self = *machine.thread;
  self.warp->factors[self.at.lane] = mine;
  meet(Doing::multiplies, ~0u, /*vote=*/false, where);
  return self.warp->brought;
}

void scheduling_point() {
  if (machine.settings.shuffle_threads && machine.random() % 4 == 0) yield();
}

void poll(Where where) {
  machine.thread->note(Doing::polls, where);
  if (++machine.polls > machine.settings.spins) {
    die("dead-lock: threads poll, and nothing that they could wait for changes");
  }
  yield();
  machine.thread->doing = Doing::runs;
}

void progress() { machine.polls = 0; }

void fail(const char* message, Where where) {
  machine.thread->note(Doing::runs, where);
  die(message);
}

void queue_copy(AsyncCopy copy, Where where) {
  CopyQueue& queue = machine.thread->copies;
  if (queue.end - queue.first == CopyQueue::kCapacity) {
    fail("more asynchronous copies pending than CopyQueue::kCapacity", where);
  }
  copy.group = queue.open_group;
  queue.copies[queue.end++ % CopyQueue::kCapacity] = copy;
}

void commit_copies() { machine.thread->copies.open_group++; }

bool take_copy(int pending_groups, AsyncCopy* copy) {
  CopyQueue& queue = machine.thread->copies;
  if (queue.first == queue.end) return false;
  const AsyncCopy& oldest = queue.copies[queue.first % CopyQueue::kCapacity];
  if (oldest.group >= queue.open_group - pending_groups) return false;
  *copy = oldest;
  queue.first++;
  return true;
}

int resident_blocks() {
  const Settings settings = Settings::from_environment();
  return static_cast<int>(
      Settings::read("EMULATION_CLAIMED", static_cast<long>(settings.resident)));
}

int poison() { return machine.settings.poison; }

bool launch(dim3 grid, dim3 block, size_t shared_bytes, void (*thread)(void*), void* argument,
            bool together) {
  if (!launchable(grid, block)) return false;
  const std::lock_guard lock(machine.mutex);
  machine.settings = Settings::from_environment();
  if (together) machine.settings.resident = static_cast<size_t>(resident_blocks());
  machine.random_state = (machine.settings.seed * 0x9E3779B97F4A7C15) | 1;
  machine.grid = grid;
  machine.block_dim = block;
  machine.shared_bytes = shared_bytes;
  machine.kernel = thread;
  machine.argument = argument;
  run_grid();
  return true;
}

}  // namespace emulated::runtime
