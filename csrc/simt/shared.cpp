// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "simt/machine.h"

namespace mosaic::simt {
namespace {

constexpr uint64_t kBarrierWord = 0x6d62617272696572;  // lies where a barrier does, to see it overwritten
constexpr int64_t kMostBytes = (1 << 20) - 1;          // that a barrier can have outstanding

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

}  // namespace

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
  unsigned char* to = shared_bytes_at(address, bytes, bytes);
  const uint32_t unit = (address - kSharedBase) / kCopyUnit;
  if (block.in_flight[unit]) fail("a store to shared address %u, to which a copy is in flight", address);
  block.unfenced[unit] = static_cast<uint16_t>(machine->current->thread + 1);
  std::memcpy(to, from, bytes);
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
    if (self->flying.empty()) make_runnable(self->waiting);
    while (!self->arrivals.empty() &&
           (self->flying.empty() || *self->flying.begin() >= self->arrivals.front().first)) {
      arrive_on(*self->block, self->arrivals.front().second, 0);
      self->arrivals.pop_front();
      --self->block->effects;
    }
  });
}

void wait_for_copies() {
  step();
  Fiber* self = machine->current;
  while (!self->flying.empty())
    wait_for(self->waiting, "%u copies of thread %u", static_cast<unsigned>(self->flying.size()),
             static_cast<unsigned>(self->thread));
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
