// SPDX-License-Identifier: Apache-2.0
// 2:4 tiles times 1 to 64 rows of x: stream.cuh's walk with mma.sp, which takes two weights of every four and
// their indices as they are stored. A strip of 16 x 64 weights costs a warp three loads and, for every 8 rows
// of x, two loads and two products: nothing is decoded, so few rows are bound by the weight's bytes, 9/8 for
// each. At 64 rows a warp loads 8 KB of x from shared memory for 1.1 KB of weights, which costs as much again
// (by accounting; not measured).
#include "cuda/stream.cuh"

namespace mosaic::cuda {
namespace {

struct TwoOfFour {
  static constexpr int kTileBytes = kTwoOfFourTileBytes;

  // sums += strip . x^T
  template <typename T, int kBlocks>
  static __device__ __forceinline__ void multiply(float (&sums)[kBlocks][4], uint32_t tiles, uint32_t x,
                                                  uint32_t, int warp, int lane) {
    const uint32_t words = tiles + 4 * kTwoOfFourStripWords * warp;
    const uint32_t indices = load_shared_u32(words + 4 * (kTwoOfFourValueWords + lane));
    multiply_step<T, kBlocks, 0>(sums, words, x, indices, lane);
    multiply_step<T, kBlocks, 1>(sums, words, x, indices, lane);
  }

 private:
  template <typename T, int kBlocks, int kStep>
  static __device__ __forceinline__ void multiply_step(float (&sums)[kBlocks][4], uint32_t words, uint32_t x,
                                                       uint32_t indices, int lane) {
    const uint4 values = load_shared_u128(words + 4 * kTwoOfFourStepWords * kStep + 16 * lane);
    const uint32_t columns = x + lane % 8 * kXStride + 2 * kTwoOfFourStepColumns * kStep + 16 * (lane / 8);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t b[4];
      load_matrices(b, columns + kBlockRows * block * kXStride);
      mma_sparse_16x8x32<T, kStep>(sums[block], values, b, indices);
    }
  }
};

__device__ __forceinline__ void store_quad(const ExpandArgs& a, int64_t row, int64_t column, uint64_t quad) {
  if (row >= a.rows || column >= a.columns) return;
  uint16_t* out = static_cast<uint16_t*>(a.weight) + row * a.columns + column;
  if (a.columns % kQuad == 0) {  // no quad crosses the last column, and all are aligned
    *reinterpret_cast<uint64_t*>(out) = quad;
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (column + i < a.columns) out[i] = static_cast<uint16_t>(quad >> (16 * i));
    }
  }
}

// A block expands a tile, a warp a strip, a lane eight quads; four lanes write the 32 bytes of a sector.
__global__ void __launch_bounds__(kStrips* kWarpLanes) expand(const ExpandArgs a) {
  const int strip = static_cast<int>(threadIdx.x) / kWarpLanes,
            lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int64_t tile = blockIdx.x, across = column_tiles(a.columns);
  const int64_t first_row = tile / across * kTileRows + strip * kStripRows;
  const int64_t first_column = tile % across * kTileColumns;
  const uint32_t* words =
      static_cast<const uint32_t*>(a.tiles) + tile * kTwoOfFourTileWords + strip * kTwoOfFourStripWords;
  const uint32_t indices = words[kTwoOfFourValueWords + lane];
#pragma unroll
  for (int step = 0; step < kTileColumns / kTwoOfFourStepColumns; ++step) {
    const uint4 values = reinterpret_cast<const uint4*>(words + kTwoOfFourStepWords * step)[lane];
    const uint32_t registers[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const TilePlace place = quad_place(step, r, lane);
      const TileBit at = quad_indices(place.row, place.column);
      const uint32_t word = __shfl_sync(kFullWarp, indices, at.word - kTwoOfFourValueWords);
      store_quad(a, first_row + place.row, first_column + place.column,
                 expand_quad(registers[r], word >> at.bit));
    }
  }
}

}  // namespace

Status linear_2to4(const TileLinearArgs& a, Launch where) { return stream<TwoOfFour>(a, where); }

Status expand_2to4(const ExpandArgs& a, Launch where) {
  const int64_t tiles = row_tiles(a.rows) * column_tiles(a.columns);
  if (tiles == 0) return {};
  if (tiles >= int64_t{1} << 31) return invalid("the weight has too many tiles");
  const DeviceScope device(where.device);
  return launch<expand>(Shape{dim3(static_cast<unsigned>(tiles)), kStrips * kWarpLanes}, where, a);
}

}  // namespace mosaic::cuda
