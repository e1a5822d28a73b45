// SPDX-License-Identifier: Apache-2.0
// What an emulated launch consists of; simt.cpp runs it, shared.cpp is its shared memory and barriers.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "simt/cuda.h"
#include "simt/simt.h"

namespace mosaic::simt {

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 16 * kPage;
constexpr uint32_t kCopyUnit = 16;
constexpr unsigned char kPoison = 0xff;  // NaN in fp32, bf16 and fp16

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
  std::vector<Fiber*> waiting = {};                         // this one, until `flying` is empty
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
  std::vector<unsigned char> in_flight;        // for each 16 bytes: a copy to them is
  std::vector<uint16_t> unfenced;              // the same: the thread that stored to them, + 1
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

extern Machine* machine;

void make_runnable(std::vector<Fiber*>& fibers);  // and empties the list

// Until somebody makes this thread runnable; `what` is a format for the two numbers, for who asks why.
void wait_for(std::vector<Fiber*>& queue, const char* what, unsigned number, unsigned detail);

inline Block& own_block() { return *machine->current->block; }

}  // namespace mosaic::simt
