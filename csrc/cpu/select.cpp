// SPDX-License-Identifier: Apache-2.0
// Exact top-k of a matrix, of each row, or of every m neighbours.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/table.h"
#include "cpu/thread_pool.h"

namespace mosaic::cpu {
namespace {

constexpr int kPasses = 3;
constexpr RadixPass kPass[kPasses] = {{0, 21, 11}, {0, 10, 11}, {0, 0, 10}};
constexpr int64_t kChunkScores = 1 << 17;
constexpr int64_t kMaxSlices = 64;
constexpr int64_t kRankGroup = 64;  // larger groups are selected by radix, as rows are

constexpr Status kNonFinite = {Code::kNonFinite, ""};  // the border adds the op's message

// Finds the digit of the k-th largest key among counted ones; k becomes its rank among that digit's keys.
uint32_t kth_digit(const uint32_t* bins, int64_t* k) {
  uint32_t digit = kRadixBins - 1;
  for (; digit > 0 && bins[digit] < *k; --digit) *k -= bins[digit];
  return digit;
}

// One contiguous run of scores, on one thread. 0 < keep <= count.
bool select_run(const KernelTable& table, const float* scores, int64_t count, int64_t keep, uint32_t* bins,
                uint8_t* mask) {
  uint32_t prefix = 0;
  for (RadixPass pass : kPass) {
    pass.prefix = prefix;
    std::memset(bins, 0, kRadixBins * sizeof(uint32_t));
    if (!table.radix_count(scores, count, pass, bins)) return false;
    prefix = prefix << pass.width | kth_digit(bins, &keep);
  }
  table.mark_top(scores, count, prefix, keep, mask);
  return true;
}

Status select_rows(const SelectArgs& a, int64_t rows, int64_t columns, bool one_count) {
  const KernelTable& table = kernels();
  const int64_t step = std::max<int64_t>(1, kChunkScores / std::max<int64_t>(1, columns));
  std::atomic<bool> finite{true}, memory{true};
  parallel_for(a.threads, (rows + step - 1) / step, [&](int64_t c) {
    auto* bins = static_cast<uint32_t*>(scratch(0, kRadixBins * sizeof(uint32_t)));
    if (!bins) {
      memory = false;
      return;
    }
    for (int64_t r = c * step; r < std::min(rows, (c + 1) * step); ++r) {
      const int64_t keep = a.keep[one_count ? 0 : r];
      // Keeping none still looks for NaN: rank 1 is found and the mask cleared.
      if (columns > 0 && !select_run(table, a.scores + r * columns, columns, std::max<int64_t>(keep, 1), bins,
                                     a.mask + r * columns)) {
        finite = false;
      }
      if (keep == 0) std::memset(a.mask + r * columns, 0, columns);
    }
  });
  if (!memory) return {Code::kUnavailable, "select: out of memory"};
  return finite ? Status{} : kNonFinite;
}

// The whole matrix: slices count into bins of their own, and a slice's share of the ties follows from
// what the last pass counted in the slices before it.
Status select_matrix(const SelectArgs& a) {
  const KernelTable& table = kernels();
  const int64_t count = a.rows * a.columns;
  if (count == 0) return {};
  const int64_t slices = std::min(kMaxSlices, (count + kChunkScores - 1) / kChunkScores);
  auto* bins = static_cast<uint32_t*>(scratch(0, (slices + 1) * kRadixBins * sizeof(uint32_t)));
  if (!bins) return {Code::kUnavailable, "select: out of memory"};
  uint32_t* total = bins + slices * kRadixBins;
  const auto first = [&](int64_t s) { return count / slices * s + std::min(s, count % slices); };
  uint32_t prefix = 0;
  int64_t keep = std::max<int64_t>(a.keep[0], 1);
  std::atomic<bool> finite{true};
  for (RadixPass pass : kPass) {
    pass.prefix = prefix;
    std::memset(bins, 0, (slices + 1) * kRadixBins * sizeof(uint32_t));
    parallel_for(a.threads, slices, [&](int64_t s) {
      if (!table.radix_count(a.scores + first(s), first(s + 1) - first(s), pass, bins + s * kRadixBins))
        finite = false;
    });
    if (!finite) return kNonFinite;
    for (int64_t s = 0; s < slices; ++s) {
      for (int64_t b = 0; b < kRadixBins; ++b) total[b] += bins[s * kRadixBins + b];
    }
    prefix = prefix << pass.width | kth_digit(total, &keep);
  }
  if (a.keep[0] == 0) {
    std::memset(a.mask, 0, count);
    return {};
  }
  const uint32_t last_digit = prefix & ((1u << kPass[kPasses - 1].width) - 1);
  int64_t ties[kMaxSlices];
  for (int64_t s = 0; s < slices; ++s) {
    ties[s] = std::min<int64_t>(keep, bins[s * kRadixBins + last_digit]);
    keep -= ties[s];
  }
  parallel_for(a.threads, slices, [&](int64_t s) {
    table.mark_top(a.scores + first(s), first(s + 1) - first(s), prefix, ties[s], a.mask + first(s));
  });
  return {};
}

Status select_groups(const SelectArgs& a) {
  const int64_t n = a.keep[0], m = a.keep[1], groups = a.rows * a.columns / m;
  if (m > kRankGroup) return select_rows(a, groups, m, true);
  const KernelTable& table = kernels();
  const int64_t step = std::max<int64_t>(1, kChunkScores / m);
  std::atomic<bool> finite{true};
  parallel_for(a.threads, (groups + step - 1) / step, [&](int64_t c) {
    const int64_t begin = c * step, end = std::min(groups, begin + step);
    if (!table.mark_groups(a.scores + begin * m, end - begin, n, m, a.mask + begin * m)) finite = false;
  });
  return finite ? Status{} : kNonFinite;
}

}  // namespace

Status select(const SelectArgs& args) {
  switch (args.scope) {
    case Scope::kMatrix:
      return select_matrix(args);
    case Scope::kRow:
      return select_rows(args, args.rows, args.columns, false);
    case Scope::kGroup:
      return select_groups(args);
  }
  return invalid("select: unknown scope");
}

}  // namespace mosaic::cpu
