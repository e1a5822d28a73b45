// SPDX-License-Identifier: Apache-2.0
// Tile bitmap times 1 to 64 rows of x: stream.cuh's walk with weights that are decoded on their way into
// the tensor cores. A strip of 16 x 64 weights costs a warp one prefix sum over its 32 words, and each of
// its 16 slots one 8-byte load (a word and where its values begin), one popcount and two predicated loads.
#include "cuda/stream.cuh"

namespace mosaic::cuda {
namespace {

struct Bitmap {
  static constexpr int kTileBytes = mosaic::kTileBytes;
  static constexpr bool kHasValues = true;

  // sums += strip . x^T; `area` is 256 bytes of this warp's own.
  template <typename T, int kBlocks>
  static __device__ __forceinline__ void multiply(float (&sums)[kBlocks][4], uint32_t tile, uint32_t values,
                                                  uint32_t x, uint32_t area, int strip, int lane) {
    const uint32_t word = load_shared_u32(tile + 4 * (kTileHeaderWords + strip * kStripWords + lane));
    const uint32_t begins = load_shared_u32(tile + 4 * (strip / 2));
    const uint32_t begin = values + 16 * (begins >> (16 * (strip % 2)) & 0xffffu);
    const int count = popcount(word);
    store_shared_u64(area + 8 * lane, make_uint2(word, begin + 2 * (inclusive_sum(count, lane) - count)));
    __syncwarp();

    const uint32_t first_bit = 1u << (2 * (lane % 16)), second_bit = 2 * first_bit, below = first_bit - 1;
    const uint32_t pairs = area + 8 * (lane / 16);
    uint32_t b[4];
#pragma unroll
    for (int step = 0; step < kTileColumns / 16; ++step) {
      uint32_t weights[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint2 pair = load_shared_u64(pairs + 16 * (4 * step + r));
        const uint32_t at = pair.y + 2 * popcount(pair.x & below);
        weights[r] = load_shared_kept_pair(at, pair.x, first_bit, second_bit);
      }
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
    __syncwarp();  // before the next strip's pairs take this one's place
  }
};

}  // namespace

Status linear_decode(const TileLinearArgs& a, Launch where) { return stream<Bitmap>(a, where); }

int64_t linear_workspace_bytes(int device) { return stream_workspace_bytes(device); }

}  // namespace mosaic::cuda
