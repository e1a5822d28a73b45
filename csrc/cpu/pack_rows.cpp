// SPDX-License-Identifier: Apache-2.0
// Packing and unpacking one row. Bound by reading the dense row once: 4096x4096 bf16 is 33 MB.
#include "cpu/rows.h"

namespace mosaic::MOSAIC_ISA {
namespace {

void store_word(uint8_t* bits, int64_t bytes_left, uint32_t word) {
  if (bytes_left >= 4) {
    std::memcpy(bits, &word, 4);
  } else {
    for (int64_t i = 0; i < bytes_left; ++i) bits[i] = static_cast<uint8_t>(word >> (8 * i));
  }
}

template <typename T>
void compact(const T* row, const uint8_t* bits, T* values, int64_t columns) {
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

}  // namespace

template <typename T>
int64_t pack_bits(const void* from, uint8_t* bits, int64_t columns) {
  const T* row = static_cast<const T*>(from);
  const int64_t bytes = bitmask_bytes(columns);
  int64_t kept = 0;
  for (int64_t b = 0; b < bytes; b += 4) {
    const int64_t first = b * 8, count = columns - first < kWordBits ? columns - first : kWordBits;
    uint32_t word = 0;
    for (int64_t i = 0; i < count; ++i) {
      word |= static_cast<uint32_t>(magnitude(row[first + i]) != 0) << i;
    }
    store_word(bits + b, bytes - b, word);
    kept += popcount(word);
  }
  return kept;
}

template int64_t pack_bits<float>(const void*, uint8_t*, int64_t);
template int64_t pack_bits<BFloat16>(const void*, uint8_t*, int64_t);
template int64_t pack_bits<Half>(const void*, uint8_t*, int64_t);

void pack_values(int item_size, const void* row, const uint8_t* bits, void* values, int64_t,
                 int64_t columns) {
  if (item_size == 4) {
    compact(static_cast<const uint32_t*>(row), bits, static_cast<uint32_t*>(values), columns);
  } else {
    compact(static_cast<const uint16_t*>(row), bits, static_cast<uint16_t*>(values), columns);
  }
}

void unpack(int item_size, const void* values, int64_t, const uint8_t* bits, void* row, int64_t columns) {
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
