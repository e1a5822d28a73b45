// SPDX-License-Identifier: Apache-2.0
// The packed layouts, stated once for the packer, the kernels of every device and the tests.
//
//   canonical bitmask   uint8 [rows, bitmask_bytes(columns)], least significant bit first
//   row bitmap          uint32 [rows, bitmask_words(columns)], the same bits in whole words
//
// In both, values are the kept weights in row-major order without padding, and row r owns
// values[offsets[r] .. offsets[r + 1]). Bits past the last column are zero.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MOSAIC_HD __host__ __device__ __forceinline__ static
#else
// always_inline: these must never be emitted as shared symbols, because the same header is compiled
// with different instruction sets and the linker would keep an arbitrary copy.
#define MOSAIC_HD [[maybe_unused]] __attribute__((always_inline)) static inline
#endif

namespace mosaic {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int kWordBits = 32;

MOSAIC_HD int64_t bitmask_bytes(int64_t columns) { return (columns + 7) / 8; }

MOSAIC_HD int64_t bitmask_words(int64_t columns) { return (columns + kWordBits - 1) / kWordBits; }

// Columns that share one scale where int8 values have more than one scale in a row.
constexpr int kScaleColumns = 64;

MOSAIC_HD int64_t scale_groups_of(int64_t columns) { return (columns + kScaleColumns - 1) / kScaleColumns; }

MOSAIC_HD int item_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

MOSAIC_HD int popcount(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// The bits below position `bit` (0..32): the columns of this word that come before that one.
MOSAIC_HD uint32_t bits_below(uint32_t bit) { return bit >= 32 ? 0xffffffffu : (1u << bit) - 1u; }

MOSAIC_HD bool is_kept(uint32_t word, uint32_t bit) { return (word >> bit) & 1u; }

// Where column `bit` of a word has its value, counted from the first value of that word.
MOSAIC_HD int rank(uint32_t word, uint32_t bit) { return popcount(word & bits_below(bit)); }

// How a GPU warp walks a row of the row bitmap: 32 words (1024 columns) at a time, of which lane i loads
// word i; an exclusive sum of the words' counts tells each word's first value. Then 16 steps of two words
// (64 columns), in which lane l owns columns 2 l and 2 l + 1:
//
//     word      low                       high
//     lane      0  1  2  ...  15          16 17 ... 31
//     columns   01 23 45 ... 30,31        32,33 ... 62,63
//
// The CUDA kernels and their host emulation (cpu/warp_emulation.cpp) both call this.
constexpr int kWarpLanes = 32;
constexpr int kStepWords = 2;
constexpr int kStepColumns = kStepWords * kWordBits;

struct LanePair {
  bool first, second;  // which of the two columns are kept
  int first_value;     // where their values are, counted from the first of the 32 words' values
  int second_value;
};

MOSAIC_HD LanePair lane_pair(uint32_t low, uint32_t high, int first_value_of_low, int lane) {
  const bool in_high = lane >= kWarpLanes / 2;
  const uint32_t word = in_high ? high : low;
  const uint32_t bit = 2u * (static_cast<uint32_t>(lane) % (kWarpLanes / 2));
  LanePair pair;
  pair.first = is_kept(word, bit);
  pair.second = is_kept(word, bit + 1);
  pair.first_value = first_value_of_low + (in_high ? popcount(low) : 0) + rank(word, bit);
  pair.second_value = pair.first_value + (pair.first ? 1 : 0);
  return pair;
}

}  // namespace mosaic
