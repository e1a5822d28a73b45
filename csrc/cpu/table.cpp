// SPDX-License-Identifier: Apache-2.0
// One instruction set's table; compiled once for each.
#include "cpu/rows.h"

#define MOSAIC_TEXT(name) #name
#define MOSAIC_NAME(name) MOSAIC_TEXT(name)
#define MOSAIC_EACH_DTYPE(function) {function<float>, function<BFloat16>, function<Half>}
#if defined(__AVX512BF16__)
#define MOSAIC_DENSE MOSAIC_EACH_DTYPE(linear_dense)
#else
#define MOSAIC_DENSE \
  {                  \
  }
#endif

namespace mosaic::MOSAIC_ISA {

extern const KernelTable kTable;
const KernelTable kTable = {MOSAIC_NAME(MOSAIC_ISA),
                            {MOSAIC_EACH_DTYPE(linear), MOSAIC_EACH_DTYPE(linear_int8),
                             MOSAIC_EACH_DTYPE(linear_int8_times_int8), MOSAIC_DENSE},
                            packed_x_size,
                            MOSAIC_EACH_DTYPE(pack_x),
                            x_form,
                            MOSAIC_EACH_DTYPE(round_x),
                            rounded_row_bytes,
                            pack_bits,
                            pack_values,
                            unpack,
                            count_bits,
                            MOSAIC_EACH_DTYPE(score_row),
                            MOSAIC_EACH_DTYPE(score_sum),
                            MOSAIC_EACH_DTYPE(count_outliers),
                            MOSAIC_EACH_DTYPE(column_sums),
                            bounds,
                            count_from,
                            split,
                            mark_top,
                            mark_groups,
                            obs_rows};

}  // namespace mosaic::MOSAIC_ISA
