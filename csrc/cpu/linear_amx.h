// SPDX-License-Identifier: Apache-2.0
// The parts of the AMX kernels: wrappers for the tile instructions, and one class for each way in which
// weights are stored, which expands them into tiles.
#pragma once

#include <immintrin.h>

#include "cpu/linear_tiles_avx512.h"

namespace mosaic::MOSAIC_ISA {
namespace {

constexpr int64_t kSide = 16;          // rows of a tile
constexpr int64_t kTileBytes = 1024;   // of a full tile
constexpr int64_t kBlock = 2 * kSide;  // four tiles of sums hold this many weight rows x rows of x
constexpr int64_t kBlockSums = kBlock * kTurnRows;

// The shapes of the eight tile registers, in the layout that ldtilecfg reads. Tiles 0 to 3 hold sums, 4 and 5
// weights, 6 and 7 rows of x.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

constexpr TileShapes shapes_for(int x_rows) {
  TileShapes shapes;
  for (int t = 0; t < 8; ++t) {
    shapes.rows[t] = kSide;
    shapes.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? 64 : 4 * x_rows);
  }
  return shapes;
}

constexpr TileShapes kShapes = shapes_for(16), kNarrowShapes = shapes_for(8);

// Written in assembly because gcc's intrinsics do not declare which memory they read or that tiles change, so
// the compiler may move other code across them.
void use_shapes(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }
void release_tiles() { __asm__ volatile("tilerelease" ::: "memory"); }
template <int kTile>
MOSAIC_HD void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
MOSAIC_HD void store_tile(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
MOSAIC_HD void clear_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

struct Bf16Tiles {
  template <int kSum, int kWeights, int kX>
  MOSAIC_HD void add() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kWeights), "i"(kX));
  }
};

struct Int8Tiles {
  template <int kSum, int kWeights, int kX>
  MOSAIC_HD void add() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kWeights), "i"(kX));
  }
};

// Prefetches the values and bits of four weight rows into L2 while other rows are expanded.
struct Ahead {
  const char* values[4];
  const char* bits[4];
  int64_t value_bytes;  // of one row in one step, on average
  int64_t bit_bytes;

  void step(int64_t s) const {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) fetch(values[r] + s * value_bytes);
    if (s % 16 != 0) return;
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) fetch(bits[r] + s * bit_bytes);
  }
};

// Each of the classes below reads weights stored in one way. expand() writes the next `steps` steps of R
// weight rows to a panel; a step is 64 bytes of an expanded row. It reads row r from value[r] on and writes
// its step s to `to` + s * kTileBytes + r * 64. At the end value[r] points to the first value that it did not
// read.
//
// Packed values of bf16.
struct Bf16Values {
  using Tiles = Bf16Tiles;
  static constexpr bool kWhole = false, kScaled = false;
  static constexpr int64_t kStepWords = 1, kValueBytes = 2;

  static const char* row(const LinearArgs& a, int64_t row) {
    return static_cast<const char*>(a.values) + a.offsets[row] * kValueBytes;
  }
  template <int R, bool kWithin>
  static void expand(const LinearArgs& a, int64_t row, int64_t first, int64_t steps, const Ahead& ahead,
                     const char** value, char* to) {
    const int64_t words = bitmask_words(a.in_features);
    const uint32_t* bits = a.words + row * words + first;
    const BFloat16* next[R];
    for (int r = 0; r < R; ++r) next[r] = reinterpret_cast<const BFloat16*>(value[r]);
    for (int64_t s = 0; s < steps; ++s, to += kTileBytes) {
      ahead.step(s);
      const uint32_t* word = as_is(bits + s);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const uint32_t kept = word[r * words];
        _mm512_store_si512(to + r * kStepBytes, kWithin ? Traits<BFloat16>::expand_within(kept, next[r])
                                                        : Traits<BFloat16>::expand(kept, next[r]));
        next[r] += popcount(kept);
      }
    }
    for (int r = 0; r < R; ++r) value[r] = reinterpret_cast<const char*>(next[r]);
  }
};

// Dense rows of bf16. They are copied to the panel although tiles could be loaded from where they are: rows
// whose distance is a multiple of 4 KB evict each other from the cache.
struct DenseBf16 {
  using Tiles = Bf16Tiles;
  static constexpr bool kWhole = false, kScaled = false;
  static constexpr int64_t kStepWords = 1, kValueBytes = 2;

  static const char* row(const LinearArgs& a, int64_t row) {
    return static_cast<const char*>(a.values) + row * a.in_features * kValueBytes;
  }
  template <int R, bool kWithin>
  static void expand(const LinearArgs& a, int64_t, int64_t first, int64_t steps, const Ahead& ahead,
                     const char** value, char* to) {
    for (int64_t s = 0; s < steps; ++s, to += kTileBytes) {
      ahead.step(s);
      const int64_t left = a.in_features - (first + s) * kWordBits;
      const __mmask32 present = left < kWordBits ? bits_below(static_cast<uint32_t>(left)) : ~0u;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        _mm512_store_si512(to + r * kStepBytes, _mm512_maskz_loadu_epi16(present, value[r] + s * kStepBytes));
      }
    }
    for (int r = 0; r < R; ++r) value[r] += steps * kStepBytes;
  }
};

// Packed values of int8, converted to bf16, which represents every int8 exactly. With a scale for every 64
// columns (kGrouped) each value is multiplied by its scale and rounded to bf16; that error is at most 1/6 of
// the error of rounding the weight to int8.
template <bool kGrouped>
struct WidenedInt8 {
  using Tiles = Bf16Tiles;
  static constexpr bool kWhole = false, kScaled = false;
  static constexpr int64_t kStepWords = 1, kValueBytes = 1;

  static const char* row(const LinearArgs& a, int64_t row) {
    return static_cast<const char*>(a.values) + a.offsets[row];
  }
  template <int R, bool kWithin>
  static void expand(const LinearArgs& a, int64_t row, int64_t first, int64_t steps, const Ahead& ahead,
                     const char** value, char* to) {
    const int64_t words = bitmask_words(a.in_features);
    const uint32_t* bits = a.words + row * words + first;
    const float* scales = a.scales + row * a.scale_groups;
    const char* next[R];
    for (int r = 0; r < R; ++r) next[r] = value[r];
    for (int64_t s = 0; s < steps; ++s, to += kTileBytes) {
      ahead.step(s);
      const uint32_t* word = as_is(bits + s);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const uint32_t kept = word[r * words];
        const __m256i values =
            kWithin ? _mm256_maskz_loadu_epi8(bits_below(popcount(kept)), next[r])
                    : in_register(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(next[r])));
        next[r] += popcount(kept);
        const __m256i bytes = _mm256_maskz_expand_epi8(kept, values);
        __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
        __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
        if (kGrouped) {
          const __m512 scale = _mm512_set1_ps(scales[r * a.scale_groups + (first + s) / 2]);
          low = _mm512_mul_ps(low, scale);
          high = _mm512_mul_ps(high, scale);
        }
        _mm512_store_si512(to + r * kStepBytes, Traits<BFloat16>::round(low, high));
      }
    }
    for (int r = 0; r < R; ++r) value[r] = next[r];
  }
};

// Packed values of int8, not converted, for x rounded to int8.
template <bool kGrouped>
struct Int8Values {
  using Tiles = Int8Tiles;
  static constexpr bool kWhole = !kGrouped;  // sums are integers, in int32
  static constexpr bool kScaled = kGrouped;  // each step's sums are scaled, then added up
  static constexpr int64_t kStepWords = 2, kValueBytes = 1;

  static const char* row(const LinearArgs& a, int64_t row) {
    return static_cast<const char*>(a.values) + a.offsets[row];
  }
  template <int R, bool kWithin>
  static void expand(const LinearArgs& a, int64_t row, int64_t first, int64_t steps, const Ahead& ahead,
                     const char** value, char* to) {
    const int64_t words = bitmask_words(a.in_features);
    const uint32_t* bits = a.words + row * words + 2 * first;
    const char* next[R];
    for (int r = 0; r < R; ++r) next[r] = value[r];
    for (int64_t s = 0; s < steps; ++s, to += kTileBytes) {
      ahead.step(s);
      const uint32_t* word = as_is(bits + 2 * s);
      const bool whole = 2 * (first + s) + 1 < words;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        uint64_t kept = word[r * words];
        if (whole) std::memcpy(&kept, word + r * words, sizeof kept);
        const int count = __builtin_popcountll(kept);
        const __m512i values =
            kWithin ? _mm512_maskz_loadu_epi8(count < 64 ? (1ull << count) - 1 : ~0ull, next[r])
                    : in_register(_mm512_loadu_si512(next[r]));
        next[r] += count;
        _mm512_store_si512(to + r * kStepBytes, _mm512_maskz_expand_epi8(kept, values));
      }
    }
    for (int r = 0; r < R; ++r) value[r] = next[r];
  }
};

}  // namespace
}  // namespace mosaic::MOSAIC_ISA
