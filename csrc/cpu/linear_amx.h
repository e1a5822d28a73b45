// SPDX-License-Identifier: Apache-2.0
// What the AMX kernels are made of: the tiles' instructions, and where weights come from.
#pragma once

#include <immintrin.h>

#include "cpu/linear_tiles_avx512.h"

namespace mosaic::MOSAIC_ISA {
namespace {

constexpr int64_t kSide = 16;          // rows of a tile
constexpr int64_t kTileBytes = 1024;   // of a full tile
constexpr int64_t kBlock = 2 * kSide;  // rows of weights, and of x, that four tiles of sums are for
constexpr int64_t kBlockSums = kBlock * kTurnRows;

// The tiles' shapes, as ldtilecfg reads them. Tiles 0 to 3 are sums, 4 and 5 weights, 6 and 7 x.
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

// gcc's intrinsics tell the compiler neither what they read nor that tiles change.
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

// What four weight rows will be read from soon, asked for into L2 while others are expanded.
struct Ahead {
  const char* values[4];
  const char* bits[4];
  int64_t value_bytes;  // of a step, on average
  int64_t bit_bytes;

  void step(int64_t s) const {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) fetch(values[r] + s * value_bytes);
    if (s % 16 != 0) return;
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) fetch(bits[r] + s * bit_bytes);
  }
};

// Where weights come from. expand() takes R of them a few steps of 64 bytes further: row r's next value is at
// value[r], and step s of it goes to `to` + s * kTileBytes + r * 64.
//
// Kept values of bf16.
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

// Dense rows of bf16. They are copied, because tiles of rows that are a multiple of 4 KB apart evict each
// other.
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

// Kept values of int8, as bf16, which holds them exactly. With a scale for every 64 columns the weight is
// rounded to bf16, by at most 1/6 of what rounding it to int8 cost.
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

// Kept values of int8 as they are, for x rounded to int8.
template <bool kGrouped>
struct Int8Values {
  using Tiles = Int8Tiles;
  static constexpr bool kWhole = !kGrouped;  // sums are whole numbers, in int32
  static constexpr bool kScaled = kGrouped;  // a step's sums are scaled before they are added up
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
