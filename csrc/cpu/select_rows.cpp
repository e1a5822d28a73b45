// SPDX-License-Identifier: Apache-2.0
// Top-k without sorting: scores are counted against thresholds, then marked, all in vectors.
#include "cpu/lanes.h"
#include "cpu/rows.h"

namespace mosaic::MOSAIC_ISA {
namespace {

static_assert(kLanes <= kSplitSlack);

Flags not_finite(Lanes v) { return ((Bits)v & 0x7f800000u) == 0x7f800000u; }

bool all_finite(const float* scores, int64_t count) {
  Flags bad = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) bad |= not_finite(load_lanes(scores + i));
  bool finite = mask_of(bad) == 0;
  for (; i < count; ++i) finite &= __builtin_isfinite(scores[i]);
  return finite;
}

int64_t sum_of(Flags counts) {
  int64_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += counts[lane];
  return sum;
}

}  // namespace

bool bounds(const float* scores, int64_t count, float* least, float* greatest) {
  float low = scores[0], high = scores[0];
  Lanes lows = broadcast(low), highs = lows;
  Flags bad = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Lanes own = load_lanes(scores + i);
    bad |= not_finite(own);
    lows = own < lows ? own : lows;
    highs = own > highs ? own : highs;
  }
  bool finite = mask_of(bad) == 0;
  const auto meet = [&](float a, float b) {
    low = a < low ? a : low;
    high = b > high ? b : high;
  };
  for (int lane = 0; lane < kLanes; ++lane) meet(lows[lane], highs[lane]);
  for (; i < count; ++i) {
    finite &= __builtin_isfinite(scores[i]);
    meet(scores[i], scores[i]);
  }
  *least = low;
  *greatest = high;
  return finite;
}

int64_t count_from(const float* scores, int64_t count, float from) {
  Flags above = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) above -= load_lanes(scores + i) >= from;
  int64_t sum = sum_of(above);
  for (; i < count; ++i) sum += scores[i] >= from;
  return sum;
}

void split(const float* scores, int64_t count, Split* state) {
  const float low = state->low, high = state->high;
  int64_t found = state->found;
  Flags above = {}, bad = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Lanes own = load_lanes(scores + i);
    const Flags top = own >= high;
    const uint32_t chosen = mask_of((own >= low) & ~top);
    bad |= not_finite(own);
    above -= top;
    if (found <= state->room) store_chosen(state->between + found, own, chosen);
    found += __builtin_popcount(chosen);
  }
  state->finite &= mask_of(bad) == 0;
  state->above += sum_of(above);
  for (; i < count; ++i) {
    state->finite &= __builtin_isfinite(scores[i]);
    state->above += scores[i] >= high;
    if (scores[i] >= low && !(scores[i] >= high)) {
      if (found < state->room) state->between[found] = scores[i];
      ++found;
    }
  }
  state->found = found;
}

int64_t mark_top(const float* scores, int64_t count, Cut cut, uint8_t* mask) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Lanes own = load_lanes(scores + i);
    const Bytes kept = __builtin_convertvector((Bits)(own >= cut.from), Bytes) & 1;
    std::memcpy(mask + i, &kept, sizeof kept);
    if (cut.ties == 0) continue;
    for (uint32_t equal = mask_of(own == cut.tie); equal && cut.ties; equal &= equal - 1, --cut.ties) {
      mask[i + __builtin_ctz(equal)] = 1;
    }
  }
  for (; i < count; ++i) {
    const bool tie = scores[i] == cut.tie && cut.ties > 0;
    mask[i] = scores[i] >= cut.from || tie;
    cut.ties -= tie;
  }
  return cut.ties;
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
