// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cpu/table.h"
#include "cpu/thread_pool.h"

namespace mosaic::cpu {
namespace {

// Rows in chunks of 64 K elements: 256 KB of each matrix.
template <typename Body>
void for_each_row(int threads, int64_t rows, int64_t columns, const Body& body) {
  const int64_t step = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, columns));
  parallel_for(threads, (rows + step - 1) / step, [&](int64_t c) {
    for (int64_t r = c * step; r < std::min(rows, (c + 1) * step); ++r) body(r);
  });
}

}  // namespace

Status admm_step(const AdmmArgs& a) {
  const auto run = kernels().admm_row;
  for_each_row(a.threads, a.rows, a.columns, [&](int64_t r) {
    const int64_t at = r * a.columns;
    run(a.proposal + at, a.keep + at, a.gradient + at, a.penalty, a.columns, a.target + at);
  });
  return {};
}

Status cg_step(const CgArgs& a) {
  const auto run = kernels().cg_row;
  for_each_row(a.threads, a.rows, a.columns, [&](int64_t r) {
    const int64_t at = r * a.columns;
    a.energy[r] = run(a.image + at, a.keep + at, a.energy[r], a.columns, a.solution + at, a.residual + at,
                      a.direction + at);
  });
  return {};
}

}  // namespace mosaic::cpu
