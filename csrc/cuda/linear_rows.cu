// SPDX-License-Identifier: Apache-2.0
// Row bitmap times a few rows of x: one warp per output row, fp32 sums, no shared memory.
//
// The weight is read once for every N rows of x and nothing of it is reused, so the kernel is bound by
// its bytes as long as the walk stays cheap: for 64 weights a warp issues 3 shuffles, 2 popcounts, 2
// predicated loads of values and one (paired) load of x for each row. The walk itself is format.h's
// lane_pair; words of the next 1024 columns are fetched before this chunk's values are needed.
#include "cuda/launch.cuh"

namespace mosaic::cuda {
namespace {

constexpr int kWarps = 4;  // per block: enough blocks for a 4096-row projection to fill 132 SMs

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

// Two neighbouring columns of one row of x; columns past the end count as zero.
template <typename T, bool kPaired>
__device__ __forceinline__ void load_x(const T* __restrict__ x, int64_t column, int64_t in_features,
                                       float& first, float& second) {
  if (kPaired) {  // in_features is even, so the pair is inside or outside as a whole
    first = second = 0;
    if (column < in_features) {
      const Pair<T> pair = *reinterpret_cast<const Pair<T>*>(x + column);
      first = to_float(pair.first);
      second = to_float(pair.second);
    }
  } else {
    first = column < in_features ? to_float(x[column]) : 0.0f;
    second = column + 1 < in_features ? to_float(x[column + 1]) : 0.0f;
  }
}

// Blocks that shall share a multiprocessor: as many as leave registers for N rows without a spill. Left to
// itself ptxas spills some of these on sm_80 and sm_86.
constexpr int blocks_for(int rows) { return rows == 8 ? 4 : rows == 4 ? 8 : 10; }

template <typename T, int N, bool kPaired>
__global__ void __launch_bounds__(kWarps* kWarpLanes, blocks_for(N)) decode(const LinearArgs a) {
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpLanes;
  if (row >= a.out_features) return;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * N;
  const int64_t words = bitmask_words(a.in_features);
  const uint32_t* __restrict__ bits = a.words + row * words;
  const T* __restrict__ values = static_cast<const T*>(a.values) + a.offsets[row];

  // A block of fewer than N rows computes its last one again instead of branching.
  const T* x[N];
  float sum[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    x[n] = static_cast<const T*>(a.x) + min(first + n, a.rows - 1) * a.in_features;
    sum[n] = 0;
  }

  uint32_t next = lane < words ? bits[lane] : 0;
  for (int64_t base = 0; base < words; base += kWarpLanes) {
    const uint32_t mine = next;
    const int64_t ahead = base + kWarpLanes + lane;
    next = ahead < words ? bits[ahead] : 0;
    const int last_value = inclusive_sum(popcount(mine));
    const int first_value = last_value - popcount(mine);
    const int64_t left = words - base;
    const int steps = left < kWarpLanes ? static_cast<int>(left + 1) / kStepWords : kWarpLanes / kStepWords;
#pragma unroll 4
    for (int step = 0; step < steps; ++step) {
      const uint32_t low = __shfl_sync(kFullWarp, mine, step * kStepWords);
      const uint32_t high = __shfl_sync(kFullWarp, mine, step * kStepWords + 1);
      const int start = __shfl_sync(kFullWarp, first_value, step * kStepWords);
      const LanePair pair = lane_pair(low, high, start, lane);
      const float first_weight = pair.first ? to_float(values[pair.first_value]) : 0.0f;
      const float second_weight = pair.second ? to_float(values[pair.second_value]) : 0.0f;
      const int64_t column = base * kWordBits + step * kStepColumns + 2 * lane;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float x_first, x_second;
        load_x<T, kPaired>(x[n], column, a.in_features, x_first, x_second);
        sum[n] = fmaf(first_weight, x_first, sum[n]);
        sum[n] = fmaf(second_weight, x_second, sum[n]);
      }
    }
    values += __shfl_sync(kFullWarp, last_value, kWarpLanes - 1);
  }

  const float bias = a.bias ? to_float(static_cast<const T*>(a.bias)[row]) : 0.0f;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
      sum[n] += __shfl_xor_sync(kFullWarp, sum[n], distance);
    }
    if (lane == 0 && first + n < a.rows) {
      static_cast<T*>(a.out)[(first + n) * a.out_features + row] = from_float<T>(sum[n] + bias);
    }
  }
}

template <typename T, int N>
Status run(const LinearArgs& a, Launch where) {
  const dim3 grid(static_cast<unsigned>((a.out_features + kWarps - 1) / kWarps),
                  static_cast<unsigned>((a.rows + N - 1) / N));
  const bool paired = a.in_features % 2 == 0 && reinterpret_cast<uintptr_t>(a.x) % sizeof(Pair<T>) == 0;
  const Shape shape{grid, kWarps * kWarpLanes};
  return paired ? launch<decode<T, N, true>>(shape, where, a) : launch<decode<T, N, false>>(shape, where, a);
}

}  // namespace

Status linear_rows(const LinearArgs& a, Launch where) {
  if (a.rows == 0 || a.out_features == 0) return {};
  const DeviceScope device(where.device);
  return with_type(a.dtype, [&](auto element) {
    using T = decltype(element);
    if (a.rows == 1) return run<T, 1>(a, where);
    if (a.rows == 2) return run<T, 2>(a, where);
    if (a.rows <= 4) return run<T, 4>(a, where);
    return run<T, 8>(a, where);
  });
}

const char* why_not(int device) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && device >= count) return "there is no such CUDA device";
  if (error == cudaSuccess) {
    const DeviceScope scope(device);
    cudaFuncAttributes attributes;  // fails where this file was not compiled for the device
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(decode<float, 1, true>));
  }
  cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mosaic::cuda
