// SPDX-License-Identifier: Apache-2.0
// Top-k by radix: a float's bits, suitably flipped, order like the float, so the k-th largest key is
// found digit by digit from counts, and ties follow the order of the index.
#include "cpu/rows.h"

namespace mosaic::MOSAIC_ISA {
namespace {

// Monotone in the score; both zeros have one key. `+ 0.0f` turns -0 into +0.
uint32_t key_of(float score) {
  const float plain = score + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &plain, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

bool all_finite(const float* scores, int64_t count) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, scores + i, 4);
    bad |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return bad == 0;
}

}  // namespace

bool radix_count(const float* scores, int64_t count, RadixPass pass, uint32_t* bins) {
  const uint32_t digit_mask = (1u << pass.width) - 1;
  const int above = pass.shift + pass.width;
  if (above == 32) {  // the first pass: every key counts, and this is where NaN and Inf are found
    for (int64_t i = 0; i < count; ++i) ++bins[key_of(scores[i]) >> pass.shift];
    return all_finite(scores, count);
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = key_of(scores[i]);
    if (key >> above == pass.prefix) ++bins[(key >> pass.shift) & digit_mask];
  }
  return true;
}

void mark_top(const float* scores, int64_t count, uint32_t threshold, int64_t ties, uint8_t* mask) {
  for (int64_t i = 0; i < count; ++i) mask[i] = key_of(scores[i]) > threshold;
  for (int64_t i = 0; ties > 0 && i < count; ++i) {
    if (key_of(scores[i]) != threshold) continue;
    mask[i] = 1;
    --ties;
  }
}

bool mark_groups(const float* scores, int64_t groups, int64_t n, int64_t m, uint8_t* mask) {
  if (!all_finite(scores, groups * m)) return false;
  for (int64_t g = 0; g < groups; ++g, scores += m, mask += m) {
    for (int64_t i = 0; i < m; ++i) {
      int64_t rank = 0;
      for (int64_t j = 0; j < i; ++j) rank += scores[j] >= scores[i];
      for (int64_t j = i + 1; j < m; ++j) rank += scores[j] > scores[i];
      mask[i] = rank < n;
    }
  }
  return true;
}

}  // namespace mosaic::MOSAIC_ISA
