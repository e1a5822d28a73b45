// SPDX-License-Identifier: Apache-2.0
// Tile bitmap times 1 to 64 rows of x: stream.cuh's walk with weights that are decoded on their way into
// the tensor cores.
#include "cuda/stream.cuh"

namespace mosaic::cuda {
namespace {

struct Bitmap : BitmapTiles {
  // sums += strip . x^T; `area` is kAreaBytes of this warp's own.
  template <typename T, int kBlocks>
  static __device__ __forceinline__ void multiply(float (&sums)[kBlocks][4], uint32_t tile, uint32_t values,
                                                  uint32_t x, uint32_t area, int strip, int lane) {
    const StripWalk walk(area, lane);
    walk.begin(tile, values, strip);
    uint32_t b[4];
#pragma unroll
    for (int step = 0; step < kTileColumns / 16; ++step) {
      uint32_t weights[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) weights[r] = walk.slot(4 * step + r);
      // One block of 8 rows: a load brings x of two steps; more: of two blocks.
      if constexpr (kBlocks == 1) {
        if (step % 2 == 0) load_matrices(b, x + (lane % 8) * kXStride + 32 * step + 16 * (lane / 8));
        mma_16x8x16<T>(sums[0], weights, b[2 * (step % 2)], b[2 * (step % 2) + 1]);
      } else {
#pragma unroll
        for (int block = 0; block < kBlocks; block += 2) {
          const int row = kBlockRows * (block + lane / 16) + lane % 8;
          load_matrices(b, x + row * kXStride + 32 * step + 16 * (lane / 8 % 2));
          mma_16x8x16<T>(sums[block], weights, b[0], b[1]);
          mma_16x8x16<T>(sums[block + 1], weights, b[2], b[3]);
        }
      }
    }
  }
};

}  // namespace

Status linear_decode(const TileLinearArgs& a, Launch where) { return stream<Bitmap>(a, where); }

int64_t linear_workspace_bytes(int device) { return stream_workspace_bytes(device); }

}  // namespace mosaic::cuda
