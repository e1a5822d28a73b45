// SPDX-License-Identifier: Apache-2.0
// SparseGPT's sweep over the columns of one block. Rows never meet, so each lane of a vector sweeps one
// of its own, and the block lives transposed in L1: [column][lane], weights and errors 8 KB each at 128
// columns and 16 lanes. Column j is brought up to date only when the sweep reaches it,
//
//     w[j] -= sum over i < j of error[i] * factor[i][j],
//
// in groups of columns whose sums stay in registers: a load of error[i] serves all of them. Bound by
// the block * block / 2 multiply-adds per row.
#include "cpu/lanes.h"
#include "cpu/rows.h"

namespace mosaic::MOSAIC_ISA {
namespace {

static_assert(kLanes <= kObsLanes, "the driver sizes the tile for that many lanes");

constexpr int kGroup = 8;

// Applies errors [0, known) to columns [first, first + G).
template <int G>
void catch_up(Lanes* weight, const Lanes* errors, const float* factor, int64_t block, int64_t first,
              int64_t known) {
  Lanes sums[G];
  for (int g = 0; g < G; ++g) sums[g] = weight[first + g];
  for (int64_t i = 0; i < known; ++i) {
    const float* row = factor + i * block + first;
    const Lanes error = errors[i];
    for (int g = 0; g < G; ++g) sums[g] -= error * row[g];
  }
  for (int g = 0; g < G; ++g) weight[first + g] = sums[g];
}

void catch_up(Lanes* weight, const Lanes* errors, const float* factor, int64_t block, int64_t first,
              int64_t last, int64_t known) {
  for (; first + kGroup <= last; first += kGroup)
    catch_up<kGroup>(weight, errors, factor, block, first, known);
  for (; first < last; ++first) catch_up<1>(weight, errors, factor, block, first, known);
}

// Keeps the n largest (w / d)^2 of m columns in every lane; ties by the lower column.
bool choose(const Lanes* weight, const float* factor, int64_t block, int64_t first, int64_t n, int64_t m,
            Flags* keep, Lanes* scores) {
  Flags bad = {};
  for (int64_t i = 0; i < m; ++i) {
    const Lanes ratio = weight[first + i] / factor[(first + i) * (block + 1)];
    scores[i] = ratio * ratio;
    bad |= !(scores[i] - scores[i] == 0.0f);  // NaN and Inf alone differ from themselves here
  }
  for (int64_t i = 0; i < m; ++i) {
    Flags rank = {};
    for (int64_t j = 0; j < i; ++j) rank -= scores[j] >= scores[i];
    for (int64_t j = i + 1; j < m; ++j) rank -= scores[j] > scores[i];
    keep[first + i] = rank < static_cast<int32_t>(n);
  }
  int32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= bad[lane];
  return any == 0;
}

}  // namespace

bool obs_rows(const ObsArgs& a, int64_t begin, int64_t end, float* tile) {
  const int64_t block = a.block;
  auto* weight = reinterpret_cast<Lanes*>(tile);
  auto* errors = weight + block;
  auto* keep = reinterpret_cast<Flags*>(errors + block);
  bool finite = true;
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t lanes = end - first < kLanes ? end - first : kLanes;
    for (int64_t lane = 0; lane < kLanes; ++lane) {  // spare lanes repeat the last row
      const int64_t r = first + (lane < lanes ? lane : lanes - 1);
      for (int64_t j = 0; j < block; ++j) {
        weight[j][lane] = a.weight[r * block + j];
        keep[j][lane] = a.keep[r * block + j] ? -1 : 0;
      }
    }
    const int64_t step = a.m ? a.m : kGroup;
    for (int64_t group = 0; group < block; group += step) {
      const int64_t last = group + step < block ? group + step : block;
      catch_up(weight, errors, a.factor, block, group, last, group);
      // The errors of this group are not known yet: their place holds its scores.
      if (a.m && !choose(weight, a.factor, block, group, a.n, a.m, keep, errors + group)) finite = false;
      for (int64_t j = group; j < last; ++j) {
        const Lanes error = (Lanes)((Flags)(weight[j] / a.factor[j * (block + 1)]) & ~keep[j]);
        errors[j] = error;
        weight[j] = (Lanes)((Flags)weight[j] & keep[j]);
        for (int64_t k = j + 1; k < last; ++k) weight[k] -= error * a.factor[j * block + k];
      }
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t at = (first + lane) * block;
      for (int64_t j = 0; j < block; ++j) {
        a.weight[at + j] = weight[j][lane];
        a.errors[at + j] = errors[j][lane];
        a.keep[at + j] = keep[j][lane] ? 1 : 0;
      }
    }
  }
  return finite;
}

}  // namespace mosaic::MOSAIC_ISA
