// SPDX-License-Identifier: Apache-2.0
// A CPU stand-in for the GPU, so that a machine without one proves the very sources of csrc/cuda right.
//
// Every CUDA thread is a fiber on one OS thread. A fiber runs until it has to wait (a barrier, a warp's other
// lanes) or until a load, store or atomic lets others go first; who runs next is drawn from a seeded
// generator, and several blocks are resident at once, so a seed is one of many legal orders and a race is a
// result that differs between seeds. Asynchronous copies land at a drawn step after their issue, and poison
// their destination with NaN until then; a block's shared memory starts as NaN. Whatever the rules of CUDA
// forbid and this file can see ends the launch with an error that names the thread: accesses outside shared
// memory or misaligned, memory faults, undefined behaviour, lanes that meet at different instructions,
// barriers with more arrivals than they count, two copies to one place, one to bytes stored without a fence,
// a deadlock (with what each thread waits for). What it cannot show: weaker orders than sequential
// consistency (a missing fence), bank conflicts, and time.
//
// This file is what the wrappers of ptx.h and the CUDA names of cuda.h are made of; a new wrapper that works
// on a warp fills a struct for its lane and calls meet_warp, one that is asynchronous calls `later`.
#pragma once

#include <cstdint>
#include <functional>

namespace mosaic::simt {

constexpr int kLanes = 32;
constexpr uint32_t kSharedBase = 1024;  // of the dynamic shared memory: an offset is no address

struct Extent {
  unsigned x, y, z;
};

// Runs body() in every thread of the grid. False: error() says what went wrong.
bool run_grid(Extent grid, int threads, int shared_bytes, const std::function<void()>& body);
const char* error();

// For the next launches: the order of everything, and how many blocks are resident at once.
void set_seed(uint64_t seed);
void set_resident_blocks(int blocks);

// --- called by threads of a grid ---

// Ends the launch; the message names the thread that called.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// Now and then lets others run first: before every access that others may see.
void step();

// Number of this thread in its block.
int thread_number();

// `bytes` of this block's shared memory, checked.
unsigned char* shared_bytes_at(uint32_t address, uint32_t bytes, uint32_t alignment);
uint32_t shared_address_of(const void* p);
unsigned char* shared_start();

template <typename T>
T load_shared(uint32_t address) {
  step();
  T v;
  __builtin_memcpy(&v, shared_bytes_at(address, sizeof(T), sizeof(T)), sizeof(T));
  return v;
}

void store_shared(uint32_t address, const void* from, uint32_t bytes);

// The copy engine and the tensor cores of sm_90 see a store to shared memory only after its thread's fence
// (fence.proxy.async), for which no kernel has had a use: fails where a thread has stored.
void need_fence(uint32_t address, uint32_t bytes);

// Waits until all `count` threads from `first` on (a warp: those of `mask`) have come with `lane`. The last
// one is given everybody's, by place in the group, and lets the others go with `depart`; they get nullptr.
void* const* arrive(const char* what, int first, int count, uint32_t mask, void* lane);
void depart(int first, int count, uint32_t mask);

// `what` of the lanes of `mask`: combine(lanes) sees each one's struct by its number (those not in the mask
// are nullptr) and writes the results into them.
template <typename Lane, typename Combine>
void meet_warp(const char* what, uint32_t mask, Lane& lane, const Combine& combine) {
  const int first = thread_number() / kLanes * kLanes;
  if (void* const* lanes = arrive(what, first, kLanes, mask, &lane)) {
    combine(reinterpret_cast<Lane* const*>(lanes));
    depart(first, kLanes, mask);
  }
}

// The same for `count` neighbouring threads of which this is one, a multiple of a warp: a warpgroup has 128.
template <typename Lane, typename Combine>
void meet_threads(const char* what, int count, Lane& lane, const Combine& combine) {
  const int first = thread_number() / count * count;
  if (void* const* lanes = arrive(what, first, count, ~0u, &lane)) {
    combine(reinterpret_cast<Lane* const*>(lanes));
    depart(first, count, ~0u);
  }
}

// bar.sync: waits for `threads` threads of the block at barrier `id`; 0 threads: for all of the block.
void sync_block(int id, int threads);

// mbarrier, as the PTX ISA has it: a phase ends when no arrival is pending and no announced byte outstanding.
void barrier_init(uint32_t barrier, int count);
void barrier_arrive(uint32_t barrier, uint32_t announced_bytes);
void barrier_wait(uint32_t barrier,
                  uint32_t parity);  // returns at once where the phase before has this parity

// Copies to shared memory at a later step: in bulk where there is a barrier, which is told of the bytes, else
// (0) as cp.async does.
void copy_later(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);
// An arrival as soon as all earlier copies of this thread that told no barrier have landed.
void barrier_arrive_after_copies(uint32_t barrier);
// Waits until they have.
void wait_for_copies();

// Runs `effect` at a later step of the block's life, on no thread; a block may not end before.
void later(std::function<void()> effect);

}  // namespace mosaic::simt
