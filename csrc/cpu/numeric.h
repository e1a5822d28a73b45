// SPDX-License-Identifier: Apache-2.0
// Scalar conversions, compiled into every instruction set's files (hence always_inline, see format.h).
#pragma once

#include <cstring>

#include "mosaic/format.h"

namespace mosaic::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

MOSAIC_HD float to_float(float v) { return v; }

MOSAIC_HD float to_float(BFloat16 v) {
  const uint32_t wide = static_cast<uint32_t>(v.bits) << 16;
  float result;
  std::memcpy(&result, &wide, 4);
  return result;
}

MOSAIC_HD float to_float(Half v) {
  _Float16 half;
  std::memcpy(&half, &v.bits, 2);
  return static_cast<float>(half);
}

MOSAIC_HD void store(float v, float* to) { *to = v; }

// Round to nearest, ties to even; NaN stays NaN.
MOSAIC_HD void store(float v, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  to->bits = v != v ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

MOSAIC_HD void store(float v, Half* to) {
  const _Float16 half = static_cast<_Float16>(v);
  std::memcpy(&to->bits, &half, 2);
}

// Up to four bytes of a canonical row as one word; never reads past the row.
MOSAIC_HD uint32_t load_word(const uint8_t* bits, int64_t bytes_left) {
  uint32_t word = 0;
  if (bytes_left >= 4) {
    std::memcpy(&word, bits, 4);
  } else {
    for (int64_t i = 0; i < bytes_left; ++i) word |= static_cast<uint32_t>(bits[i]) << (8 * i);
  }
  return word;
}

}  // namespace mosaic::cpu
