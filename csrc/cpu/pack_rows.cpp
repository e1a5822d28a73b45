// SPDX-License-Identifier: Apache-2.0
// Packing and unpacking one row. Bound by reading the dense row once: 4096x4096 bf16 is 33 MB.
#include "cpu/rows.h"

#if defined(__AVX512VBMI2__)
#include <immintrin.h>
#endif

namespace mosaic::MOSAIC_ISA {
namespace {

void store_word(uint8_t* bits, int64_t bytes_left, uint32_t word) {
  if (bytes_left >= 4) {
    std::memcpy(bits, &word, 4);
  } else {
    for (int64_t i = 0; i < bytes_left; ++i) bits[i] = static_cast<uint8_t>(word >> (8 * i));
  }
}

#if defined(__AVX512VBMI2__)
// A register compress and a plain store take 5.7 cycles, a compress to memory about 140 (Zen 4, Nov
// 2026). Full stores would write into the next row, which may be another thread's: the last ones of a
// row are masked.

uint32_t kept_of(const uint16_t* row, int64_t count) {
  const __mmask32 present = bits_below(static_cast<uint32_t>(count));
  return _mm512_test_epi16_mask(_mm512_maskz_loadu_epi16(present, row), _mm512_set1_epi16(0x7fff));
}

uint32_t kept_of(const uint32_t* row, int64_t count) {
  const __mmask32 present = bits_below(static_cast<uint32_t>(count));
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const uint32_t low = _mm512_test_epi32_mask(_mm512_maskz_loadu_epi32(present, row), magnitude);
  const uint32_t high = _mm512_test_epi32_mask(_mm512_maskz_loadu_epi32(present >> 16, row + 16), magnitude);
  return low | high << 16;
}

void compact_word(const uint16_t* row, uint32_t word, uint16_t* values, int64_t room) {
  // Bits past the last column are zero, and a masked load does not touch what it does not load.
  const __m512i dense = _mm512_maskz_compress_epi16(word, _mm512_maskz_loadu_epi16(word, row));
  _mm512_mask_storeu_epi16(values, room >= kWordBits ? ~0u : bits_below(popcount(word)), dense);
}

void compact_word(const uint32_t* row, uint32_t word, uint32_t* values, int64_t) {
  const __mmask16 low = word & 0xffff, high = word >> 16;
  const __m512i first = _mm512_maskz_compress_epi32(low, _mm512_maskz_loadu_epi32(low, row));
  const __m512i second = _mm512_maskz_compress_epi32(high, _mm512_maskz_loadu_epi32(high, row + 16));
  _mm512_mask_storeu_epi32(values, bits_below(popcount(low)), first);
  _mm512_mask_storeu_epi32(values + popcount(low), bits_below(popcount(high)), second);
}

void expand_word(const uint16_t* values, uint32_t word, uint16_t* row, __mmask32 present) {
  const __m512i dense = _mm512_maskz_loadu_epi16(bits_below(popcount(word)), values);
  _mm512_mask_storeu_epi16(row, present, _mm512_maskz_expand_epi16(word, dense));
}

void expand_word(const uint32_t* values, uint32_t word, uint32_t* row, __mmask32 present) {
  const __mmask16 low = word & 0xffff, high = word >> 16;
  const __m512i first = _mm512_maskz_loadu_epi32(bits_below(popcount(low)), values);
  const __m512i second = _mm512_maskz_loadu_epi32(bits_below(popcount(high)), values + popcount(low));
  _mm512_mask_storeu_epi32(row, present, _mm512_maskz_expand_epi32(low, first));
  _mm512_mask_storeu_epi32(row + 16, present >> 16, _mm512_maskz_expand_epi32(high, second));
}

template <typename T>
void compact(const T* row, const uint8_t* bits, T* values, int64_t count, int64_t columns) {
  const int64_t bytes = bitmask_bytes(columns);
  for (int64_t b = 0; b < bytes; b += 4, row += kWordBits) {
    const uint32_t word = load_word(bits + b, bytes - b);
    compact_word(row, word, values, count);
    values += popcount(word);
    count -= popcount(word);
  }
}

template <typename T>
void expand(const T* values, const uint8_t* bits, T* row, int64_t columns) {
  const int64_t bytes = bitmask_bytes(columns);
  for (int64_t b = 0; b < bytes; b += 4, row += kWordBits) {
    const uint32_t word = load_word(bits + b, bytes - b);
    const int64_t left = columns - b * 8;
    expand_word(values, word, row, left >= kWordBits ? ~0u : bits_below(static_cast<uint32_t>(left)));
    values += popcount(word);
  }
}

// Which of up to 32 weights `keep`, 0 or 1 for each, wants.
uint32_t wanted(const uint8_t* keep, int64_t count) {
  const __m256i kept = _mm256_maskz_loadu_epi8(bits_below(static_cast<uint32_t>(count)), keep);
  return _mm256_test_epi8_mask(kept, kept);
}
#else
template <typename T>
void compact(const T* row, const uint8_t* bits, T* values, int64_t, int64_t columns) {
  const int64_t bytes = bitmask_bytes(columns);
  for (int64_t b = 0; b < bytes; b += 4, row += kWordBits) {
    for (uint32_t word = load_word(bits + b, bytes - b); word; word &= word - 1) {
      *values++ = row[__builtin_ctz(word)];
    }
  }
}

template <typename T>
void expand(const T* values, const uint8_t* bits, T* row, int64_t columns) {
  const int64_t bytes = bitmask_bytes(columns);
  std::memset(row, 0, columns * sizeof(T));
  for (int64_t b = 0; b < bytes; b += 4, row += kWordBits) {
    for (uint32_t word = load_word(bits + b, bytes - b); word; word &= word - 1) {
      row[__builtin_ctz(word)] = *values++;
    }
  }
}

uint32_t magnitude_of(uint16_t bits) { return bits & 0x7fffu; }
uint32_t magnitude_of(uint32_t bits) { return bits & 0x7fffffffu; }

template <typename T>
uint32_t kept_of(const T* row, int64_t count) {
  uint32_t word = 0;
  for (int64_t i = 0; i < count; ++i) word |= static_cast<uint32_t>(magnitude_of(row[i]) != 0) << i;
  return word;
}

uint32_t wanted(const uint8_t* keep, int64_t count) {
  uint32_t word = 0;
  for (int64_t i = 0; i < count; ++i) word |= static_cast<uint32_t>(keep[i]) << i;
  return word;
}
#endif

template <typename T>
int64_t bits_of(const T* row, const uint8_t* keep, uint8_t* bits, int64_t columns) {
  const int64_t bytes = bitmask_bytes(columns);
  int64_t kept = 0;
  for (int64_t b = 0; b < bytes; b += 4) {
    const int64_t first = b * 8, count = columns - first < kWordBits ? columns - first : kWordBits;
    uint32_t word = kept_of(row + first, count);
    if (keep) word &= wanted(keep + first, count);
    store_word(bits + b, bytes - b, word);
    kept += popcount(word);
  }
  return kept;
}

}  // namespace

int64_t pack_bits(int item_size, const void* row, const uint8_t* keep, uint8_t* bits, int64_t columns) {
  return item_size == 4 ? bits_of(static_cast<const uint32_t*>(row), keep, bits, columns)
                        : bits_of(static_cast<const uint16_t*>(row), keep, bits, columns);
}

void pack_values(int item_size, const void* row, const uint8_t* bits, void* values, int64_t count,
                 int64_t columns) {
  if (item_size == 4) {
    compact(static_cast<const uint32_t*>(row), bits, static_cast<uint32_t*>(values), count, columns);
  } else {
    compact(static_cast<const uint16_t*>(row), bits, static_cast<uint16_t*>(values), count, columns);
  }
}

void unpack(int item_size, const void* values, const uint8_t* bits, void* row, int64_t columns) {
  if (item_size == 4) {
    expand(static_cast<const uint32_t*>(values), bits, static_cast<uint32_t*>(row), columns);
  } else {
    expand(static_cast<const uint16_t*>(values), bits, static_cast<uint16_t*>(row), columns);
  }
}

int64_t count_bits(const uint8_t* bits, int64_t bytes) {
  int64_t kept = 0, b = 0;
  for (; b + 8 <= bytes; b += 8) {
    uint64_t word;
    std::memcpy(&word, bits + b, 8);
    kept += __builtin_popcountll(word);
  }
  for (; b < bytes; ++b) kept += popcount(bits[b]);
  return kept;
}

}  // namespace mosaic::MOSAIC_ISA
