// SPDX-License-Identifier: Apache-2.0
#include "simt/simt.h"

#include <signal.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "simt/machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace mosaic::simt {

Machine* machine = nullptr;

namespace {

std::string last_error;
uint64_t chosen_seed = 0;
int chosen_resident = 3;

// Stacks outlive launches: mapping one costs more than most kernels here.
std::vector<std::unique_ptr<GuardedMemory>> all_stacks;

unsigned char* take_stack() {
  if (machine->free_stacks.empty()) {
    all_stacks.push_back(std::make_unique<GuardedMemory>(kStackBytes));
    machine->free_stacks.push_back(all_stacks.back()->start());
  }
  unsigned char* stack = machine->free_stacks.back();
  machine->free_stacks.pop_back();
  return stack;
}

std::string name(const uint3& block) {
  return "block (" + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
         std::to_string(block.z) + ")";
}

void make_runnable(Fiber* fiber) {
  fiber->waits_for = nullptr;
  machine->runnable.push_back(fiber);
}

// Back to the scheduler until somebody makes this fiber runnable.
void block_current() {
  if (_setjmp(machine->current->resume) == 0) _longjmp(machine->scheduler, 1);
}

}  // namespace

void make_runnable(std::vector<Fiber*>& fibers) {
  for (Fiber* fiber : fibers) make_runnable(fiber);
  fibers.clear();
}

void wait_for(std::vector<Fiber*>& queue, const char* what, unsigned number, unsigned detail) {
  Fiber* self = machine->current;
  self->waits_for = what;
  self->number = number;
  self->detail = detail;
  queue.push_back(self);
  block_current();
}

namespace {

void fiber_main() {
  (*machine->body)();
  Fiber* self = machine->current;
  Block& block = *self->block;
  for (const auto& meetings : block.meetings) {
    const int first = static_cast<int>(&meetings - block.meetings.data()) * kLanes;
    for (const Meeting& m : meetings) {
      const int place = self->thread - first;
      if (place >= 0 && place < m.count && (m.mask >> (place % kLanes) & 1))
        fail("ends while others wait for it at %s", m.what);
    }
  }
  self->done = true;
  --block.alive;
  _longjmp(machine->scheduler, 1);
}

void resume(Fiber* fiber) {
  machine->current = fiber;
  threadIdx = {static_cast<unsigned>(fiber->thread), 0, 0};
  blockIdx = fiber->block->index;
  if (_setjmp(machine->scheduler) == 0) {
    if (fiber->started) _longjmp(fiber->resume, 1);
    fiber->started = true;
    getcontext(&fiber->entry);
    fiber->entry.uc_stack = {};
    fiber->entry.uc_stack.ss_sp = fiber->stack;
    fiber->entry.uc_stack.ss_size = kStackBytes;
    fiber->entry.uc_link = nullptr;
    makecontext(&fiber->entry, fiber_main, 0);
    setcontext(&fiber->entry);
  }
  machine->current = nullptr;
  if (machine->failed) throw Failure();
}

void on_signal(int signal, siginfo_t* info, void*) {
  if (machine == nullptr || machine->current == nullptr) {
    ::signal(signal, SIG_DFL);
    return;
  }
  if (signal == SIGSEGV || signal == SIGBUS) fail("memory fault at %p", info->si_addr);
  fail("undefined behaviour: an overflow, a shift by too much, a null or misaligned pointer");
}

// Faults and traps of the kernel become failures for as long as this lives.
class SignalHandler {
 public:
  SignalHandler() : stack_(4 * kStackBytes) {
    stack_t own = {};
    own.ss_sp = stack_.start();
    own.ss_size = 4 * kStackBytes;
    sigaltstack(&own, &stack_before_);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~SignalHandler() {
    for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &before_[i], nullptr);
    sigaltstack(&stack_before_, nullptr);
  }
  SignalHandler(const SignalHandler&) = delete;
  SignalHandler& operator=(const SignalHandler&) = delete;

 private:
  static constexpr std::array kSignals = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  GuardedMemory stack_;
  stack_t stack_before_;
  std::array<struct sigaction, kSignals.size()> before_;
};

void start_block(uint3 index, int threads, int shared_bytes) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->alive = threads;
  block->shared_bytes = static_cast<uint32_t>(shared_bytes);
  const uint32_t room = (block->shared_bytes + 127) / 128 * 128;
  block->memory = std::make_unique<GuardedMemory>(room);
  block->shared = block->memory->end() - room;
  std::memset(block->shared, kPoison, room);
  block->in_flight.resize(room / kCopyUnit);
  block->unfenced.resize(room / kCopyUnit);
  block->meetings.resize(static_cast<size_t>((threads + kLanes - 1) / kLanes));
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = block->fibers.emplace_back();
    fiber.block = block.get();
    fiber.thread = t;
    fiber.stack = take_stack();
    machine->runnable.push_back(&fiber);
  }
  std::shuffle(machine->runnable.end() - threads, machine->runnable.end(), machine->random);
  machine->blocks.push_back(std::move(block));
}

void end_block(Block* block) {
  if (block->effects > 0) {
    last_error = name(block->index) + " ended before " + std::to_string(block->effects) +
                 " of its asynchronous copies or arrivals";
    throw Failure();
  }
  for (const Fiber& fiber : block->fibers) machine->free_stacks.push_back(fiber.stack);
  const auto found = std::find_if(machine->blocks.begin(), machine->blocks.end(),
                                  [&](const auto& b) { return b.get() == block; });
  machine->blocks.erase(found);
}

void one_effect() {
  auto& effects = machine->effects;
  std::swap(effects[machine->draw(effects.size())], effects.back());
  const Effect effect = std::move(effects.back());
  effects.pop_back();
  --effect.block->effects;
  effect.run();
}

Fiber* next_fiber() {
  auto& runnable = machine->runnable;
  if (machine->draw(16) >= machine->sticking)
    std::swap(runnable[machine->draw(runnable.size())], runnable.back());
  Fiber* fiber = runnable.back();
  runnable.pop_back();
  return fiber;
}

std::string reason(const Block& block, const Fiber& fiber) {
  char text[200];
  std::snprintf(text, sizeof text, fiber.waits_for, fiber.number, fiber.detail);
  const auto barrier = block.barriers.find(fiber.number);
  if (std::strstr(fiber.waits_for, "mbarrier") == nullptr || barrier == block.barriers.end()) return text;
  const TransactionBarrier& b = barrier->second;
  return std::string(text) + " (in phase " + std::to_string(b.phase) + ": " + std::to_string(b.pending) +
         " of " + std::to_string(b.count) + " arrivals and " + std::to_string(b.bytes) + " bytes missing)";
}

// What the threads that still live wait for.
std::string deadlock() {
  std::string text = "deadlock:";
  for (const auto& block : machine->blocks) {
    std::map<std::string, std::string> threads;  // by reason
    const auto& fibers = block->fibers;
    for (size_t i = 0, end; i < fibers.size(); i = end) {
      end = i + 1;
      if (fibers[i].done) continue;
      const std::string why = reason(*block, fibers[i]);
      while (end < fibers.size() && !fibers[end].done && reason(*block, fibers[end]) == why) ++end;
      threads[why] += " " + std::to_string(i) + (end - i > 1 ? "-" + std::to_string(end - 1) : "");
    }
    for (const auto& [why, who] : threads)
      text += "\n  " + name(block->index) + " at " + why + ": threads" + who;
  }
  return text;
}

void schedule(Extent grid, int threads, int shared_bytes) {
  std::vector<uint3> waiting;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) waiting.push_back({x, y, z});
  std::shuffle(waiting.begin(), waiting.end(), machine->random);
  while (!waiting.empty() || !machine->blocks.empty()) {
    while (!waiting.empty() && static_cast<int>(machine->blocks.size()) < chosen_resident) {
      start_block(waiting.back(), threads, shared_bytes);
      waiting.pop_back();
    }
    if (!machine->effects.empty() && (machine->runnable.empty() || machine->draw(machine->landing) == 0)) {
      one_effect();
      continue;
    }
    if (machine->runnable.empty()) {
      last_error = deadlock();
      throw Failure();
    }
    Fiber* fiber = next_fiber();
    resume(fiber);
    if (fiber->done && fiber->block->alive == 0) end_block(fiber->block);
  }
}

}  // namespace

bool run_grid(Extent grid, int threads, int shared_bytes, const std::function<void()>& body) {
  Machine own;
  own.body = &body;
  own.random.seed(chosen_seed);
  constexpr unsigned kLanding[] = {1, 2, 16, 1u << 30};  // as soon as may be .. only when nobody can run
  constexpr unsigned kSticking[] = {0, 8, 15, 16};
  own.landing = kLanding[own.draw(4)];
  own.sticking = kSticking[own.draw(4)];
  for (const auto& stack : all_stacks) own.free_stacks.push_back(stack->start());
  gridDim = {grid.x, grid.y, grid.z};
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  machine = &own;
  const SignalHandler handler;
  bool ok = true;
  try {
    schedule(grid, threads, shared_bytes);
  } catch (const Failure&) {
    ok = false;
  }
  machine = nullptr;
  return ok;
}

const char* error() { return last_error.c_str(); }
void set_seed(uint64_t seed) { chosen_seed = seed; }
void set_resident_blocks(int blocks) { chosen_resident = std::max(1, blocks); }

void fail(const char* format, ...) {
  char text[300];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const Fiber* self = machine->current;
  if (self == nullptr) {
    last_error = text;
    throw Failure();
  }
  last_error = name(self->block->index) + " thread " + std::to_string(self->thread) + ": " + text;
  machine->failed = true;
  _longjmp(machine->scheduler, 1);
}

void step() {
  if (machine->draw(16) != 0) return;
  auto& runnable = machine->runnable;
  runnable.push_back(machine->current);
  std::swap(runnable[machine->draw(runnable.size())], runnable.back());
  block_current();
}

int thread_number() { return machine->current->thread; }

void* const* arrive(const char* what, int first, int count, uint32_t mask, void* lane) {
  Fiber* self = machine->current;
  Block& block = *self->block;
  const int place = self->thread - first;
  if (!(mask >> (place % kLanes) & 1)) fail("%s: the mask %08x leaves out the caller", what, mask);
  auto& meetings = block.meetings[static_cast<size_t>(first / kLanes)];
  auto meeting =
      std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& m) { return (m.mask & mask) != 0; });
  if (meeting == meetings.end()) {
    int members = 0;
    for (int t = 0; t < count; ++t) {
      if (!(mask >> (t % kLanes) & 1)) continue;
      ++members;
      if (first + t >= static_cast<int>(block.fibers.size()) || block.fibers[first + t].done)
        fail("%s: thread %d, which it takes, does not run", what, first + t);
    }
    meetings.push_back({what, count, mask, members, std::vector<void*>(count), {}});
    meeting = meetings.end() - 1;
  }
  if (std::strcmp(meeting->what, what) != 0 || meeting->mask != mask || meeting->count != count) {
    fail("%s (mask %08x) while other threads of the warp wait at %s (mask %08x)", what, mask, meeting->what,
         meeting->mask);
  }
  meeting->lanes[static_cast<size_t>(place)] = lane;
  if (--meeting->missing == 0) return meeting->lanes.data();
  wait_for(meeting->waiting, what, 0, 0);
  return nullptr;
}

void depart(int first, int, uint32_t mask) {
  auto& meetings = own_block().meetings[static_cast<size_t>(first / kLanes)];
  const auto meeting =
      std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& m) { return m.mask == mask; });
  make_runnable(meeting->waiting);
  meetings.erase(meeting);
}

void sync_block(int id, int threads) {
  Block& block = own_block();
  const int all = static_cast<int>(block.fibers.size());
  if (threads == 0) threads = all;
  if (id < 0 || id > 15) fail("bar.sync %d: barriers are 0 to 15", id);
  if ((threads != all && threads % kLanes != 0) || threads > all)
    fail("bar.sync %d, %d in a block of %d threads", id, threads, all);
  NamedBarrier& b = block.named[id];
  if (b.missing == 0) b.threads = b.missing = threads;
  if (b.threads != threads) fail("bar.sync %d, %d while others wait with %d", id, threads, b.threads);
  if (--b.missing == 0) {
    make_runnable(b.waiting);
  } else {
    wait_for(b.waiting, "bar.sync %u, %u", static_cast<unsigned>(id), static_cast<unsigned>(threads));
  }
}

}  // namespace mosaic::simt
