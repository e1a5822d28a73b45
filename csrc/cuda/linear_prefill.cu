// SPDX-License-Identifier: Apache-2.0
// Launches the product of the tile bitmap with many rows of x (prefill.cuh): how it is cut into block tiles
// and slices, and the kernel that adds slices.
#include "mosaic/kernels.h"

#ifdef MOSAIC_WITHOUT_SM90A

mosaic::Status mosaic::cuda::linear_prefill(const TileLinearArgs&, Launch) {
  return {Code::kUnavailable, "linear_prefill was not built: MOSAIC_CUDA_ARCHS has no 90"};
}

bool mosaic::cuda::has_linear_prefill(int) { return false; }

#else

#include "cuda/prefill.cuh"

namespace mosaic::cuda {
namespace {

// Adds the slices' partial sums: a thread has one output feature in 8 rows of x, which one row of four lanes'
// registers holds.
constexpr int kSumRows = 8;
constexpr int kGroupRows = kGroup * kTileRows;

template <typename T>
__global__ void __launch_bounds__(kGroupRows) sum_slices(const __grid_constant__ PrefillArgs a) {
  wait_for_previous_kernel();
  const auto group = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const ListedPart& found = part_of(a.list, group);
  const int64_t row = static_cast<int64_t>(group - found.first_group) * kGroupRows + thread;
  if (row >= found.part.out_features) return;
  const int first = static_cast<int>(blockIdx.y) * kSumRows, x_tile = first / a.tile_rows;
  const int strip_row = thread % kStripRows;
  const int sum = first % a.tile_rows / 2 + 2 * (strip_row / 8);
  float sums[kSumRows] = {};
  for (int slice = 0; slice < a.slices; ++slice) {
    const float* from = a.partials + partials_at(a, slice, group, x_tile, thread / kStripRows) +
                        sum * kWarpLanes + 4 * (strip_row % 8);
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const uint4 four = __ldcg(reinterpret_cast<const uint4*>(from + odd * kWarpLanes));
      sums[odd] += __uint_as_float(four.x);
      sums[odd + 2] += __uint_as_float(four.y);
      sums[odd + 4] += __uint_as_float(four.z);
      sums[odd + 6] += __uint_as_float(four.w);
    }
  }
  const float bias = found.part.bias ? to_float(static_cast<const T*>(found.part.bias)[row]) : 0.0f;
#pragma unroll
  for (int i = 0; i < kSumRows; ++i) {
    if (first + i < a.rows) {
      static_cast<T*>(found.part.out)[(first + i) * found.part.out_features + row] =
          from_float<T>(sums[i] + bias);
    }
  }
}

// How a launch is cut: rows of x of a block tile, and slices along the columns.
struct Plan {
  int tile_rows, slices;
  int64_t cost;
};

// Cycles of a multiprocessor, by accounting (nothing here is measured). A step has 128 x 64 products for each
// row of x, of which the tensor cores do 2048 a cycle, and the loop of consume() has 250 instructions, which
// each scheduler issues for two warps. Partial sums go to the L2 cache and back at 32 bytes a cycle.
constexpr int64_t step_cycles(int tile_rows) { return std::max(4 * tile_rows, 2 * 250); }
constexpr int64_t kSumLaunch = 3000;  // the second kernel
constexpr int kMinSliceSteps = 4;

Plan plan_tiles(int tile_rows, int64_t groups, int64_t rows, int64_t steps, int64_t blocks,
                int64_t partials) {
  const int64_t tiles = groups * ((rows + tile_rows - 1) / tile_rows), sums = tiles * tile_rows * kGroupRows;
  // With slices, a block has one item: all its items have as many steps.
  const int64_t most =
      std::max<int64_t>(1, std::min({blocks / tiles, steps / kMinSliceSteps, partials / sums}));
  Plan best = {tile_rows, 1, (tiles + blocks - 1) / blocks * steps * step_cycles(tile_rows)};
  for (int64_t slices = 2; slices <= most; ++slices) {
    const int64_t cost = (steps + slices - 1) / slices * step_cycles(tile_rows) + kSumLaunch +
                         2 * 4 * slices * sums / (32 * blocks);
    if (cost < best.cost) best = {tile_rows, static_cast<int>(slices), cost};
  }
  return best;
}

template <typename T, int kRows>
Status launch_prefill(PrefillArgs& a, DType dtype, const TileLinearArgs& given, Launch where) {
  const DeviceLimits limits = device_limits(where.device);
  const int stage = Ring<kRows>::kXBytes + a.weight_bytes;
  const int fixed = kStagesAt + kAlignment;
  a.stages = std::min(kMaxStages, (limits.shared_bytes - 1024 - fixed) / stage);
  if (a.stages < 2) return invalid("this device's shared memory is too small for two steps");
  a.x_tiles = (a.rows + kRows - 1) / kRows;
  a.tile_rows = kRows;
  const int64_t items = static_cast<int64_t>(a.groups) * a.x_tiles * a.slices;
  if (items > INT32_MAX / kRows) return invalid("too many rows and output features for one launch");
  const Status mapped = map_matrix(a.x, dtype, given.x, given.rows, given.in_features, kRows);
  if (!mapped.ok()) return mapped;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(items, limits.multiprocessors));
  constexpr auto kProduct = prefill<T, kRows>, kSum = sum_slices<T>;
  const Shape shape{dim3(blocks), kThreads, fixed + a.stages * stage, true};
  const Status status = launch<kProduct>(shape, where, a);
  if (a.slices == 1 || !status.ok()) return status;
  const dim3 grid(static_cast<unsigned>(a.groups), static_cast<unsigned>((a.rows + kSumRows - 1) / kSumRows));
  return launch<kSum>(Shape{grid, kGroupRows, 0, true}, where, a);
}

}  // namespace

bool has_linear_prefill(int device) { return device_limits(device).major == 9; }

Status linear_prefill(const TileLinearArgs& given, Launch where) {
  if (!has_linear_prefill(where.device))
    return {Code::kUnavailable, "linear_prefill runs on compute capability 9.0 alone"};
  if (given.rows == 0) return {};
  PrefillArgs a = {};
  ListSize size;
  const Status checked = list_parts(given, a.list, size);
  if (!checked.ok() || size.groups == 0) return checked;
  if (given.rows > INT32_MAX / 2 || size.groups > INT32_MAX / kGroupRows || given.in_features > INT32_MAX / 2)
    return invalid("too many rows or features for one launch");
  const DeviceScope device(where.device);
  const int64_t blocks = device_limits(where.device).multiprocessors;
  const int64_t partials = (given.workspace_bytes - kArrivalBytes) / 4;
  const auto plan = [&](int tile_rows) {
    return plan_tiles(tile_rows, size.groups, given.rows, a.list.column_steps, blocks, partials);
  };
  const Plan wide = plan(256), narrow = plan(128);
  const Plan& chosen = narrow.cost < wide.cost ? narrow : wide;
  a.rows = static_cast<int>(given.rows);
  a.groups = static_cast<int>(size.groups);
  a.slices = chosen.slices;
  a.weight_bytes = static_cast<int>(size.largest_step) * 16 + kWalkSlack;
  if (a.slices > 1)
    a.partials = reinterpret_cast<float*>(static_cast<char*>(given.workspace) + kArrivalBytes);
  return with_half_type(given.dtype, [&](auto element) {
    using T = decltype(element);
    return chosen.tile_rows == 256 ? launch_prefill<T, 256>(a, given.dtype, given, where)
                                   : launch_prefill<T, 128>(a, given.dtype, given, where);
  });
}

}  // namespace mosaic::cuda

#endif  // MOSAIC_WITHOUT_SM90A
