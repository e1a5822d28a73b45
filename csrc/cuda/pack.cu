// SPDX-License-Identifier: Apache-2.0
// Packing and unpacking, one warp per row, 32 columns a step: lane l owns column l of the word, so a
// word is one ballot and a value's place one masked popcount. Bound by reading or writing the weight.
#include "cuda/launch.cuh"

namespace mosaic::cuda {
namespace {

constexpr int kWarps = 4;

__device__ __forceinline__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpLanes;
}

template <typename T>
__global__ void bits_kernel(const PackArgs a) {
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t row = row_of_warp(), words = bitmask_words(a.columns);
  if (row >= a.rows) return;
  const T* weight = static_cast<const T*>(a.weight) + row * a.columns;
  int64_t count = 0;
  for (int64_t w = 0; w < words; ++w) {
    const int64_t column = w * kWordBits + lane;
    const bool kept = column < a.columns && !is_zero(weight[column]) && (!a.keep || a.keep[row * a.columns + column]);
    const uint32_t word = __ballot_sync(kFullWarp, kept);
    if (lane == 0) a.words[row * words + w] = word;
    count += popcount(word);
  }
  if (lane == 0) a.counts[row] = count;
}

template <typename T, bool kUnpack>
__global__ void values_kernel(const PackArgs a) {
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t row = row_of_warp(), words = bitmask_words(a.columns);
  if (row >= a.rows) return;
  T* weight = static_cast<T*>(a.weight) + row * a.columns;
  T* values = static_cast<T*>(a.values) + a.offsets[row];
  for (int64_t w = 0; w < words; ++w) {
    const uint32_t word = a.words[row * words + w];
    const int64_t column = w * kWordBits + lane;
    T* value = values + rank(word, lane);
    if (kUnpack && column < a.columns) weight[column] = is_kept(word, lane) ? *value : from_float<T>(0.0f);
    if (!kUnpack && is_kept(word, lane)) *value = weight[column];
    values += popcount(word);
  }
}

template <auto kKernel>
Status run(const PackArgs& a, Launch where) {
  const auto blocks = static_cast<unsigned>((a.rows + kWarps - 1) / kWarps);
  return launch<kKernel>(Shape{dim3(blocks), kWarps * kWarpLanes}, where, a);
}

}  // namespace

Status pack_bits(const PackArgs& a, Launch where) {
  if (a.rows == 0) return {};
  const DeviceScope device(where.device);
  return with_type(a.dtype, [&](auto element) { return run<bits_kernel<decltype(element)>>(a, where); });
}

Status pack_values(const PackArgs& a, Launch where) {
  if (a.rows == 0) return {};
  const DeviceScope device(where.device);
  return with_type(a.dtype,
                   [&](auto element) { return run<values_kernel<decltype(element), false>>(a, where); });
}

Status unpack(const PackArgs& a, Launch where) {
  if (a.rows == 0) return {};
  const DeviceScope device(where.device);
  return with_type(a.dtype,
                   [&](auto element) { return run<values_kernel<decltype(element), true>>(a, where); });
}

}  // namespace mosaic::cuda
