// SPDX-License-Identifier: Apache-2.0
// A warp's walk over one strip of the tile bitmap, shared by every kernel that reads one. It costs one prefix
// sum over the strip's 32 words, and for each of its 16 slots half a 16-byte load (a word and where its
// values begin, of two slots), one population count, two loads of values that ask for nothing, and one
// permutation of their bytes that takes what is kept and zeros for the rest.
#pragma once

#include "cuda/launch.cuh"

namespace mosaic::cuda {

// Of shared memory, a warp's own: the pairs of the lower 16 lanes, then those of the upper ones, which lie in
// other banks.
constexpr int kHalfAreaBytes = kSlots * 8 + 64;
constexpr int kAreaBytes = kHalfAreaBytes + kSlots * 8;

// What a walk may read past a strip's last value: two values, which it does not take.
constexpr int kWalkSlack = 16;

// Which bytes of two values, each zero-extended to 32 bits (first: bytes 0 to 3, second: 4 to 7), become the
// lane's register, by whether its first weight is kept (bit 0 of `kept`) and its second (bit kHalfBit):
//
//     neither 0x3232    first alone 0x7610    second alone 0x1032    both 0x5410 (mod 2^16)
//
// Bytes 2, 3, 6 and 7 are zero, so that there is more than one way to write zeros; with these, each kept
// weight adds its own number, and the second's is kHalfBit bits above the first's.
__device__ __forceinline__ uint32_t selector_of(uint32_t kept) { return kept * 0x43deu + 0x3232u; }

struct StripWalk {
  uint32_t own;    // of kAreaBytes: a pair for each word, the word and the shared address of its first value
  uint32_t pairs;  // those of this lane's half of the slots
  uint32_t bit, below;  // of the lane's first weight, and all bits before its two
  int lane;

  __device__ __forceinline__ StripWalk(uint32_t area, int lane_)
      : own(area + lane_ % 2 * kHalfAreaBytes + lane_ / 2 * 8),
        pairs(area + lane_ / 16 * kHalfAreaBytes),
        bit(static_cast<uint32_t>(lane_bit(lane_))),
        below(bits_of_lanes_before(lane_)),
        lane(lane_) {}

  // Lane i gives word i of the strip, whose values begin at `values`.
  __device__ __forceinline__ void begin(uint32_t word, uint32_t values) const {
    const int count = popcount(word);
    const int before = inclusive_sum(count) - count;
    __syncwarp();  // before the last strip's pairs are replaced
    store_shared_u64(own, make_uint2(word, values + 2 * before));
    __syncwarp();
  }

  // The same for a tile in shared memory and its step's values there.
  __device__ __forceinline__ void begin(uint32_t tile, uint32_t values, int strip) const {
    const uint32_t word = load_shared_u32(tile + 4 * (kTileHeaderWords + strip * kStripWords + lane));
    const uint32_t units = load_shared_u32(tile + 4 * (strip / 2));
    begin(word, values + 16 * (units >> (16 * (strip % 2)) & 0xffffu));
  }

  // The lane's two weights of two slots, the first an even one, as two registers of operand A.
  __device__ __forceinline__ void two_slots(int number, uint32_t& first, uint32_t& second) const {
    const uint4 both = load_shared_u128(pairs + 8 * number);
    first = weights_of(both.x, both.y);
    second = weights_of(both.z, both.w);
  }

 private:
  __device__ __forceinline__ uint32_t weights_of(uint32_t word, uint32_t values) const {
    const uint32_t at = values + 2 * popcount(word & below);
    constexpr uint32_t kBoth = 1u | 1u << kHalfBit;
    const uint32_t low = load_shared_u16(at), high = load_shared_u16(at + 2);
    return permute_bytes(low, high, selector_of(word >> bit & kBoth));
  }
};

}  // namespace mosaic::cuda
