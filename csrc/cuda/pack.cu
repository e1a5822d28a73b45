// SPDX-License-Identifier: Apache-2.0
// Unpacking into a dense weight: the path of many rows, which then multiply with cuBLAS.
//
// One warp owns one row and walks it byte by byte of its bitmask, 32 columns at a time; lane c writes column
// 32 w + c, so dense stores are whole runs. Bound by the dense bytes written.
#include "cuda/launch.cuh"
#include "mosaic/cuda.h"

namespace mosaic::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;

// The 32 bits that begin at column 32 * w; a row's bytes need not fill whole words.
__device__ __forceinline__ uint32_t load_word(const uint8_t* bits, int64_t bytes, int64_t w) {
  uint32_t word = 0;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    if (w * 4 + b < bytes) word |= uint32_t(bits[w * 4 + b]) << (8 * b);
  }
  return word;
}

template <typename T>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp)
    unpack_rows(T* __restrict__ weight, const T* __restrict__ values, const uint8_t* __restrict__ bitmask, int64_t stride,
                const int64_t* __restrict__ offsets, int64_t rows, int64_t columns) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= rows) return;

  const uint8_t* bits = bitmask + row * stride;
  int64_t base = offsets[row];
  for (int64_t w = 0; w < bitmask_words(columns); ++w) {
    const uint32_t word = load_word(bits, bitmask_bytes(columns), w);
    const int64_t column = w * kWordBits + lane;
    if (column < columns) {
      weight[row * columns + column] = is_kept(word, lane) ? values[base + rank(word, lane)] : from_float<T>(0.0f);
    }
    base += popcount(word);
  }
}

}  // namespace

Status unpack(const PackValuesArgs& a, cudaStream_t stream) {
  if (a.rows == 0 || a.columns == 0) return {};
  return with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const unsigned blocks = unsigned((a.rows + kWarpsPerBlock - 1) / kWarpsPerBlock);
    unpack_rows<T><<<blocks, kWarpsPerBlock * kWarp, 0, stream>>>(static_cast<T*>(a.weight),
                                                                  static_cast<const T*>(a.values), a.bitmask,
                                                                  a.bitmask_stride, a.offsets, a.rows, a.columns);
    return launched();
  });
}

}  // namespace mosaic::cuda
