// SPDX-License-Identifier: Apache-2.0
// The packed layouts, stated once for the packer, the kernels of every device and the tests.
//
//   canonical bitmask   uint8 [rows, bitmask_bytes(columns)], least significant bit first
//   row bitmap          uint32 [rows, bitmask_words(columns)], the same bits in whole words
//
// In both, values are the kept weights in row-major order without padding, and row r owns
// values[offsets[r] .. offsets[r + 1]). Bits past the last column are zero.
//
//   tile bitmap         tiles of 64 x 64 weights, two of which, one under the other, are a step: the headers
//                       and bits of both, kTileWords each; then their values, strip by strip (16 x 64), every
//                       strip padded with zeros to whole units of 8 values, so 16-byte copies are legal
//                       uint32 [steps + 1]: where each step begins, in units of 16 bytes
//
// A strip's 1024 bits are in the order in which a warp holds operand A of mma.m16n8k16 (see TileBit below),
// which is also the order of wgmma m64k16's A in registers, a strip a warp: the kernels for few and for many
// rows share it.
//
//   2:4 tiles           uint32 [row tiles, column tiles, kTwoOfFourTileWords]: a tile's bf16 or fp16 values
//                       and their 2-bit indices; nothing else, since every tile takes the same bytes
//
// Every quad of a 2:4 weight (four neighbouring columns of a row, the first a multiple of 4) keeps at most
// two weights. One that keeps fewer has the value -0.0 in its lowest free columns; a stored -0.0 is written
// as 0.0, so that padding can be told from what is stored. Strip by strip come the values, then the indices,
// in the order in which a warp holds the operands of mma.sp.m16n8k32 (see quad_place below).
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

// The tile bitmap. Bit `word * 32 + bit` of a strip is weight number `half` of lane `lane` in slot `slot`:
//
//     word = 2 slot + lane / 16        slot = 4 step + register: step 0..3 of 16 columns, register a0..a3 of
//     the mma bit  = 16 (lane % 16 / 8) + 8 half + lane % 8
//                                      lane = 4 (row % 8) + (column % 8) / 2, half = column % 2
//
// a1 and a3 are the lower eight rows, a2 and a3 the right eight columns. A lane's two weights of a slot lie
// eight bits apart in one word, so that a kernel makes a byte permutation of both with one multiplication.
// Values are in the order (word, lane, half).
//
// Two tiles, one under the other, are one step of a kernel and one stretch of memory, so that one copy brings
// them: both tiles' headers and bits, then the values of both. Steps follow each other along the columns,
// then down the rows. A weight with an odd number of row tiles ends with tiles of zeros.
constexpr int kTileRows = 64;
constexpr int kTileColumns = 64;
constexpr int kStripRows = 16;
constexpr int kStrips = kTileRows / kStripRows;
constexpr int kSlots = 16;
constexpr int kStripWords = 2 * kSlots;
constexpr int kTileHeaderWords =
    4;  // where each strip's values begin in the step's, as uint16 units; then its units and its kept weights
constexpr int kTileWords = kTileHeaderWords + kStrips * kStripWords;
constexpr int kTileBytes = kTileWords * 4;
constexpr int kUnitValues = 8;  // 16 bytes of bf16 or fp16
constexpr int kGroup = 2;       // tiles of a step
constexpr int kStepHeadBytes = kGroup * kTileBytes;
constexpr int kStepHeadUnits = kStepHeadBytes / 16;
static_assert(kStepHeadBytes % 16 == 0, "values begin where a copy may");

MOSAIC_HD int64_t row_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
MOSAIC_HD int64_t row_groups(int64_t rows) { return (row_tiles(rows) + kGroup - 1) / kGroup; }
MOSAIC_HD int64_t column_tiles(int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns; }

struct TileBit {
  int word;  // of the strip
  int bit;
};

// In the word of a slot: the bit of a lane's first weight, how far above it that of its second is, and the
// bits of all lanes of this word before it.
constexpr int kHalfBit = 8;
MOSAIC_HD int lane_bit(int lane) { return lane % 8 + lane % 16 / 8 * 16; }
MOSAIC_HD uint32_t bits_of_lanes_before(int lane) {
  const uint32_t byte = (1u << (lane % 8)) - 1u, bits = byte | byte << kHalfBit;
  return lane % 16 < 8 ? bits : bits << 16 | 0xffffu;
}

MOSAIC_HD TileBit tile_bit(int strip_row, int column) {
  const int step = column / 16, across = column % 16;
  const int slot = 4 * step + strip_row / 8 + 2 * (across / 8);
  const int lane = 4 * (strip_row % 8) + (across % 8) / 2;
  return {2 * slot + lane / 16, lane_bit(lane) + kHalfBit * (across % 2)};
}

// The first of the two neighbouring weights that lane `lane` holds in slot `slot` of a strip.
struct TilePlace {
  int row;
  int column;
};

MOSAIC_HD TilePlace tile_place(int slot, int lane) {
  return {lane / 4 + 8 * (slot % 2), 16 * (slot / 4) + 8 * ((slot % 4) / 2) + 2 * (lane % 4)};
}

MOSAIC_HD int units_of(int values) { return (values + kUnitValues - 1) / kUnitValues; }

// Header words 0 and 1: the strips' first units among the step's values as uint16; word 2: the tile's units;
// word 3: its kept weights.
MOSAIC_HD int strip_unit(const uint32_t* tile, int strip) {
  return static_cast<int>((tile[strip / 2] >> (16 * (strip % 2))) & 0xffffu);
}

MOSAIC_HD const uint32_t* strip_words(const uint32_t* tile, int strip) {
  return tile + kTileHeaderWords + strip * kStripWords;
}

// The 2:4 tile. Operand A of mma.sp.m16n8k32 (PTX ISA, "Matrix Fragments for sparse mma.m16n8k32 with .f16
// and .bf16 types"): register r of lane l holds the two kept values, low half first, of the quad
//
//     row = l / 4 + 8 (r % 2)      first column = 32 step + 16 (r / 2) + 4 (l % 4)
//
// A strip's word 128 step + 4 l + r is that register. Behind them come 32 words of indices. The quad's 4 bits
// are its first kept column (2 bits) and its second, the greater one; of the word that lane l gives
//
//     bits 0..15   row l / 4, 16 columns, quad by quad      bits 16..31   row l / 4 + 8, the same columns
//
// where lanes 0 and 1 of every four give the left and the right 16 columns of step 0, which the instruction
// is told by sparsity selector 0, and lanes 2 and 3 those of step 1 (selector 1): each lane loads one word.
constexpr int kQuad = 4;
constexpr int kTwoOfFourStepColumns = 32;
constexpr int kTwoOfFourStepWords = kWarpLanes * 4;
constexpr int kTwoOfFourValueWords = kTileColumns / kTwoOfFourStepColumns * kTwoOfFourStepWords;
constexpr int kTwoOfFourStripWords = kTwoOfFourValueWords + kWarpLanes;
constexpr int kTwoOfFourTileWords = kStrips * kTwoOfFourStripWords;
// 4608: for each weight 1 byte of values (two bytes for every second one) and 1/8 byte of indices (4 bits a
// quad).
constexpr int kTwoOfFourTileBytes = kTwoOfFourTileWords * 4;

// Where the four index bits of the quad begin that `column` is in.
MOSAIC_HD TileBit quad_indices(int strip_row, int column) {
  const int step = column / kTwoOfFourStepColumns, across = column % kTwoOfFourStepColumns;
  return {kTwoOfFourValueWords + 4 * (strip_row % 8) + 2 * step + across / 16,
          16 * (strip_row / 8) + across % 16 / kQuad * 4};
}

// The first weight of the quad that lane `lane` holds in register `r` of step `step`.
MOSAIC_HD TilePlace quad_place(int step, int r, int lane) {
  return {lane / 4 + 8 * (r % 2), kTwoOfFourStepColumns * step + 16 * (r / 2) + kQuad * (lane % 4)};
}

// A quad's four columns, the first in the lowest 16 bits: two kept values at their indices, zero elsewhere.
MOSAIC_HD uint64_t expand_quad(uint32_t values, uint32_t indices) {
  return static_cast<uint64_t>(values & 0xffffu) << (16 * (indices & 3u)) |
         static_cast<uint64_t>(values >> 16) << (16 * (indices >> 2 & 3u));
}

}  // namespace mosaic
