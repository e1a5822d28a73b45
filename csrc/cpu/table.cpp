// SPDX-License-Identifier: Apache-2.0
// One instruction set's table; compiled once for each.
#include "cpu/rows.h"

#define MOSAIC_TEXT(name) #name
#define MOSAIC_NAME(name) MOSAIC_TEXT(name)
#define MOSAIC_EACH_DTYPE(function) {function<float>, function<BFloat16>, function<Half>}

namespace mosaic::MOSAIC_ISA {

extern const KernelTable kTable;
const KernelTable kTable = {MOSAIC_NAME(MOSAIC_ISA),
                            {MOSAIC_EACH_DTYPE(linear),
                             MOSAIC_EACH_DTYPE(linear_int8),
#if defined(__AVX2__)
                             {nullptr, linear_int8_times_int16<BFloat16>, nullptr},
                             MOSAIC_EACH_DTYPE(linear_int8_times_int8),
                             MOSAIC_EACH_DTYPE(linear_dense)},
#else
                             {},
                             {},
                             {}},
#endif
                            packed_x_size,
                            MOSAIC_EACH_DTYPE(pack_x),
                            x_form,
                            MOSAIC_EACH_DTYPE(round_x),
                            rounded_row_bytes,
                            has_turned_rows,
                            kTurnMultiple,
                            kTurnChunk,
#if defined(__AVX2__)
                            turn_x,
#else
                            nullptr,
#endif
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
                            obs_rows,
                            admm_row,
                            cg_row,
                            MOSAIC_EACH_DTYPE(rms_norm),
                            MOSAIC_EACH_DTYPE(rotate),
                            MOSAIC_EACH_DTYPE(gated),
                            MOSAIC_EACH_DTYPE(add),
                            MOSAIC_EACH_DTYPE(attend),
                            MOSAIC_EACH_DTYPE(attend_join)};

}  // namespace mosaic::MOSAIC_ISA
