// SPDX-License-Identifier: Apache-2.0
// What an instruction set provides: serial kernels over a range of rows. The drivers (linear.cpp,
// pack.cpp, ...) cut the work into ranges and share them out; dispatch.cpp picks the table.
#pragma once

#include "mosaic/kernels.h"

namespace mosaic::cpu {

struct LinearTask {
  LinearArgs args;
  const float* x32;     // x in fp32 where the level asked for it, else nullptr
  int64_t fast_values;  // a 64-byte load that starts below this index stays inside `values`
};

struct RadixPass {
  uint32_t prefix;  // the key's digits found so far
  int shift;        // of this pass's digit
  int width;        // of this pass's digit, in bits
};

constexpr int kRadixBins = 2048;

struct KernelTable {
  const char* name;
  bool (*wants_x32)(DType, int64_t rows);  // whether the linear kernel reads x from LinearTask::x32
  void (*linear[3])(const LinearTask&, int64_t begin, int64_t end);
  void (*to_float[3])(const void* from, float* to, int64_t count);

  // Bits of one row; returns its number of kept weights.
  int64_t (*pack_bits[3])(const void* row, uint8_t* bits, int64_t columns);
  // The kept weights of one row to `values`, which has room for `count` and not one more.
  void (*pack_values)(int item_size, const void* row, const uint8_t* bits, void* values, int64_t count,
                      int64_t columns);
  void (*unpack)(int item_size, const void* values, int64_t count, const uint8_t* bits, void* row,
                 int64_t columns);
  int64_t (*count_bits)(const uint8_t* bits, int64_t bytes);

  double (*score_sum[3])(const void* row, const float* norms, int64_t columns);
  void (*count_outliers[3])(const void* row, const float* norms, int64_t columns, const float* thresholds,
                            int64_t alpha_count, int64_t* counts);
  void (*column_sums[3])(const void* x, int64_t rows, int64_t stride, int64_t columns, double* sums);

  // Adds the digits of all keys that start with the prefix to `bins`; false when a score is not finite.
  bool (*radix_count)(const float* scores, int64_t count, RadixPass pass, uint32_t* bins);
  // Keeps every key above `threshold` and the first `ties` equal to it.
  void (*mark_top)(const float* scores, int64_t count, uint32_t threshold, int64_t ties, uint8_t* mask);
  // Keeps n of every m; false when a score is not finite.
  bool (*mark_groups)(const float* scores, int64_t groups, int64_t n, int64_t m, uint8_t* mask);

  // Sweeps rows [begin, end); false when an n:m score is not finite. `tile` holds obs_tile_floats(block).
  bool (*obs_rows)(const ObsArgs&, int64_t begin, int64_t end, float* tile);
};

constexpr int64_t kObsLanes = 16;
inline int64_t obs_tile_floats(int64_t block) { return 3 * block * kObsLanes; }

const KernelTable& kernels();

}  // namespace mosaic::cpu
