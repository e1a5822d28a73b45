// SPDX-License-Identifier: Apache-2.0
// Tile bitmap -> dense weight, so that a dense product can take many rows of x. Bound by its bytes: at half
// the weights kept it reads 1.13 bytes a weight and writes 2. A block expands a tile, a warp a strip: values
// come 16 bytes a lane into shared memory, the walk leaves the strip in registers, and those go back to
// shared memory, into the place of the values, to be written 16 bytes a lane, eight lanes for a row of the
// tile.
#include "cuda/bitmap.cuh"

namespace mosaic::cuda {
namespace {

constexpr int kStripValues = kStripRows * kTileColumns;
constexpr int kRowStride = kTileColumns * 2 + 16;  // bytes; 8 rows at 16 bytes of skew lie in different banks
constexpr int kStripBytes = kStripRows * kRowStride;
constexpr int kWarpBytes = kAreaBytes + kStripBytes;
static_assert(kStripBytes >= kStripValues * 2 + kWalkSlack, "a strip's values have room, too");

__global__ void __launch_bounds__(kStrips* kWarpLanes) expand_tile(const ExpandTilesArgs a) {
  const int strip = static_cast<int>(threadIdx.x) / kWarpLanes,
            lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  unsigned char* area = dynamic_shared() + strip * kWarpBytes;
  unsigned char* dense = area + kAreaBytes;
  const int64_t across = column_tiles(a.columns), tile = a.first_row_tile * across + blockIdx.x;

  const int64_t row_tile = tile / across;
  const int in_step = static_cast<int>(row_tile % kGroup);
  const uint4* step =
      static_cast<const uint4*>(a.tiles) + a.offsets[row_tile / kGroup * across + tile % across];
  const uint32_t* header = reinterpret_cast<const uint32_t*>(step) + in_step * kTileWords;
  const uint32_t word = strip_words(header, strip)[lane];
  const int first = strip_unit(header, strip);
  const int units = (strip + 1 < kStrips ? strip_unit(header, strip + 1)
                                         : strip_unit(header, 0) + static_cast<int>(header[2])) -
                    first;
  const uint4* values = step + kStepHeadUnits + first;
  constexpr int kMostUnits = kStripValues / kUnitValues / kWarpLanes;  // of a lane
  uint4 unit[kMostUnits];
#pragma unroll
  for (int i = 0; i < kMostUnits; ++i) {
    if (lane + kWarpLanes * i < units) unit[i] = values[lane + kWarpLanes * i];
  }
#pragma unroll
  for (int i = 0; i < kMostUnits; ++i) {
    if (lane + kWarpLanes * i < units) reinterpret_cast<uint4*>(dense)[lane + kWarpLanes * i] = unit[i];
  }

  const StripWalk walk(shared_address(area), lane);
  walk.begin(word, shared_address(dense));
  uint32_t weights[kSlots];
#pragma unroll
  for (int slot = 0; slot < kSlots; slot += 2) walk.two_slots(slot, weights[slot], weights[slot + 1]);
  __syncwarp();
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const TilePlace place = tile_place(slot, lane);
    *reinterpret_cast<uint32_t*>(dense + place.row * kRowStride + 2 * place.column) = weights[slot];
  }
  __syncwarp();

  const int64_t first_column = tile % across * kTileColumns;
  const int64_t rows = a.rows - row_tile * kTileRows - strip * kStripRows, columns = a.columns - first_column;
  uint16_t* out = static_cast<uint16_t*>(a.weight) +
                  ((row_tile - a.first_row_tile) * kTileRows + strip * kStripRows) * a.columns + first_column;
  if (a.columns % kUnitValues == 0 && reinterpret_cast<uintptr_t>(a.weight) % 16 == 0) {
#pragma unroll
    for (int i = lane; i < kStripValues / kUnitValues; i += kWarpLanes) {
      const int row = i / 8, column = i % 8 * kUnitValues;
      if (row < rows && column < columns) {
        *reinterpret_cast<uint4*>(out + row * a.columns + column) =
            *reinterpret_cast<const uint4*>(dense + row * kRowStride + 2 * column);
      }
    }
  } else {
    for (int i = lane; i < kStripValues; i += kWarpLanes) {
      const int row = i / kTileColumns, column = i % kTileColumns;
      if (row < rows && column < columns) {
        out[row * a.columns + column] =
            *reinterpret_cast<const uint16_t*>(dense + row * kRowStride + 2 * column);
      }
    }
  }
}

}  // namespace

Status expand_tiles(const ExpandTilesArgs& a, Launch where) {
  if (a.first_row_tile < 0 || a.last_row_tile > row_tiles(a.rows))
    return invalid("the weight has no such row tiles");
  const int64_t tiles = (a.last_row_tile - a.first_row_tile) * column_tiles(a.columns);
  if (tiles <= 0) return {};
  if (tiles > INT32_MAX) return invalid("too many tiles for one launch: expand fewer row tiles at once");
  const DeviceScope device(where.device);
  const Shape shape{dim3(static_cast<unsigned>(tiles)), kStrips * kWarpLanes, kStrips * kWarpBytes};
  return launch<expand_tile>(shape, where, a);
}

}  // namespace mosaic::cuda
