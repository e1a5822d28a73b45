// SPDX-License-Identifier: Apache-2.0
// Packing and unpacking, one warp per row: lane l owns column l of a word, so a word is one ballot and a
// value's place one masked popcount. Bound by reading or writing the weight.
#include "cuda/launch.cuh"

namespace mosaic::cuda {
namespace {

constexpr int kWarps = 4;

__device__ __forceinline__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpLanes;
}

constexpr int kAhead = 8;  // words whose weights are on their way at once: one alone would wait for memory

template <typename T>
__global__ void bits_kernel(const PackArgs a) {
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t row = row_of_warp(), words = bitmask_words(a.columns);
  if (row >= a.rows) return;
  const T* weight = static_cast<const T*>(a.weight) + row * a.columns;
  const uint8_t* keep = a.keep ? a.keep + row * a.columns : nullptr;
  int64_t count = 0;
  for (int64_t first = 0; first < words; first += kAhead) {
    bool kept[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t column = (first + i) * kWordBits + lane;
      kept[i] =
          column < a.columns && !is_zero(__ldg(weight + column)) && (!keep || __ldg(keep + column) != 0);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const uint32_t word = __ballot_sync(kFullWarp, kept[i]);
      if (lane == 0 && first + i < words) a.words[row * words + first + i] = word;
      count += popcount(word);
    }
  }
  if (lane == 0) a.counts[row] = count;
}

// Lane i holds word i of 32; each word's place among the values is a prefix sum over their counts.
template <typename T, bool kUnpack>
__global__ void values_kernel(const PackArgs a) {
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t row = row_of_warp(), words = bitmask_words(a.columns);
  if (row >= a.rows) return;
  T* weight = static_cast<T*>(a.weight) + row * a.columns;
  T* values = static_cast<T*>(a.values) + a.offsets[row];
  for (int64_t base = 0; base < words; base += kWarpLanes) {
    const uint32_t mine = base + lane < words ? a.words[row * words + base + lane] : 0;
    const int end = inclusive_sum(popcount(mine));
    const int begin = end - popcount(mine);
    for (int first = 0; first < kWarpLanes && base + first < words; first += kAhead) {
      T moved[kAhead];
      uint32_t word[kAhead];
      T* place[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        word[i] = __shfl_sync(kFullWarp, mine, first + i);
        place[i] =
            values + __shfl_sync(kFullWarp, begin, first + i) + rank(word[i], static_cast<uint32_t>(lane));
        const int64_t column = (base + first + i) * kWordBits + lane;
        moved[i] = from_float<T>(0.0f);
        if (is_kept(word[i], static_cast<uint32_t>(lane)))
          moved[i] = __ldg(kUnpack ? place[i] : weight + column);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t column = (base + first + i) * kWordBits + lane;
        if (kUnpack && column < a.columns) weight[column] = moved[i];
        if (!kUnpack && is_kept(word[i], static_cast<uint32_t>(lane))) *place[i] = moved[i];
      }
    }
    values += __shfl_sync(kFullWarp, end, kWarpLanes - 1);
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
