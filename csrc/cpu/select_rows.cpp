// SPDX-License-Identifier: Apache-2.0
// Top-k by radix: a float's bits, suitably flipped, order like the float, so the k-th largest key is
// found digit by digit from counts, and ties follow the order of the index.
#include "cpu/lanes.h"
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

Bits keys_of(Lanes scores) {
  const Bits bits = (Bits)(scores + 0.0f);
  const Bits negative = (Bits)((Flags)bits >> 31);
  return bits ^ (negative | 0x80000000u);
}

bool all_finite(const float* scores, int64_t count) {
  Flags bad = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    bad |= ((Bits)load_lanes(scores + i) & 0x7f800000u) == 0x7f800000u;
  }
  bool finite = mask_of(bad) == 0;
  for (; i < count; ++i) finite &= __builtin_isfinite(scores[i]);
  return finite;
}

// The first pass: every key counts, and this is where NaN and Inf are found.
bool count_first(const float* scores, int64_t count, int shift, uint32_t* bins) {
  Flags bad = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Lanes own = load_lanes(scores + i);
    bad |= ((Bits)own & 0x7f800000u) == 0x7f800000u;
    uint32_t digits[kLanes];
    const Bits found = keys_of(own) >> shift;
    std::memcpy(digits, &found, sizeof found);
    for (int lane = 0; lane < kLanes; ++lane) ++bins[lane % kRadixTables * kRadixBins + digits[lane]];
  }
  bool finite = mask_of(bad) == 0;
  for (; i < count; ++i) {
    finite &= __builtin_isfinite(scores[i]);
    ++bins[key_of(scores[i]) >> shift];
  }
  return finite;
}

}  // namespace

bool radix_count(const float* scores, int64_t count, RadixPass pass, uint32_t* bins) {
  const int above = pass.shift + pass.width;
  if (above == 32) return count_first(scores, count, pass.shift, bins);
  const uint32_t digit_mask = (1u << pass.width) - 1;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Bits keys = keys_of(load_lanes(scores + i));
    for (uint32_t hits = mask_of((keys >> above) == pass.prefix); hits; hits &= hits - 1) {
      ++bins[(key_of(scores[i + __builtin_ctz(hits)]) >> pass.shift) & digit_mask];
    }
  }
  for (; i < count; ++i) {
    const uint32_t key = key_of(scores[i]);
    if (key >> above == pass.prefix) ++bins[(key >> pass.shift) & digit_mask];
  }
  return true;
}

int64_t mark_top(const float* scores, int64_t count, uint32_t threshold, int64_t ties, uint8_t* mask) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Bits keys = keys_of(load_lanes(scores + i));
    const Bytes kept = __builtin_convertvector((Bits)(keys > threshold), Bytes) & 1;
    std::memcpy(mask + i, &kept, sizeof kept);
    for (uint32_t equal = mask_of(keys == threshold); equal && ties; equal &= equal - 1, --ties) {
      mask[i + __builtin_ctz(equal)] = 1;
    }
  }
  for (; i < count; ++i) {
    const uint32_t key = key_of(scores[i]);
    const bool tie = key == threshold && ties > 0;
    mask[i] = key > threshold || tie;
    ties -= tie;
  }
  return ties;
}

namespace {

// m a power of two up to the lanes: every lane meets the m - 1 others of its group by rotation.
void mark_small_groups(const float* scores, int64_t count, int64_t n, int m, uint8_t* mask) {
  Flags source[kLanes], wraps[kLanes];
  for (int s = 1; s < m; ++s) {
    for (int i = 0; i < kLanes; ++i) {
      const int place = i & (m - 1);
      source[s][i] = (i - place) | ((place + s) & (m - 1));
      wraps[s][i] = place + s >= m ? -1 : 0;  // the other one has the lower index and wins a tie
    }
  }
  const auto keep = [&](Lanes own) {
    Flags rank = {};
    for (int s = 1; s < m; ++s) {
      const Lanes other = __builtin_shuffle(own, source[s]);
      rank -= (other > own) | ((other == own) & wraps[s]);
    }
    return __builtin_convertvector((Bits)(rank < static_cast<int32_t>(n)), Bytes) & 1;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Bytes kept = keep(load_lanes(scores + i));
    std::memcpy(mask + i, &kept, sizeof kept);
  }
  if (i == count) return;
  Lanes last = {};
  std::memcpy(&last, scores + i, (count - i) * sizeof(float));
  const Bytes kept = keep(last);
  std::memcpy(mask + i, &kept, count - i);
}

}  // namespace

bool mark_groups(const float* scores, int64_t groups, int64_t n, int64_t m, uint8_t* mask) {
  if (!all_finite(scores, groups * m)) return false;
  if (m <= kLanes && (m & (m - 1)) == 0) {
    mark_small_groups(scores, groups * m, n, static_cast<int>(m), mask);
    return true;
  }
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
