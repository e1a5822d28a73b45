// SPDX-License-Identifier: Apache-2.0
// What the vector kernels of linear share: blocks of rows of x, and the rows near the end of the values.
#pragma once

#include "cpu/rows.h"

namespace mosaic::MOSAIC_ISA {

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls run(n, Count<N>()) for each block of N <= kRowBlock rows of x, the first of which is n.
template <typename Run>
void for_each_block(int64_t rows, const Run& run) {
  static_assert(kRowBlock == 8, "one case for each size of a block");
  for (int64_t n = 0; n < rows; n += kRowBlock) {
    switch (rows - n) {
      case 1:
        run(n, Count<1>());
        break;
      case 2:
        run(n, Count<2>());
        break;
      case 3:
        run(n, Count<3>());
        break;
      case 4:
        run(n, Count<4>());
        break;
      case 5:
        run(n, Count<5>());
        break;
      case 6:
        run(n, Count<6>());
        break;
      case 7:
        run(n, Count<7>());
        break;
      default:
        run(n, Count<8>());
    }
  }
}

// The first row of [begin, end) from which a full load might pass the end of the values.
MOSAIC_HD int64_t first_guarded_row(const LinearTask& task, int64_t begin, int64_t end) {
  while (end > begin && task.args.offsets[end] >= task.fast_values) --end;
  return end;
}

}  // namespace mosaic::MOSAIC_ISA
