// SPDX-License-Identifier: Apache-2.0
// What the AVX2 kernels share. AVX2 has no expand instruction. Instead, weights are expanded eight columns at
// a time: the columns' byte of the bitmap selects a shuffle from a table, and the shuffle moves the next
// values into place and fills the other columns with zeros.
//
// The addresses take 16 more instructions for a word of 32 columns, four for each byte: a rotation and a mask
// for the shuffle's address, a mask and a popcount for the address of the byte's values. No byte waits for
// another.
#pragma once

#include <immintrin.h>

#include "cpu/lanes.h"
#include "cpu/linear_blocks.h"
#include "cpu/linear_streams.h"

namespace mosaic::MOSAIC_ISA {
namespace {

constexpr int kWordBytes = kWordBits / kLanes;

// One shuffle of kBytes bytes for each byte of the bitmap. It gives each of the eight columns kBytes / 8
// bytes, puts the column's value (kItem bytes) at their end and zeros before it. The index 0x80 produces a
// zero.
template <int kBytes, int kItem>
struct Shuffles {
  alignas(64) uint8_t row[256][kBytes];

  constexpr Shuffles() : row() {
    constexpr int kPlace = kBytes / kLanes, kZeros = kPlace - kItem;
    for (int bits = 0; bits < 256; ++bits) {
      int source = 0;
      for (int i = 0; i < kLanes; ++i) {
        const bool kept = (bits >> i) & 1;
        for (int b = 0; b < kPlace; ++b) {
          row[bits][i * kPlace + b] = static_cast<uint8_t>(kept && b >= kZeros ? source + b - kZeros : 0x80);
        }
        source += kept ? kItem : 0;
      }
    }
  }
};

// The row of the table that byte q of `word` selects.
template <typename Vector, typename Table>
MOSAIC_HD Vector row_of(const Table& table, uint32_t word, int q) {
  constexpr int kShift = sizeof table.row[0] == 32 ? 5 : 4;
  static_assert(sizeof table.row[0] == 1 << kShift && sizeof(Vector) == 1 << kShift);
  const int by = (8 * q - kShift) & 31;
  const uint32_t offset = (word >> by | word << ((32 - by) & 31)) & 255u << kShift;
  return *reinterpret_cast<const Vector*>(reinterpret_cast<const char*>(table.row) + offset);
}

constexpr Shuffles<32, 2> kWiden16;
constexpr Shuffles<32, 1> kWiden8;
constexpr Shuffles<16, 2> kExpand16;

// The shuffles for 32-bit values: the lane from which each column's value comes, negative where the bit is
// clear.
struct Sources {
  alignas(64) int32_t row[256][kLanes];

  constexpr Sources() : row() {
    for (int bits = 0; bits < 256; ++bits) {
      int source = 0;
      for (int i = 0; i < kLanes; ++i) {
        const bool kept = (bits >> i) & 1;
        row[bits][i] = kept ? source : -1;
        source += kept;
      }
    }
  }
};
constexpr Sources kSources;

// Expands byte q of `word` to 8 weights. `values` points to the first value of that byte.
MOSAIC_HD __m256 expand(uint32_t word, int q, const BFloat16* values) {
  const __m256i twice =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, row_of<__m256i>(kWiden16, word, q)));
}

MOSAIC_HD __m256 expand(uint32_t word, int q, const Half* values) {
  const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  return _mm256_cvtph_ps(_mm_shuffle_epi8(eight, row_of<__m128i>(kExpand16, word, q)));
}

MOSAIC_HD __m256 expand(uint32_t word, int q, const float* values) {
  const __m256i source = row_of<__m256i>(kSources, word, q);
  const __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), source);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(source, 31)), moved);
}

MOSAIC_HD __m256 expand(uint32_t word, int q, const int8_t* values) {
  int64_t eight;
  std::memcpy(&eight, values, sizeof eight);
  const __m256i top = _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), row_of<__m256i>(kWiden8, word, q));
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24));
}

MOSAIC_HD __m256 load(const float* from) { return _mm256_loadu_ps(from); }
MOSAIC_HD __m256 load(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
MOSAIC_HD __m256 load(const BFloat16* from) {
  const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
}

// Makes the compiler load from `p` again for each weight row. If it loaded once for several rows, it would
// run out of registers, and spill both what it loaded and the sums.
template <typename T>
MOSAIC_HD const T* as_is(const T* p) {
  __asm__("" : "+r"(p));
  return p;
}

// How many values of `word` belong to the bytes before byte q.
MOSAIC_HD int64_t values_before(uint32_t word, int q) {
  uint32_t bits = word & bits_below(8 * q);
  __asm__("" : "+r"(bits));  // else gcc counts in half a register, and waits for its other half
  return q == 0 ? 0 : popcount(bits);
}

float horizontal_sum(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Finishes the results of `count` weight rows, from `row` on, for row n of x: adds up the lanes of each sum,
// scales, adds the bias and stores. The sums are passed in memory. If they were passed in registers, gcc
// would add the lanes of several sums side by side, and for that keep all sums in memory during the whole
// multiplication.
template <typename T>
void store_sums(const LinearTask& task, int64_t row, int64_t n, const __m256* sums, int count) {
  const LinearArgs& a = task.args;
  const T* bias = static_cast<const T*>(a.bias);
  T* out = static_cast<T*>(a.out) + n * a.out_features + row;
  for (int r = 0; r < count; ++r) {
    float sum = horizontal_sum(sums[r]);
    if (a.scale_groups == 1) sum *= a.scales[row + r];
    if (task.x_scales) sum *= task.x_scales[n];
    store(bias ? sum + to_float(bias[row + r]) : sum, out + r);
  }
}

}  // namespace
}  // namespace mosaic::MOSAIC_ISA
