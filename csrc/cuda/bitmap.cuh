// SPDX-License-Identifier: Apache-2.0
// A warp's walk over one strip of the tile bitmap, shared by every kernel that reads one. It costs one prefix
// sum over the strip's 32 words, and for each of its 16 slots one 8-byte load (a word and where its values
// begin), one popcount and two predicated loads of values.
#pragma once

#include "cuda/launch.cuh"

namespace mosaic::cuda {

constexpr int kAreaBytes = kStripWords * 8;  // of shared memory, a warp's own

struct StripWalk {
  uint32_t area;   // kAreaBytes: a pair for each word, the word and the shared address of its first value
  uint32_t pairs;  // those of this lane's half of the slots
  uint32_t first_bit, second_bit, below;  // of the lane's two weights, and all bits before them
  int lane;

  __device__ __forceinline__ StripWalk(uint32_t area_, int lane_)
      : area(area_), pairs(area_ + 8 * (lane_ / 16)), lane(lane_) {
    first_bit = 1u << (2 * (lane % 16));
    second_bit = 2 * first_bit;
    below = first_bit - 1;
  }

  // Lane i gives word i of the strip, whose values begin at `values`.
  __device__ __forceinline__ void begin(uint32_t word, uint32_t values) const {
    const int count = popcount(word);
    const int before = inclusive_sum(count) - count;
    __syncwarp();  // before the last strip's pairs are replaced
    store_shared_u64(area + 8 * lane, make_uint2(word, values + 2 * before));
    __syncwarp();
  }

  // The same for a tile in shared memory and its values there.
  __device__ __forceinline__ void begin(uint32_t tile, uint32_t values, int strip) const {
    const uint32_t word = load_shared_u32(tile + 4 * (kTileHeaderWords + strip * kStripWords + lane));
    const uint32_t units = load_shared_u32(tile + 4 * (strip / 2));
    begin(word, values + 16 * (units >> (16 * (strip % 2)) & 0xffffu));
  }

  // The lane's two weights of a slot, as one register of operand A.
  __device__ __forceinline__ uint32_t slot(int number) const {
    const uint2 pair = load_shared_u64(pairs + 16 * number);
    return load_shared_kept_pair(pair.y + 2 * popcount(pair.x & below), pair.x, first_bit, second_bit);
  }
};

}  // namespace mosaic::cuda
