// SPDX-License-Identifier: Apache-2.0
// The wrappers of cuda/ptx.cuh, each with the same meaning on fibers (see simt.h). The layouts of fragments
// are those of the PTX ISA's "Matrix Fragments for mma.m16n8k16".
#pragma once

#include "simt/cuda.h"

namespace mosaic::cuda {

constexpr bool kBulkCopies = MOSAIC_SIMT_ARCH >= 90;

inline uint32_t shared_address(const void* p) { return simt::shared_address_of(p); }
inline unsigned char* dynamic_shared() { return simt::shared_start(); }

inline uint32_t load_shared_u32(uint32_t address) { return simt::load_shared<uint32_t>(address); }

inline uint32_t load_shared_u16(uint32_t address) { return simt::load_shared<uint16_t>(address); }

inline uint4 load_shared_u128(uint32_t address) { return simt::load_shared<uint4>(address); }

inline void store_shared_u64(uint32_t address, uint2 v) { simt::store_shared(address, &v, 8); }

inline void store_shared_zero_16(uint32_t address) {
  const uint4 zero = {0, 0, 0, 0};
  simt::store_shared(address, &zero, 16);
}

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

inline int plus_lane_below(int v, int distance) {
  const int below = __shfl_up_sync(~0u, v, static_cast<unsigned>(distance));
  return simt::thread_number() % simt::kLanes >= distance ? v + below : v;
}

inline void barrier_init(uint32_t barrier, int count) { simt::barrier_init(barrier, count); }
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t barrier) { simt::barrier_arrive(barrier, 0); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) { simt::barrier_wait(barrier, parity); }

inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  if (kBulkCopies) simt::barrier_arrive(barrier, bytes);
}

inline void barrier_arrive_after_copies(uint32_t barrier) { simt::barrier_arrive_after_copies(barrier); }

inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (kBulkCopies) simt::copy_later(to, from, bytes, barrier);
}

// Whether this lane, of a whole warp that has come, is the elected one.
inline bool elected() {
  struct Lane {
  } lane;
  simt::meet_warp("elect", ~0u, lane, [](Lane* const*) {});
  return simt::thread_number() % simt::kLanes == 0;
}

inline void copy_bulk_elected(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  if (elected()) copy_bulk(to, from, bytes, barrier);
}

inline void arrive_and_copy_elected(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier,
                                    uint32_t announced) {
  if (!elected()) return;
  barrier_arrive_expect(barrier, announced);
  copy_bulk(to, from, bytes, barrier);
}

inline void copy_16(uint32_t to, const void* from) { simt::copy_later(to, from, 16, 0); }
inline void wait_for_copies() { simt::wait_for_copies(); }

inline void load_matrices(uint32_t (&v)[4], uint32_t address) {
  struct Lane {
    uint32_t* v;
    const unsigned char* row;
  } lane{v, simt::shared_bytes_at(address, 16, 16)};
  simt::meet_warp("ldmatrix", ~0u, lane, [](Lane* const* lanes) {
    for (int l = 0; l < simt::kLanes; ++l) {
      for (int matrix = 0; matrix < 4; ++matrix)
        std::memcpy(&lanes[l]->v[matrix], lanes[8 * matrix + l / 4]->row + 4 * (l % 4), 4);
    }
  });
}

// The 16-bit number `half` of a register, as fp32.
template <typename T>
float half_of(uint32_t pair, int half) {
  T v;
  const auto bits = static_cast<uint16_t>(pair >> (16 * half));
  std::memcpy(&v, &bits, 2);
  if constexpr (std::is_same_v<T, __half>) return __half2float(v);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(v);
}

template <typename T>
void mma_16x8x16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* sum;
    const uint32_t* a;
    uint32_t b[2];
  } lane{sum, a, {b0, b1}};
  simt::meet_warp("mma.m16n8k16", ~0u, lane, [](Lane* const* lanes) {
    float left[16][16], right[16][8];
    for (int l = 0; l < simt::kLanes; ++l) {
      const int group = l / 4, pair = 2 * (l % 4);
      for (int half = 0; half < 2; ++half) {
        for (int r = 0; r < 4; ++r)
          left[group + 8 * (r % 2)][pair + 8 * (r / 2) + half] = half_of<T>(lanes[l]->a[r], half);
        for (int r = 0; r < 2; ++r) right[pair + 8 * r + half][group] = half_of<T>(lanes[l]->b[r], half);
      }
    }
    for (int l = 0; l < simt::kLanes; ++l) {
      for (int r = 0; r < 4; ++r) {
        const int row = l / 4 + 8 * (r / 2), column = 2 * (l % 4) + r % 2;
        float total = lanes[l]->sum[r];
        for (int k = 0; k < 16; ++k) total += left[row][k] * right[k][column];
        lanes[l]->sum[r] = total;
      }
    }
  });
}

// From the PTX ISA's "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types" alone.
template <typename T, int kSelector>
void mma_sparse_16x8x32(float (&sum)[4], uint4 a, const uint32_t (&b)[4], uint32_t indices) {
  struct Lane {
    float* sum;
    uint32_t a[4];
    const uint32_t* b;
    uint32_t indices;
  } lane{sum, {a.x, a.y, a.z, a.w}, b, indices};
  simt::meet_warp(kSelector ? "mma.sp.m16n8k32 1" : "mma.sp.m16n8k32 0", ~0u, lane, [](Lane* const* lanes) {
    struct Kept {
      int column;
      float value;
    } left[16][16];
    float right[32][8];
    for (int l = 0; l < simt::kLanes; ++l) {
      const int group = l / 4, thread = l % 4;
      for (int r = 0; r < 4; ++r) {
        const int row = group + 8 * (r % 2), first_column = 4 * thread + 16 * (r / 2);
        const uint32_t metadata = lanes[4 * group + 2 * kSelector + first_column / 16]->indices;
        const uint32_t pair = metadata >> (16 * (row / 8) + first_column % 16) & 0xf;
        const uint32_t columns[2] = {pair & 3, pair >> 2};
        if (columns[0] >= columns[1])
          simt::fail("mma.sp: indices %u, %u do not ascend", columns[0], columns[1]);
        for (int half = 0; half < 2; ++half) {
          left[row][first_column / 2 + half] = {first_column + static_cast<int>(columns[half]),
                                                half_of<T>(lanes[l]->a[r], half)};
          right[8 * r + 2 * thread + half][group] = half_of<T>(lanes[l]->b[r], half);
        }
      }
    }
    for (int l = 0; l < simt::kLanes; ++l) {
      for (int r = 0; r < 4; ++r) {
        float total = lanes[l]->sum[r];
        for (const Kept& kept : left[l / 4 + 8 * (r / 2)])
          total += kept.value * right[kept.column][2 * (l % 4) + r % 2];
        lanes[l]->sum[r] = total;
      }
    }
  });
}

inline void sync_threads_of(int id, int threads) { simt::sync_block(id, threads); }

inline unsigned count_arrival(unsigned* at, unsigned most) { return atomicInc(at, most); }

inline void allow_next_kernel() {}
inline void wait_for_previous_kernel() {}

}  // namespace mosaic::cuda
