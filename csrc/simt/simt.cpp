// SPDX-License-Identifier: Apache-2.0
#include "simt/simt.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "simt/cuda.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace mosaic::simt {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 16 * kPage;
constexpr uint32_t kCopyUnit = 16;
constexpr unsigned char kPoison = 0xff;                // NaN in fp32, bf16 and fp16
constexpr uint64_t kBarrierWord = 0x6d62617272696572;  // lies where a barrier does, to see it overwritten
constexpr int64_t kMostBytes = (1 << 20) - 1;          // that a barrier can have outstanding

// Memory that ends at a page that may not be touched.
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t bytes) : bytes_((bytes + kPage - 1) / kPage * kPage) {
    void* p = mmap(nullptr, bytes_ + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    start_ = static_cast<unsigned char*>(p) + kPage;
    mprotect(start_ - kPage, kPage, PROT_NONE);
    mprotect(start_ + bytes_, kPage, PROT_NONE);
  }
  ~GuardedMemory() { munmap(start_ - kPage, bytes_ + 2 * kPage); }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  unsigned char* start() const { return start_; }
  unsigned char* end() const { return start_ + bytes_; }

 private:
  size_t bytes_;
  unsigned char* start_;
};

struct Block;

struct Fiber {
  Block* block;
  int thread;
  unsigned char* stack;
  ucontext_t entry;
  jmp_buf resume;
  bool started = false, done = false;
  const char* waits_for = nullptr;  // with its two numbers
  unsigned number = 0, detail = 0;
  uint64_t copies = 0;                                      // issued without a barrier
  std::set<uint64_t> flying;                                // of those, in flight
  std::deque<std::pair<uint64_t, uint32_t>> arrivals = {};  // (copies before it, barrier)
  std::vector<uint32_t> unfenced;                           // units that it stored to since its last fence
};

struct Meeting {
  const char* what;
  int count;
  uint32_t mask;
  int missing;
  std::vector<void*> lanes;
  std::vector<Fiber*> waiting;
};

struct NamedBarrier {
  int threads = 0, missing = 0;
  std::vector<Fiber*> waiting;
};

struct TransactionBarrier {
  int count, pending;
  int64_t bytes = 0;
  uint64_t phase = 0;
  std::vector<Fiber*> waiting = {};
};

struct Block {
  uint3 index;
  std::deque<Fiber> fibers;
  int alive;
  std::unique_ptr<GuardedMemory> memory;
  unsigned char* shared;
  uint32_t shared_bytes;
  std::vector<unsigned char> in_flight;  // for each 16 bytes: a copy to them is
  std::vector<uint16_t> unfenced;        // the same: the thread that stored to them and did not fence, + 1
  std::vector<std::vector<Meeting>> meetings;  // by the warp they begin with
  std::map<int, NamedBarrier> named;
  std::map<uint32_t, TransactionBarrier> barriers;
  int effects = 0;  // of `later`, not there yet
};

struct Effect {
  Block* block;
  std::function<void()> run;
};

struct Failure {};

struct Machine {
  const std::function<void()>* body;
  std::mt19937_64 random;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Fiber*> runnable;
  std::vector<Effect> effects;
  std::vector<unsigned char*> free_stacks;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  bool failed = false;
  // drawn once for each launch
  unsigned landing;   // one chance in so many that an effect comes at a step
  unsigned sticking;  // so many in 16 that the fiber that became runnable last goes on

  uint64_t draw(uint64_t below) { return random() % below; }
};

Machine* machine = nullptr;
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

void make_runnable(std::vector<Fiber*>& fibers) {
  for (Fiber* fiber : fibers) make_runnable(fiber);
  fibers.clear();
}

// Back to the scheduler until somebody makes this fiber runnable.
void block_current() {
  if (_setjmp(machine->current->resume) == 0) _longjmp(machine->scheduler, 1);
}

void wait_for(std::vector<Fiber*>& queue, const char* what, unsigned number, unsigned detail) {
  Fiber* self = machine->current;
  self->waits_for = what;
  self->number = number;
  self->detail = detail;
  queue.push_back(self);
  block_current();
}

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

Block& own_block() { return *machine->current->block; }

TransactionBarrier& barrier_at(Block& block, uint32_t address) {
  const auto found = block.barriers.find(address);
  if (found == block.barriers.end()) fail("there is no mbarrier at %u", address);
  if (std::memcmp(block.shared + (address - kSharedBase), &kBarrierWord, 8) != 0)
    fail("the mbarrier at %u was overwritten", address);
  return found->second;
}

void settle(TransactionBarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  ++b.phase;
  b.pending = b.count;
  make_runnable(b.waiting);
}

void arrive_on(Block& block, uint32_t address, int64_t announced) {
  TransactionBarrier& b = barrier_at(block, address);
  if (b.pending == 0) fail("more arrivals at the mbarrier at %u than the %d it counts", address, b.count);
  b.bytes += announced;
  if (b.bytes > kMostBytes) fail("more bytes outstanding at the mbarrier at %u than it can count", address);
  --b.pending;
  settle(b);
}

void land(Block& block, uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  std::memcpy(block.shared + (to - kSharedBase), from, bytes);
  const uint32_t first = (to - kSharedBase) / kCopyUnit;
  for (uint32_t i = 0; i < bytes / kCopyUnit; ++i) block.in_flight[first + i] = 0;
  if (barrier == 0) return;
  TransactionBarrier& b = barrier_at(block, barrier);
  b.bytes -= bytes;
  if (b.bytes < -kMostBytes) fail("more bytes landed at the mbarrier at %u than it can count", barrier);
  settle(b);
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

unsigned char* shared_start() { return own_block().shared; }

unsigned char* shared_bytes_at(uint32_t address, uint32_t bytes, uint32_t alignment) {
  const Block& block = own_block();
  if (address % alignment != 0) fail("shared address %u is not a multiple of %u", address, alignment);
  if (address < kSharedBase || address - kSharedBase > block.shared_bytes ||
      bytes > block.shared_bytes - (address - kSharedBase)) {
    fail("%u bytes at %d of shared memory, which has %u", bytes, static_cast<int>(address - kSharedBase),
         block.shared_bytes);
  }
  return block.shared + (address - kSharedBase);
}

uint32_t shared_address_of(const void* p) {
  const Block& block = own_block();
  const auto offset = static_cast<const unsigned char*>(p) - block.shared;
  if (offset < 0 || offset > block.shared_bytes) fail("%p is not in this block's shared memory", p);
  return kSharedBase + static_cast<uint32_t>(offset);
}

void store_shared(uint32_t address, const void* from, uint32_t bytes) {
  step();
  Block& block = own_block();
  Fiber* self = machine->current;
  unsigned char* to = shared_bytes_at(address, bytes, bytes);
  const uint32_t unit = (address - kSharedBase) / kCopyUnit;
  if (block.in_flight[unit]) fail("a store to shared address %u, to which a copy is in flight", address);
  const auto mark = static_cast<uint16_t>(self->thread + 1);
  if (block.unfenced[unit] != mark) {
    block.unfenced[unit] = mark;
    self->unfenced.push_back(unit);
  }
  std::memcpy(to, from, bytes);
}

void fence_async_proxy() {
  Fiber* self = machine->current;
  for (const uint32_t unit : self->unfenced) {
    uint16_t& mark = self->block->unfenced[unit];
    if (mark == self->thread + 1) mark = 0;
  }
  self->unfenced.clear();
}

void need_fence(uint32_t address, uint32_t bytes) {
  shared_bytes_at(address, bytes, 1);
  const uint32_t first = (address - kSharedBase) / kCopyUnit;
  for (uint32_t unit = first; unit * kCopyUnit < address - kSharedBase + bytes; ++unit) {
    if (const int mark = own_block().unfenced[unit]) {
      fail("shared address %u is used by hardware, but thread %d stored without a fence", address, mark - 1);
    }
  }
}

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

void barrier_init(uint32_t barrier, int count) {
  unsigned char* word = shared_bytes_at(barrier, 8, 8);
  if (count < 1 || count >= 1 << 20) fail("an mbarrier cannot count %d arrivals", count);
  std::memcpy(word, &kBarrierWord, 8);
  own_block().barriers[barrier] = {count, count};
}

void barrier_arrive(uint32_t barrier, uint32_t announced_bytes) {
  step();
  arrive_on(own_block(), barrier, announced_bytes);
}

void barrier_wait(uint32_t barrier, uint32_t parity) {
  step();
  TransactionBarrier& b = barrier_at(own_block(), barrier);
  if (parity > 1) fail("parity %u", parity);
  while ((b.phase & 1) == parity) wait_for(b.waiting, "mbarrier at %u, parity %u", barrier, parity);
}

void later(std::function<void()> effect) {
  ++own_block().effects;
  machine->effects.push_back({&own_block(), std::move(effect)});
}

void copy_later(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  step();
  Block& block = own_block();
  if (bytes == 0 || bytes % kCopyUnit != 0) fail("a copy of %u bytes: not a multiple of 16", bytes);
  if (reinterpret_cast<uintptr_t>(from) % kCopyUnit != 0) fail("a copy from %p: not a multiple of 16", from);
  unsigned char* poisoned = shared_bytes_at(to, bytes, kCopyUnit);
  const uint32_t first = (to - kSharedBase) / kCopyUnit;
  for (uint32_t i = 0; i < bytes / kCopyUnit; ++i) {
    if (block.in_flight[first + i]++) fail("a copy to shared address %u, to which another is in flight", to);
  }
  std::memset(poisoned, kPoison, bytes);
  volatile char last = static_cast<const char*>(from)[bytes - 1];  // a fault should name this thread
  (void)last;
  if (barrier != 0) {
    need_fence(to, bytes);
    barrier_at(block, barrier);
    later([&block, to, from, bytes, barrier] { land(block, to, from, bytes, barrier); });
    return;
  }
  Fiber* self = machine->current;
  const uint64_t number = self->copies++;
  self->flying.insert(number);
  later([self, to, from, bytes, number] {
    land(*self->block, to, from, bytes, 0);
    self->flying.erase(number);
    while (!self->arrivals.empty() &&
           (self->flying.empty() || *self->flying.begin() >= self->arrivals.front().first)) {
      arrive_on(*self->block, self->arrivals.front().second, 0);
      self->arrivals.pop_front();
      --self->block->effects;
    }
  });
}

void barrier_arrive_after_copies(uint32_t barrier) {
  step();
  Fiber* self = machine->current;
  barrier_at(*self->block, barrier);
  if (self->flying.empty()) {
    later([self, barrier] { arrive_on(*self->block, barrier, 0); });
  } else {
    ++self->block->effects;
    self->arrivals.push_back({self->copies, barrier});
  }
}

}  // namespace mosaic::simt
