// SPDX-License-Identifier: Apache-2.0
// The weights of a launch as one list of groups of rows, and what a producer has to know of their tiles.
#pragma once

#include "cuda/bitmap.cuh"

namespace mosaic::cuda {

// A workspace begins with counters that every launch finds and leaves at zero; the rest is anyone's.
constexpr int64_t kMaxGroups = 16384;  // of 128 output features
constexpr int64_t kArrivalBytes = kMaxGroups * 4;

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

// Two tiles of a fixed size at a step, which do not lie together: a copy each.
template <int kBytes>
struct TileCopies {
  static constexpr bool kRunsOn = false;  // tiles of the next group lie elsewhere

  int lane, tiles = 0;
  const char* own = nullptr;  // the first tile of the next step
  int64_t below = 0;          // bytes from there to the tile below it

  __device__ explicit TileCopies(int lane_) : lane(lane_) {}

  __device__ void enter(const PartList& list, int group, int column_step) {
    const StepTiles found = tiles_of(list, group, column_step);
    tiles = found.count;
    own = static_cast<const char*>(found.part->tiles) + found.first * kBytes;
    below = static_cast<int64_t>(list.column_steps) * kBytes;
  }

  // Copies the next step, which is the block's number `i`.
  __device__ void copy(uint32_t to, uint32_t, uint32_t barrier) {
    if constexpr (kBulkCopies) {
      arrive_and_copy_elected(to, own, kBytes, barrier, tiles * kBytes);
      if (tiles == kGroup) copy_bulk_elected(to + kBytes, own + below, kBytes, barrier);
    } else {
      for (int t = 0; t < tiles; ++t) {
        for (uint32_t at = 16u * lane; at < kBytes; at += 16u * kWarpLanes)
          copy_16(to + t * kBytes + at, own + t * below + at);
      }
    }
    own += kBytes;
  }
};
static_assert(kGroup == 2, "TileCopies makes two copies");

// Where the tile bitmap says in which unit a step begins; behind that, where it ends.
__device__ __forceinline__ const uint32_t* offset_of(const PartList& list, int group, int column_step) {
  const ListedPart& found = part_of(list, group);
  return found.part.offsets + static_cast<int64_t>(group - found.first_group) * list.column_steps +
         column_step;
}

// A step of the tile bitmap is one stretch of memory and one copy, which one lane starts. How long each is
// has to be fetched: 32 steps at a time, a step a lane, and one such batch ahead, since one alone would wait
// for memory. `Steps` says which steps those are: steps(i) is where the length of the block's step i lies, or
// nullptr.
template <typename Steps>
struct StepCopies {
  static constexpr bool kRunsOn = true;  // a weight's steps follow each other in memory

  Steps steps;
  int lane;
  const char* from = nullptr;  // of the next step
  uint32_t now = 0, ahead = 0;

  __device__ StepCopies(const Steps& steps_, int lane_)
      : steps(steps_), lane(lane_), ahead(units_at(lane_)) {}

  __device__ uint32_t units_at(int64_t i) const {
    const uint32_t* offset = steps(i);
    return offset ? __ldg(offset + 1) - __ldg(offset) : 0;
  }

  __device__ void enter(const PartList& list, int group, int column_step) {
    from = static_cast<const char*>(part_of(list, group).part.tiles) +
           16 * static_cast<int64_t>(*offset_of(list, group, column_step));
  }

  __device__ void copy(uint32_t to, uint32_t i, uint32_t barrier) {
    const uint32_t batch_lane = i % kWarpLanes;
    if (batch_lane == 0) {
      now = ahead;
      ahead = units_at(static_cast<int64_t>(i) + kWarpLanes + lane);
    }
    const uint32_t bytes = 16 * __shfl_sync(kFullWarp, now, static_cast<int>(batch_lane));
    if constexpr (kBulkCopies) {
      arrive_and_copy_elected(to, from, bytes, barrier, bytes);
    } else {
      for (uint32_t at = 16u * lane; at < bytes; at += 16u * kWarpLanes) copy_16(to + at, from + at);
    }
    from += bytes;
  }
};

// The group behind the last one of `group`'s weight.
__device__ __forceinline__ int end_of_part(const PartList& list, int group) {
  int p = 1;
  while (p < list.count && group >= list.parts[p].first_group) ++p;
  return p < list.count ? list.parts[p].first_group : INT32_MAX;
}

// How many groups of rows the weights have, and the units of their largest step.
struct ListSize {
  int64_t groups, largest_step;
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
    size.groups += row_groups(a.parts[p].out_features);
    size.largest_step = std::max(size.largest_step, a.parts[p].largest_step);
  }
  if (size.groups > 0 && a.in_features == 0) return invalid("a weight without columns has no steps");
  return {};
}

}  // namespace mosaic::cuda
