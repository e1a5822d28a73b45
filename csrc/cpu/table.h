// SPDX-License-Identifier: Apache-2.0
// What an instruction set provides: serial kernels over a range of rows. The drivers (linear.cpp,
// pack.cpp, ...) cut the work into ranges and share them out; dispatch.cpp picks the table.
#pragma once

#include "mosaic/kernels.h"

namespace mosaic::cpu {

// Rows of x go through the linear kernels in blocks of this many (the last one may be smaller).
constexpr int64_t kRowBlock = 8;

struct LinearTask {
  LinearArgs args;
  // x interleaved block by block, [word][row of the block][32], columns past the last one zero; in the
  // element type that packed_x_size tells. Block b starts at row 8 b of 32 * bitmask_words columns each.
  const void* x;
  int64_t fast_values;  // a 64-byte load that starts below this index stays inside `values`
};

struct RadixPass {
  uint32_t prefix;  // the key's digits found so far
  int shift;        // of this pass's digit
  int width;        // of this pass's digit, in bits
};

constexpr int kRadixBins = 2048;
// Neighbours often share their first digit, and an increment waits for the last one of the same bin: the
// first pass counts in four tables by turns. 4096x4096 on one thread took 39 ms in one table (Zen 4, Nov 2026).
constexpr int kRadixTables = 4;

struct KernelTable {
  const char* name;

  // All rows of x against weight rows [begin, end).
  void (*linear[3])(const LinearTask&, int64_t begin, int64_t end);
  // Bytes of an element of LinearTask::x: 4 (fp32), or 2 where the kernel multiplies x as it is.
  int (*packed_x_size)(DType);
  // Interleaves up to kRowBlock rows of x.
  void (*pack_x[3])(const void* x, int64_t rows, int64_t in_features, void* packed);

  // Bits of one row: of what is not zero and, unless `keep` is null, kept; returns their number.
  int64_t (*pack_bits)(int item_size, const void* row, const uint8_t* keep, uint8_t* bits, int64_t columns);
  // The kept weights of one row to `values`, which has room for `count` and not one more.
  void (*pack_values)(int item_size, const void* row, const uint8_t* bits, void* values, int64_t count,
                      int64_t columns);
  void (*unpack)(int item_size, const void* values, const uint8_t* bits, void* row, int64_t columns);
  int64_t (*count_bits)(const uint8_t* bits, int64_t bytes);

  // |weight| * norm of a piece of a row.
  void (*score_row[3])(const void* row, const float* norms, int64_t columns, float* scores);
  double (*score_sum[3])(const void* row, const float* norms, int64_t columns);
  void (*count_outliers[3])(const void* row, const float* norms, int64_t columns, const float* thresholds,
                            int64_t alpha_count, int64_t* counts);
  void (*column_sums[3])(const void* x, int64_t rows, int64_t stride, int64_t columns, double* sums);

  // Adds the digits of all keys that start with the prefix to `bins`, [kRadixTables][kRadixBins] of which
  // later passes use the first table; false when the first pass meets a score that is not finite.
  bool (*radix_count)(const float* scores, int64_t count, RadixPass pass, uint32_t* bins);
  // Keeps every key above `threshold` and the first `ties` equal to it; returns how many ties are left.
  int64_t (*mark_top)(const float* scores, int64_t count, uint32_t threshold, int64_t ties, uint8_t* mask);
  // Keeps n of every m; false when a score is not finite.
  bool (*mark_groups)(const float* scores, int64_t groups, int64_t n, int64_t m, uint8_t* mask);

  // Sweeps rows [begin, end); false when an n:m score is not finite. `tile` holds obs_tile_floats(block).
  bool (*obs_rows)(const ObsArgs&, int64_t begin, int64_t end, float* tile);
};

constexpr int64_t kObsLanes = 16;  // rows of a tile, at most
inline int64_t obs_tile_floats(int64_t block) { return 3 * block * kObsLanes; }

const KernelTable& kernels();

}  // namespace mosaic::cpu
