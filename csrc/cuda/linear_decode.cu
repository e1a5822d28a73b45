// SPDX-License-Identifier: Apache-2.0
// Tile bitmap times 1 to 64 rows of x: stream.cuh's walk with weights that are decoded on their way into
// the tensor cores. Instructions bound it (by accounting; not measured): a consumer's turn for one strip and
// 8 rows of x, 1024 weights, takes (nvcc 13.0, sm_90; .ci/sass_budget.py counts them)
//
//                              all   LDS   LOP3   PRMT   POPC   producer, for 8192 weights
//     predicated loads         258    52     50     16     17   105, more in loops over lanes
//     loads and permutation    218    44     34     16     17   60
#include "cuda/stream.cuh"

namespace mosaic::cuda {
namespace {

struct Bitmap {
  static constexpr int kTileBytes = 0;  // steps of many sizes, each in one piece

  // sums += strip . x^T; `area` is kAreaBytes of this warp's own.
  template <typename T, int kBlocks>
  static __device__ __forceinline__ void multiply(float (&sums)[kBlocks][4], uint32_t step_of_weights,
                                                  uint32_t x, uint32_t area, int warp, int lane) {
    const StripWalk walk(area, lane);
    walk.begin(step_of_weights + warp / kStrips * mosaic::kTileBytes, step_of_weights + kStepHeadBytes,
               warp % kStrips);
    uint32_t b[4];
#pragma unroll
    for (int step = 0; step < kTileColumns / 16; ++step) {
      uint32_t weights[4];
      walk.two_slots(4 * step, weights[0], weights[1]);
      walk.two_slots(4 * step + 2, weights[2], weights[3]);
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
