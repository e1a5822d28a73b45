// SPDX-License-Identifier: Apache-2.0
// Tile bitmap times many rows of x, on compute capability 9.0: weights are decoded into registers that wgmma
// takes as operand A, while the products of the weights before them run. Bound by the tensor cores where a
// block tile has 256 rows of x; with 128 rows the decode takes about as long (step_cycles in
// linear_prefill.cu).
//
//   block tile   128 rows of weights (two tiles, one for each of two warpgroups; a warp has a strip of 16)
//                by kRows rows of x; a persistent block walks several of them
//   step         64 columns: the copy engine brings kRows x 64 of x (a box, swizzled as wgmma wants it)
//                and two tiles of the bitmap into a ring of stages, each with a transaction barrier
//   slice        where block tiles are too few for the device, each is cut along the columns; slices leave
//                fp32 sums, which a second kernel adds in order: no atomics, always the same bits
//
// A warpgroup's registers of A are two halves of a tile, `front` (columns 0..31) and `back` (32..63). One is
// decoded while the products of the other run, and no register is written before its products are waited for:
//
//     decode front | start its products | wait for the last back  (its stage is free)
//     decode back  | start its products | wait for front | next tile
#pragma once

#include "cuda/parts.cuh"
#include "cuda/ptx_sm90a.cuh"

namespace mosaic::cuda {

constexpr int kWarpgroup = 4;      // warps
constexpr int kProductRows = 128;  // rows of x of one wgmma
constexpr int kConsumerWarps = kGroup * kWarpgroup;
constexpr int kThreads = (kConsumerWarps + kWarpgroup) * kWarpLanes;  // one warp of the last warpgroup copies
// A thread has at most 168 of 65536 registers where every quarter of a multiprocessor holds 3 warps;
// consumers take over some of the producer's: 2 * 224 + 56 = 3 * 168.
constexpr int kConsumerRegisters = 224;
constexpr int kProducerRegisters = 56;
constexpr int kMaxStages = 8;
constexpr int kHalfSlots = kSlots / 2;
constexpr int kXRowBytes = kTileColumns * 2;  // the span of the swizzle
constexpr int kWeightBytes = kGroup * kTileBytes;

// Before an output tile is written it is turned around in shared memory, 32 rows of x at a time.
constexpr int kTurnedRows = 32;
constexpr int kTurnedStride = kTileRows * 2 + 16;  // bytes; 8 rows at 16 bytes of skew lie in different banks
constexpr int kTurnedBytes = kTurnedRows * kTurnedStride;

constexpr int kBarrierBytes = 2 * kMaxStages * 8;
constexpr int kAreasAt = kBarrierBytes;
constexpr int kTurnedAt = kAreasAt + kConsumerWarps * kAreaBytes;
constexpr int kStagesAt = (kTurnedAt + kGroup * kTurnedBytes + 1023) / 1024 * 1024;
constexpr int kAlignment = 1024;  // of x in shared memory, for the swizzle

static_assert(kStrips == kWarpgroup && kStripRows * kWarpgroup == 64, "a warpgroup multiplies a tile");
static_assert(kTurnedRows * kTileRows * 2 % (16 * kWarpgroup * kWarpLanes) == 0);

struct PrefillArgs {
  TensorMap x;
  PartList list;
  int rows;  // of x
  int groups;
  int x_tiles;
  int slices;
  int stages;
  int weight_bytes;  // room for a step's weights
  int tile_rows;     // of x, of a block tile
  // [slices][groups][x_tiles][kConsumerWarps][tile_rows / 2 sums][lanes]; nullptr: one slice, which writes
  // the output
  float* partials;
};

__device__ __forceinline__ int64_t partials_at(const PrefillArgs& a, int slice, int group, int x_tile,
                                               int warp) {
  const int64_t tile = (static_cast<int64_t>(slice) * a.groups + group) * a.x_tiles + x_tile;
  return (tile * kConsumerWarps + warp) * (a.tile_rows / 2) * kWarpLanes;
}

// What a block multiplies between two outputs.
struct Item {
  int group, slice;
  int x_row;  // the first of its kRows
  int first_step, steps;
};

// Block tiles in bands of kBand x tiles: blocks that run at the same time share weights and x in the L2
// cache.
constexpr int kBand = 8;

template <int kRows>
__device__ __forceinline__ Item item_at(const PrefillArgs& a, int number) {
  const int tile = number / a.slices, slice = number % a.slices;
  const int band = tile / (kBand * a.groups), within = tile % (kBand * a.groups);
  const int width = min(kBand, a.x_tiles - band * kBand);
  const auto step_at = [&](int s) {
    return static_cast<int>(static_cast<int64_t>(a.list.column_steps) * s / a.slices);
  };
  return {within / width, slice, (band * kBand + within % width) * kRows, step_at(slice),
          step_at(slice + 1) - step_at(slice)};
}

__device__ __forceinline__ int item_count(const PrefillArgs& a) { return a.groups * a.x_tiles * a.slices; }

// The ring of stages as one side walks it.
template <int kRows>
struct Ring {
  uint32_t memory;  // start of shared memory
  int stages;
  uint32_t weight_bytes;
  int stage = 0;
  uint32_t parity = 0;

  static constexpr int kXBytes = kRows * kXRowBytes;

  __device__ Ring(const PrefillArgs& a, uint32_t memory_)
      : memory(memory_), stages(a.stages), weight_bytes(a.weight_bytes) {}

  __device__ uint32_t full(int s) const { return memory + 8 * s; }
  __device__ uint32_t empty(int s) const { return memory + 8 * (kMaxStages + s); }
  __device__ uint32_t x() const { return memory + kStagesAt + stage * kXBytes; }
  __device__ uint32_t weights() const { return memory + kStagesAt + stages * kXBytes + stage * weight_bytes; }
  __device__ void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// One warp copies all steps of all items: its first lanes the weights, the next one x.
constexpr int kXLane = 1;

template <int kRows>
__device__ void produce(const PrefillArgs& a, uint32_t memory, int lane) {
  Ring<kRows> ring(a, memory);
  const int items = item_count(a);
  const auto block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  // All items of a block have as many steps: it has one alone where there are slices.
  const int item_steps = item_at<kRows>(a, block).steps;
  const auto steps = [&](int64_t i) -> const uint32_t* {
    const int64_t number = block + i / item_steps * blocks;
    if (number >= items) return nullptr;
    const Item item = item_at<kRows>(a, static_cast<int>(number));
    return offset_of(a.list, item.group, item.first_step + static_cast<int>(i % item_steps));
  };
  StepCopies<decltype(steps)> weights(steps, lane);
  int64_t done = 0;
  wait_for_previous_kernel();
  for (int number = block; number < items; number += blocks) {
    const Item item = item_at<kRows>(a, number);
    weights.enter(a.list, item.group, item.first_step);
    for (int step = item.first_step; step < item.first_step + item.steps; ++step, ++done) {
      const uint32_t full = ring.full(ring.stage);
      if (done >= a.stages) barrier_wait(ring.empty(ring.stage), ring.parity ^ 1);
      if (lane == kXLane) {
        barrier_arrive_expect(full, Ring<kRows>::kXBytes);
        copy_box(ring.x(), a.x, item.x_row, step * kTileColumns, full);
      }
      __syncwarp();
      weights.copy(ring.weights(), static_cast<uint32_t>(done), full);
      ring.advance();
    }
  }
}

// Half a tile's weights of this warp's strip, as two operands A.
__device__ __forceinline__ void decode_half(uint32_t (&a)[kHalfSlots], const StripWalk& walk, int half) {
#pragma unroll
  for (int i = 0; i < kHalfSlots; i += 2) walk.two_slots(kHalfSlots * half + i, a[i], a[i + 1]);
}

// Starts sums += A . x^T for half a tile, as a group of its own.
template <typename T, int kProducts>
__device__ __forceinline__ void start_products(float (&sums)[kProducts][64], const uint32_t (&a)[kHalfSlots],
                                               uint32_t x, int half) {
  const uint64_t first = describe_swizzled(x);
  products_begin();
#pragma unroll
  for (int step = 0; step < 2; ++step) {
#pragma unroll
    for (int p = 0; p < kProducts; ++p) {
      const uint64_t b = first + (p * kProductRows * kXRowBytes + 32 * (2 * half + step)) / 16;
      product_64x128x16<T>(sums[p], a[4 * step], a[4 * step + 1], a[4 * step + 2], a[4 * step + 3], b);
    }
  }
  products_commit();
}

__device__ __forceinline__ uint32_t bits_of(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }
__device__ __forceinline__ uint32_t bits_of(__half v) { return __half_as_ushort(v); }

// The sums of a warpgroup's tile, to the output: rows of x become rows in shared memory, then 16 bytes a
// thread, eight threads for the 128 bytes of a row.
template <typename T, int kProducts>
__device__ void write_out(const TilePart& part, int64_t first_row, int x_row, int rows,
                          const float (&sums)[kProducts][64], unsigned char* turned, int tile, int strip,
                          int lane) {
  float bias[2] = {};
#pragma unroll
  for (int low = 0; low < 2; ++low) {
    const int64_t row = first_row + strip * kStripRows + 8 * low + lane / 4;
    if (part.bias && row < part.out_features) bias[low] = to_float(static_cast<const T*>(part.bias)[row]);
  }
  const auto pair = [&](const float (&s)[64], int j, int low) {
    return bits_of(from_float<T>(s[4 * j + 2 * low] + bias[low])) |
           bits_of(from_float<T>(s[4 * j + 2 * low + 1] + bias[low])) << 16;
  };
  constexpr int kThreadsOfTile = kWarpgroup * kWarpLanes;
  const int thread = strip * kWarpLanes + lane;
  const int64_t left = part.out_features - first_row;
  const bool aligned = part.out_features % 8 == 0 && reinterpret_cast<uintptr_t>(part.out) % 16 == 0;
#pragma unroll
  for (int p = 0; p < kProducts; ++p) {
#pragma unroll
    for (int chunk = 0; chunk < kProductRows / kTurnedRows; ++chunk) {
      const int n0 = x_row + p * kProductRows + chunk * kTurnedRows;
      if (n0 >= rows) return;
      sync_threads_of(1 + tile, kThreadsOfTile);  // the chunk before has been read
#pragma unroll
      for (int j = chunk * kTurnedRows / 8; j < (chunk + 1) * kTurnedRows / 8; j += 2) {
        const int n = 8 * (j % (kTurnedRows / 8) + lane / 16) + lane % 8;
        const int row = strip * kStripRows + 8 * (lane / 8 % 2);
        store_matrices_transposed(shared_address(turned) + n * kTurnedStride + 2 * row, pair(sums[p], j, 0),
                                  pair(sums[p], j, 1), pair(sums[p], j + 1, 0), pair(sums[p], j + 1, 1));
      }
      sync_threads_of(1 + tile, kThreadsOfTile);
      if (aligned) {
#pragma unroll
        for (int i = thread; i < kTurnedRows * 8; i += kThreadsOfTile) {
          const int n = i / 8, row = i % 8 * 8;
          if (n0 + n < rows && row < left) {
            *reinterpret_cast<uint4*>(static_cast<T*>(part.out) + (n0 + n) * part.out_features + first_row +
                                      row) =
                *reinterpret_cast<const uint4*>(turned + n * kTurnedStride + 2 * row);
          }
        }
      } else {
#pragma unroll 1
        for (int i = thread; i < kTurnedRows * kTileRows; i += kThreadsOfTile) {
          const int n = i / kTileRows, row = i % kTileRows;
          if (n0 + n < rows && row < left) {
            static_cast<T*>(part.out)[(n0 + n) * part.out_features + first_row + row] =
                *reinterpret_cast<const T*>(turned + n * kTurnedStride + 2 * row);
          }
        }
      }
    }
  }
}

// The sums of a warp's slice as it holds them.
template <int kProducts>
__device__ void write_partials(float* partials, const float (&sums)[kProducts][64], int lane) {
#pragma unroll
  for (int p = 0; p < kProducts; ++p) {
#pragma unroll
    for (int i = 0; i < 64; ++i) __stcg(partials + (64 * p + i) * kWarpLanes + lane, sums[p][i]);
  }
}

template <typename T, int kRows>
__device__ void consume(const PrefillArgs& a, unsigned char* shared, int warp, int lane) {
  constexpr int kProducts = kRows / kProductRows;
  const uint32_t memory = shared_address(shared);
  const int tile = warp / kWarpgroup, strip = warp % kWarpgroup;
  const StripWalk walk(memory + kAreasAt + warp * kAreaBytes, lane);
  Ring<kRows> ring(a, memory);
  const int items = item_count(a);
  const auto begin_tile = [&] {
    barrier_wait(ring.full(ring.stage), ring.parity);
    const uint32_t weights = ring.weights();
    walk.begin(weights + tile * kTileBytes, weights + kStepHeadBytes, strip);
  };
  const auto release = [&](int stage) {
    if (lane == 0) barrier_arrive(ring.empty(stage));
  };

  for (auto number = static_cast<int>(blockIdx.x); number < items; number += static_cast<int>(gridDim.x)) {
    const Item item = item_at<kRows>(a, number);
    if (tile >= tiles_of(a.list, item.group, 0).count) {  // the last group of a weight may be one tile
      for (int step = 0; step < item.steps; ++step) {
        barrier_wait(ring.full(ring.stage), ring.parity);
        __syncwarp();
        release(ring.stage);
        ring.advance();
      }
      continue;
    }
    float sums[kProducts][64] = {};
#pragma unroll
    for (int p = 0; p < kProducts; ++p) settle(sums[p]);
    uint32_t front[kHalfSlots], back[kHalfSlots];
    int before = -1;
    begin_tile();
    for (int step = 0; step < item.steps; ++step) {
      const uint32_t x = ring.x();
      decode_half(front, walk, 0);
      start_products<T>(sums, front, x, 0);
      products_wait<1>();
      if (step > 0) release(before);
      decode_half(back, walk, 1);
      start_products<T>(sums, back, x, 1);
      before = ring.stage;
      ring.advance();
      if (step + 1 < item.steps) begin_tile();
      products_wait<1>();
    }
    products_wait<0>();
#pragma unroll
    for (int p = 0; p < kProducts; ++p) settle(sums[p]);
    release(before);

    const ListedPart& found = part_of(a.list, item.group);
    const int64_t first_row =
        (static_cast<int64_t>(item.group - found.first_group) * kGroup + tile) * kTileRows;
    if (a.partials == nullptr) {
      write_out<T>(found.part, first_row, item.x_row, a.rows, sums, shared + kTurnedAt + tile * kTurnedBytes,
                   tile, strip, lane);
    } else {
      const int64_t at = partials_at(a, item.slice, item.group, item.x_row / kRows, warp);
      write_partials(a.partials + at, sums, lane);
    }
  }
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, 1) prefill(const __grid_constant__ PrefillArgs a) {
  unsigned char* shared = dynamic_shared();
  const uint32_t skew = -shared_address(shared) % kAlignment;
  shared += skew;
  // Taken from lane 0, so that the compiler knows what is the same in a warp and keeps it in uniform
  // registers.
  const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpLanes, 0),
            lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  if (threadIdx.x == 0) {
    const Ring<kRows> ring(a, shared_address(shared));
    for (int s = 0; s < a.stages; ++s) {
      barrier_init(ring.full(s), kXLane + 1);
      barrier_init(ring.empty(s), kConsumerWarps);
    }
    barrier_init_fence();
  }
  __syncthreads();
  allow_next_kernel();
  if (warp >= kConsumerWarps) {
    shrink_registers<kProducerRegisters>();
    if (warp == kConsumerWarps) produce<kRows>(a, shared_address(shared), lane);
  } else {
    grow_registers<kConsumerRegisters>();
    consume<T, kRows>(a, shared, warp, lane);
  }
}

}  // namespace mosaic::cuda
