// SPDX-License-Identifier: Apache-2.0
// The weights of a launch as one list of groups of rows, and what a producer has to know of their tiles.
#pragma once

#include "cuda/bitmap.cuh"

namespace mosaic::cuda {

// A workspace begins with counters that every launch finds and leaves at zero; the rest is anyone's.
constexpr int64_t kMaxGroups = 16384;  // of 128 output features
constexpr int64_t kArrivalBytes = kMaxGroups * 4;

constexpr int kGroup = 2;  // tiles of 64 x 64, one under the other, that a block reads at once

struct ListedPart {
  TilePart part;
  int first_group;
};

struct PartList {
  ListedPart parts[kMaxParts];
  int count;
  int column_steps;  // tiles along a group
};

__device__ __forceinline__ const ListedPart& part_of(const PartList& list, int group) {
  int p = 0;
  while (p + 1 < list.count && group >= list.parts[p + 1].first_group) ++p;
  return list.parts[p];
}

// The tiles of a group at a column step: how many there are (the last group may have fewer), and the first
// one's number.
struct StepTiles {
  const TilePart* part;
  int count;
  int64_t first;  // tile t of the step is first + t * column_steps
};

__device__ __forceinline__ StepTiles tiles_of(const PartList& list, int group, int column_step) {
  const ListedPart& found = part_of(list, group);
  const int64_t row = static_cast<int64_t>(group - found.first_group) * kGroup;
  const int64_t left = row_tiles(found.part.out_features) - row;
  return {&found.part, left < kGroup ? static_cast<int>(left) : kGroup,
          row * list.column_steps + column_step};
}

// Where a step's values begin and how long they are. Producers fetch them 32 steps at a time, a step a lane,
// and one such batch ahead: a step alone would wait for memory.
struct ValueRanges {
  uint32_t first[kGroup], end[kGroup];
};

__device__ __forceinline__ ValueRanges fetch_ranges(const PartList& list, int group, int column_step) {
  ValueRanges r = {};
  const StepTiles tiles = tiles_of(list, group, column_step);
#pragma unroll
  for (int t = 0; t < kGroup; ++t) {
    if (t < tiles.count) {
      const uint32_t* offset =
          tiles.part->offsets + tiles.first + static_cast<int64_t>(t) * list.column_steps;
      r.first[t] = offset[0];
      r.end[t] = offset[1];
    }
  }
  return r;
}

// What each lane of a producer warp copies of a step, whose bytes have as little time as some hundred of its
// instructions: nothing is worked out anew that the step before had, and one instruction makes all bulk
// copies. Lane 2 t takes tile t of the group and lane 2 t + 1 its values; each announces its own at the
// barrier.
template <typename Format>
struct WeightCopies {
  static constexpr int kLanes = 2 * kGroup;
  static constexpr int kTiles = kGroup * Format::kTileBytes;  // of a stage; values lie behind

  int lane, tiles = 0;
  const char* own = nullptr;  // the lane's tile at the next step; or the weight's values
  ValueRanges now = {};       // of 32 steps, a lane each

  __device__ explicit WeightCopies(int lane_) : lane(lane_) {}
  __device__ bool takes_values() const { return lane % 2 != 0; }

  __device__ void enter_group(const PartList& list, int group, int column_step) {
    const StepTiles found = tiles_of(list, group, column_step);
    tiles = found.count;
    own = static_cast<const char*>(takes_values() ? found.part->values : found.part->tiles);
    if (!takes_values() && lane / 2 < tiles)
      own += (found.first + static_cast<int64_t>(lane / 2) * list.column_steps) * Format::kTileBytes;
  }

  __device__ void next_step() {
    if (!takes_values()) own += Format::kTileBytes;
  }

  // Copies the step whose ranges lane `batch_lane` has.
  __device__ void copy(uint32_t stage, int tile_value_bytes, int batch_lane, uint32_t barrier) const {
    const int tile = lane / 2;
    uint32_t to = stage + tile * Format::kTileBytes;
    uint32_t bytes = takes_values() ? 0 : Format::kTileBytes;
    const char* from = own;
    if constexpr (Format::kHasValues) {
#pragma unroll
      for (int t = 0; t < kGroup; ++t) {
        const uint32_t begin = __shfl_sync(kFullWarp, now.first[t], batch_lane);
        const uint32_t end = __shfl_sync(kFullWarp, now.end[t], batch_lane);
        if (lane == 2 * t + 1) {
          to = stage + kTiles + t * tile_value_bytes;
          from += 16 * static_cast<int64_t>(begin);
          bytes = 16 * (end - begin);
        }
      }
    }
    if (tile >= tiles) bytes = 0;
    if constexpr (kBulkCopies) {
      if (lane < kLanes) {
        barrier_arrive_expect(barrier, bytes);
        if (bytes > 0) copy_bulk(to, from, bytes, barrier);
      }
    } else {
      for (int piece = 0; piece < kLanes; ++piece) {
        const uint32_t size = __shfl_sync(kFullWarp, bytes, piece), start = __shfl_sync(kFullWarp, to, piece);
        const auto source = __shfl_sync(kFullWarp, reinterpret_cast<uintptr_t>(from), piece);
        for (uint32_t at = 16u * lane; at < size; at += 16u * kWarpLanes)
          copy_16(start + at, reinterpret_cast<const char*>(source) + at);
      }
    }
  }
};

// The tile bitmap as a Format.
struct BitmapTiles {
  static constexpr int kTileBytes = mosaic::kTileBytes;
  static constexpr bool kHasValues = true;
};

// How many groups of rows the weights have, and the units of their largest tile.
struct ListSize {
  int64_t groups, largest_tile;
};

// Checks what every kernel for tiles asks of its arguments.
inline Status list_parts(const TileLinearArgs& a, PartList& list, ListSize& size) {
  if (a.part_count < 1 || a.part_count > kMaxParts) return invalid("a launch takes 1 to 4 weights");
  if (a.in_features % kUnitValues != 0 || reinterpret_cast<uintptr_t>(a.x) % 16 != 0) {
    return invalid("rows of x must begin at multiples of 16 bytes: pad its features to a multiple of 8");
  }
  list.count = a.part_count;
  list.column_steps = static_cast<int>(column_tiles(a.in_features));
  size = {0, 0};
  for (int p = 0; p < a.part_count; ++p) {
    list.parts[p] = {a.parts[p], static_cast<int>(size.groups)};
    size.groups += (row_tiles(a.parts[p].out_features) + kGroup - 1) / kGroup;
    size.largest_tile = std::max(size.largest_tile, a.parts[p].largest_tile);
  }
  if (size.groups > 0 && a.in_features == 0) return invalid("a weight without columns has no steps");
  return {};
}

}  // namespace mosaic::cuda
