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

constexpr int64_t kPiece = 4096;  // scores that are worked out together: 16 KB, they stay in L1

constexpr int64_t kTableBytes = kRadixBins * sizeof(uint32_t);

constexpr Status kNonFinite = {Code::kNonFinite, ""};  // the border adds the op's message

const Status kNoMemory = {Code::kUnavailable, "select: out of memory"};

// Where scores come from: memory, or a product that is worked out for each pass again. Storing 4096x4096
// products takes longer than all three passes read (fresh pages, 64 MB).
class Scores {
 public:
  Scores(const SelectArgs& a, const KernelTable& table)
      : args_(a), score_row_(table.score_row[static_cast<int>(a.dtype)]) {}

  bool stored() const { return args_.scores != nullptr; }

  // Scores [begin, begin + count) of one row, in memory or in `buffer`.
  const float* read(int64_t begin, int64_t count, float* buffer) const {
    if (stored()) return args_.scores + begin;
    const auto* weight = static_cast<const char*>(args_.weight) + begin * item_size(args_.dtype);
    score_row_(weight, args_.column_norms + begin % args_.columns, count, buffer);
    return buffer;
  }

  // Calls body(begin, scores, count) for pieces of [begin, end), as long as it returns true. A count is a
  // multiple of `unit` where rows and the range are.
  template <typename Body>
  bool in_pieces(int64_t begin, int64_t end, const Body& body, int64_t unit = 1) const {
    alignas(64) float buffer[kPiece];
    while (begin < end) {
      int64_t count = end - begin;
      if (!stored()) count = std::min({count, kPiece / unit * unit, args_.columns - begin % args_.columns});
      if (!body(begin, read(begin, count, buffer), count)) return false;
      begin += count;
    }
    return true;
  }

 private:
  const SelectArgs& args_;
  void (*score_row_)(const void*, const float*, int64_t, float*);
};

// The first pass counts in all tables, the others in one; afterwards that one holds everything.
constexpr int tables(int pass) { return pass == 0 ? kRadixTables : 1; }

void add_up(uint32_t* bins, int tables) {
  for (int t = 1; t < tables; ++t) {
    for (int64_t b = 0; b < kRadixBins; ++b) bins[b] += bins[t * kRadixBins + b];
  }
}

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
  for (int p = 0; p < kPasses; ++p) {
    RadixPass pass = kPass[p];
    pass.prefix = prefix;
    std::memset(bins, 0, tables(p) * kTableBytes);
    if (!table.radix_count(scores, count, pass, bins)) return false;
    add_up(bins, tables(p));
    prefix = prefix << pass.width | kth_digit(bins, &keep);
  }
  table.mark_top(scores, count, prefix, keep, mask);
  return true;
}

Status select_rows(const SelectArgs& a, int64_t rows, int64_t columns, bool one_count) {
  const KernelTable& table = kernels();
  const Scores source(a, table);
  const int64_t step = std::max<int64_t>(1, kChunkScores / std::max<int64_t>(1, columns));
  std::atomic<bool> finite{true}, memory{true};
  parallel_for(a.threads, (rows + step - 1) / step, [&](int64_t c) {
    auto* bins = static_cast<uint32_t*>(scratch(0, kRadixTables * kTableBytes));
    auto* buffer = source.stored() ? nullptr : static_cast<float*>(scratch(1, columns * 4));
    if (!bins || (!buffer && !source.stored())) {
      memory = false;
      return;
    }
    for (int64_t r = c * step; r < std::min(rows, (c + 1) * step); ++r) {
      const int64_t keep = a.keep[one_count ? 0 : r];
      // Keeping none still looks for NaN: rank 1 is found and the mask cleared.
      if (columns > 0 && !select_run(table, source.read(r * columns, columns, buffer), columns,
                                     std::max<int64_t>(keep, 1), bins, a.mask + r * columns)) {
        finite = false;
      }
      if (keep == 0) std::memset(a.mask + r * columns, 0, columns);
    }
  });
  if (!memory) return kNoMemory;
  return finite ? Status{} : kNonFinite;
}

// The whole matrix: slices count into bins of their own, and a slice's share of the ties follows from
// what the last pass counted in the slices before it.
Status select_matrix(const SelectArgs& a) {
  const KernelTable& table = kernels();
  const Scores source(a, table);
  const int64_t count = a.rows * a.columns;
  if (count == 0) return {};
  const int64_t slices = std::min(kMaxSlices, (count + kChunkScores - 1) / kChunkScores);
  constexpr int64_t kSliceBins = kRadixTables * kRadixBins;
  auto* bins = static_cast<uint32_t*>(scratch(0, slices * kSliceBins * 4));
  auto* total = static_cast<uint32_t*>(scratch(1, kTableBytes));
  if (!bins || !total) return kNoMemory;
  const auto first = [&](int64_t s) { return count / slices * s + std::min(s, count % slices); };
  uint32_t prefix = 0;
  int64_t keep = std::max<int64_t>(a.keep[0], 1);
  std::atomic<bool> finite{true};
  for (int p = 0; p < kPasses; ++p) {
    RadixPass pass = kPass[p];
    pass.prefix = prefix;
    parallel_for(a.threads, slices, [&](int64_t s) {
      uint32_t* own = bins + s * kSliceBins;
      std::memset(own, 0, tables(p) * kTableBytes);
      const auto counted = [&](int64_t, const float* scores, int64_t n) {
        return table.radix_count(scores, n, pass, own);
      };
      if (!source.in_pieces(first(s), first(s + 1), counted)) finite = false;
      add_up(own, tables(p));
    });
    if (!finite) return kNonFinite;
    std::memset(total, 0, kTableBytes);
    for (int64_t s = 0; s < slices; ++s) {
      for (int64_t b = 0; b < kRadixBins; ++b) total[b] += bins[s * kSliceBins + b];
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
    ties[s] = std::min<int64_t>(keep, bins[s * kSliceBins + last_digit]);
    keep -= ties[s];
  }
  parallel_for(a.threads, slices, [&](int64_t s) {
    source.in_pieces(first(s), first(s + 1), [&](int64_t begin, const float* scores, int64_t n) {
      ties[s] = table.mark_top(scores, n, prefix, ties[s], a.mask + begin);
      return true;
    });
  });
  return {};
}

Status select_groups(const SelectArgs& a) {
  const int64_t n = a.keep[0], m = a.keep[1], groups = a.rows * a.columns / m;
  if (m > kRankGroup) return select_rows(a, groups, m, true);
  const KernelTable& table = kernels();
  const Scores source(a, table);
  const int64_t step = std::max<int64_t>(1, kChunkScores / m);
  std::atomic<bool> finite{true};
  parallel_for(a.threads, (groups + step - 1) / step, [&](int64_t c) {
    const int64_t begin = c * step * m, end = std::min(groups, (c + 1) * step) * m;
    const auto marked = [&](int64_t at, const float* scores, int64_t count) {
      return table.mark_groups(scores, count / m, n, m, a.mask + at);
    };
    if (!source.in_pieces(begin, end, marked, m)) finite = false;
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
