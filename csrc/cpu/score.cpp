// SPDX-License-Identifier: Apache-2.0
// Outlier statistics in two reads of the weight (mean, then counts), column sums in one read of x.
#include <algorithm>

#include "cpu/table.h"
#include "cpu/thread_pool.h"

namespace mosaic::cpu {
namespace {

constexpr int64_t kChunkWeights = 1 << 16;
constexpr int64_t kColumnBlock = 512;  // 4 KB of sums and 1 KB of a bf16 row: both stay in L1
constexpr int64_t kMaxAlphas = 64;

}  // namespace

Status outlier_stats(const OutlierArgs& a) {
  if (a.alpha_count > kMaxAlphas) return invalid("outlier_stats takes at most 64 alphas");
  const KernelTable& table = kernels();
  const int kind = static_cast<int>(a.dtype);
  const int64_t row_bytes = a.columns * item_size(a.dtype);
  const int64_t step = std::max<int64_t>(1, kChunkWeights / std::max<int64_t>(1, a.columns));
  const int64_t chunks = (a.rows + step - 1) / step;
  // One partial result per chunk, added in order: the same total for any number of threads.
  auto* sums = static_cast<double*>(scratch(0, chunks * 8));
  auto* counts = static_cast<int64_t*>(scratch(1, chunks * a.alpha_count * 8));
  if ((!sums || !counts) && chunks > 0) return {Code::kUnavailable, "outlier_stats: out of memory"};
  const auto row = [&](int64_t r) { return static_cast<const char*>(a.weight) + r * row_bytes; };
  parallel_for(a.threads, chunks, [&](int64_t c) {
    sums[c] = 0;
    for (int64_t r = c * step; r < std::min(a.rows, (c + 1) * step); ++r) {
      sums[c] += table.score_sum[kind](row(r), a.column_norms, a.columns);
    }
  });
  *a.total = 0;
  for (int64_t c = 0; c < chunks; ++c) *a.total += sums[c];
  float thresholds[kMaxAlphas];
  const double mean = *a.total / static_cast<double>(std::max<int64_t>(1, a.rows * a.columns));
  for (int64_t k = 0; k < a.alpha_count; ++k) thresholds[k] = static_cast<float>(a.alphas[k] * mean);
  parallel_for(a.threads, chunks, [&](int64_t c) {
    int64_t* mine = counts + c * a.alpha_count;
    std::fill(mine, mine + a.alpha_count, 0);
    for (int64_t r = c * step; r < std::min(a.rows, (c + 1) * step); ++r) {
      table.count_outliers[kind](row(r), a.column_norms, a.columns, thresholds, a.alpha_count, mine);
    }
  });
  std::fill(a.counts, a.counts + a.alpha_count, 0);
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t k = 0; k < a.alpha_count; ++k) a.counts[k] += counts[c * a.alpha_count + k];
  }
  return {};
}

Status column_square_sums(const ColumnSumsArgs& a) {
  const auto run = kernels().column_sums[static_cast<int>(a.dtype)];
  parallel_for(a.threads, (a.columns + kColumnBlock - 1) / kColumnBlock, [&](int64_t c) {
    const int64_t first = c * kColumnBlock;
    run(static_cast<const char*>(a.x) + first * item_size(a.dtype), a.rows, a.columns,
        std::min(kColumnBlock, a.columns - first), a.sums + first);
  });
  return {};
}

}  // namespace mosaic::cpu
