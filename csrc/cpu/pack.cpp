// SPDX-License-Identifier: Apache-2.0
// Packing in two halves: bits and offsets, from which the caller learns nnz; then the values.
#include <algorithm>
#include <atomic>

#include "cpu/numeric.h"
#include "cpu/table.h"
#include "cpu/thread_pool.h"

namespace mosaic::cpu {
namespace {

constexpr int64_t kChunkColumns = 1 << 16;  // weights in one chunk: 128 KB of bf16

int64_t rows_per_chunk(int64_t columns) {
  return std::max<int64_t>(1, kChunkColumns / std::max<int64_t>(1, columns));
}

template <typename Body>
void for_each_row(int threads, int64_t rows, int64_t columns, const Body& body) {
  const int64_t step = rows_per_chunk(columns);
  parallel_for(threads, (rows + step - 1) / step, [&](int64_t c) {
    const int64_t end = std::min(rows, (c + 1) * step);
    for (int64_t r = c * step; r < end; ++r) body(r);
  });
}

// offsets[r + 1] holds the count of row r; afterwards the number of values before row r + 1.
void accumulate(int64_t* offsets, int64_t rows) {
  offsets[0] = 0;
  for (int64_t r = 0; r < rows; ++r) offsets[r + 1] += offsets[r];
}

const char* at(const void* base, int64_t bytes) { return static_cast<const char*>(base) + bytes; }
char* at(void* base, int64_t bytes) { return static_cast<char*>(base) + bytes; }

}  // namespace

Status pack_bits(const PackBitsArgs& a) {
  const auto run = kernels().pack_bits;
  const int size = item_size(a.dtype);
  const int64_t row_bytes = a.columns * size, mask_bytes = bitmask_bytes(a.columns);
  for_each_row(a.threads, a.rows, a.columns, [&](int64_t r) {
    const uint8_t* keep = a.keep ? a.keep + r * a.columns : nullptr;
    a.offsets[r + 1] = run(size, at(a.weight, r * row_bytes), keep, a.bitmask + r * mask_bytes, a.columns);
  });
  accumulate(a.offsets, a.rows);
  return {};
}

Status pack_values(const PackValuesArgs& a) {
  if (a.offsets[a.rows] != a.nnz) return invalid("pack: values must hold as many weights as the bits count");
  const int size = item_size(a.dtype);
  const auto run = kernels().pack_values;
  for_each_row(a.threads, a.rows, a.columns, [&](int64_t r) {
    run(size, at(a.weight, r * a.columns * size), a.bitmask + r * a.bitmask_stride,
        at(a.values, a.offsets[r] * size), a.offsets[r + 1] - a.offsets[r], a.columns);
  });
  return {};
}

Status unpack(const PackValuesArgs& a) {
  const KernelTable& table = kernels();
  const int size = item_size(a.dtype);
  const int64_t mask_bytes = bitmask_bytes(a.columns);
  const int used = static_cast<int>((a.columns - 1) % 8 + 1);  // bits of a row's last byte
  std::atomic<bool> within{true};
  for_each_row(a.threads, a.rows, a.columns, [&](int64_t r) {
    const uint8_t* bits = a.bitmask + r * a.bitmask_stride;
    a.offsets[r + 1] = table.count_bits(bits, mask_bytes);
    // Such a bit would put a value behind the row.
    if (mask_bytes > 0 && bits[mask_bytes - 1] >> used) within = false;
  });
  accumulate(a.offsets, a.rows);
  if (!within) return invalid("unpack: the bitmask has bits beyond the last column");
  if (a.offsets[a.rows] != a.nnz)
    return invalid("unpack: the bitmask counts another number of weights than are stored");
  for_each_row(a.threads, a.rows, a.columns, [&](int64_t r) {
    table.unpack(size, at(a.values, a.offsets[r] * size), a.bitmask + r * a.bitmask_stride,
                 at(a.weight, r * a.columns * size), a.columns);
  });
  return {};
}

}  // namespace mosaic::cpu
