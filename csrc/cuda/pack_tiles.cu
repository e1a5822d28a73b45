// SPDX-License-Identifier: Apache-2.0
// A dense weight into tile bitmap form: first bits and headers, from which the caller sums up where each
// step begins, then the steps, bits and values. A block makes a tile, a warp a strip; in each of its 16 slots
// a lane owns the two neighbouring weights that it will hold when the tensor cores read them.
#include "cuda/launch.cuh"

namespace mosaic::cuda {
namespace {

constexpr int kThreads = kStrips * kWarpLanes;

struct Corner {
  int64_t row, column;  // of this warp's strip
};

// Tiles are numbered step by step.
__device__ __forceinline__ Corner corner_of(const PackTilesArgs& a, int64_t tile, int strip) {
  const int64_t across = column_tiles(a.columns), step = tile / kGroup;
  return {(step / across * kGroup + tile % kGroup) * kTileRows + strip * kStripRows,
          step % across * kTileColumns};
}

// Whether the weight is kept; past the edges it is not.
template <typename T>
__device__ __forceinline__ bool keeps(const PackTilesArgs& a, int64_t row, int64_t column) {
  if (row >= a.rows || column >= a.columns) return false;
  const int64_t at = row * a.columns + column;
  return a.keep ? __ldg(a.keep + at) != 0 : !is_zero(__ldg(static_cast<const T*>(a.weight) + at));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) bits_kernel(const PackTilesArgs a) {
  const int strip = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  const int64_t tile = blockIdx.x;
  const Corner corner = corner_of(a, tile, strip);
  uint32_t mine = 0;
  int count = 0;
#pragma unroll 4
  for (int slot = 0; slot < kSlots; ++slot) {
    const TilePlace place = tile_place(slot, lane);
    const int64_t row = corner.row + place.row, column = corner.column + place.column;
    const uint32_t first = __ballot_sync(kFullWarp, keeps<T>(a, row, column));
    const uint32_t second = __ballot_sync(kFullWarp, keeps<T>(a, row, column + 1));
    // An even lane stores the lower 16 lanes' bits: eight lanes' first weights, then their second ones.
    const uint32_t word = __byte_perm(first, second, lane % 2 == 0 ? 0x5140u : 0x7362u);
    if (lane / 2 == slot) mine = word;
    count += popcount(first) + popcount(second);
  }
  uint32_t* out = a.bits + tile * kTileWords;
  out[kTileHeaderWords + strip * kStripWords + lane] = mine;

  auto* counts = reinterpret_cast<int*>(dynamic_shared());
  if (lane == 0) counts[strip] = count;
  __syncthreads();
  if (threadIdx.x == 0) {
    int begins[kStrips], units = 0, kept = 0;
    for (int s = 0; s < kStrips; ++s) {
      begins[s] = units;
      units += units_of(counts[s]);
      kept += counts[s];
    }
    out[0] = static_cast<uint32_t>(begins[0] | begins[1] << 16);
    out[1] = static_cast<uint32_t>(begins[2] | begins[3] << 16);
    out[2] = static_cast<uint32_t>(units);
    out[3] = static_cast<uint32_t>(kept);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) values_kernel(const PackTilesArgs a) {
  const int strip = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  const int64_t tile = blockIdx.x;
  const Corner corner = corner_of(a, tile, strip);
  const uint32_t* bits = a.bits + tile * kTileWords;
  const uint32_t mine = strip_words(bits, strip)[lane];
  const int end = inclusive_sum(popcount(mine));
  const int begin = end - popcount(mine);
  // The bits begin the step; in it, strips count their units from its first value on.
  const int before = tile % kGroup == 0 ? 0 : static_cast<int>((bits - kTileWords)[2]);
  T* step = static_cast<T*>(a.tiles) + kUnitValues * static_cast<int64_t>(a.offsets[tile / kGroup]);
  uint32_t* out = reinterpret_cast<uint32_t*>(step) + tile % kGroup * kTileWords;
  out[kTileHeaderWords + strip * kStripWords + lane] = mine;
  if (static_cast<int>(threadIdx.x) < kTileHeaderWords) {
    out[threadIdx.x] = bits[threadIdx.x] + (threadIdx.x < 2 ? static_cast<uint32_t>(before) * 0x10001u : 0u);
  }
  T* values = step + kUnitValues * (kStepHeadUnits + before + strip_unit(bits, strip));
  constexpr int kAhead = 4;  // slots whose weights are on their way at once
  for (int ahead = 0; ahead < kSlots; ahead += kAhead) {
    T first[kAhead], second[kAhead];
    T* place[kAhead];
    uint32_t kept[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int slot = ahead + i, source = 2 * slot + lane / (kWarpLanes / 2);
      const uint32_t word = __shfl_sync(kFullWarp, mine, source);
      const uint32_t own = word >> lane_bit(lane);
      place[i] = values + __shfl_sync(kFullWarp, begin, source) + popcount(word & bits_of_lanes_before(lane));
      kept[i] = (own & 1u) | (own >> kHalfBit & 1u) << 1;
      const TilePlace at = tile_place(slot, lane);
      const T* weight =
          static_cast<const T*>(a.weight) + (corner.row + at.row) * a.columns + corner.column + at.column;
      first[i] = second[i] = from_float<T>(0.0f);
      if (kept[i] & 1u) first[i] = __ldg(weight);
      if (kept[i] & 2u) second[i] = __ldg(weight + 1);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (kept[i] & 1u) *place[i]++ = first[i];
      if (kept[i] & 2u) *place[i] = second[i];
    }
  }
  const int kept = __shfl_sync(kFullWarp, end, kWarpLanes - 1);
  if (kept + lane < units_of(kept) * kUnitValues) values[kept + lane] = from_float<T>(0.0f);
}

template <auto kKernel>
Status run(const PackTilesArgs& a, Launch where) {
  const int64_t tiles = row_groups(a.rows) * column_tiles(a.columns) * kGroup;
  if (tiles == 0) return {};
  if (tiles >= int64_t{1} << 31) return invalid("the weight has too many tiles");
  const DeviceScope device(where.device);
  return launch<kKernel>(Shape{dim3(static_cast<unsigned>(tiles)), kThreads, kStrips * 4}, where, a);
}

}  // namespace

Status pack_tile_bits(const PackTilesArgs& a, Launch where) {
  return with_half_type(a.dtype, [&](auto element) { return run<bits_kernel<decltype(element)>>(a, where); });
}

Status pack_tile_values(const PackTilesArgs& a, Launch where) {
  return with_half_type(a.dtype,
                        [&](auto element) { return run<values_kernel<decltype(element)>>(a, where); });
}

}  // namespace mosaic::cuda
