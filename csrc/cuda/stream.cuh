// SPDX-License-Identifier: Apache-2.0
// The walk that the kernels for few rows share. All steps of a product form one list, of which every block
// takes an equal run ("stream-K"): a producer warp copies each step's weights and activations into a ring of
// stages in shared memory, and the other warps, one for each strip of 16 rows, multiply.
//
//   step      kGroup tiles of 64 x 64 weights, one under the other; the list runs along the columns
//   segment   a block's steps in one group of rows. One that spans all columns writes the output; others
//             write fp32 partial sums, and the block that arrives last adds them in the order of the
//             columns, so the result does not depend on which block that is.
//
// Weights do not depend on the kernel before this one: their first copies start before it has ended.
#pragma once

#include "cuda/parts.cuh"

namespace mosaic::cuda {

constexpr int kBlockRows = 8;  // rows of x that one mma takes
constexpr int kMaxBlocks = 8;  // of which a launch takes at most so many: 64 rows
// 62 KB of a block with 8 rows of x and half of the weights kept, 125 KB of a multiprocessor: the rest of its
// shared memory is left to blocks of the next kernel, which start their copies before this one has ended.
constexpr int kMaxStages = 6;
constexpr int kConsumerWarps = kGroup * kStrips;
constexpr int kConsumers = kConsumerWarps * kWarpLanes;
constexpr int kStreamThreads = kConsumers + kWarpLanes;
constexpr int kXStride = kTileColumns * 2 + 16;  // bytes; 8 rows at 16 bytes of skew lie in different banks
constexpr int kControlBytes = 256;               // 2 kMaxStages barriers and a flag
constexpr int kFixedShared = kControlBytes + kConsumerWarps * kAreaBytes;

// How the list of steps is dealt out.
struct Deal {
  int64_t steps;
  int blocks;
};

MOSAIC_HD int64_t first_step(const Deal& d, int64_t block) { return d.steps * block / d.blocks; }
MOSAIC_HD int block_of(const Deal& d, int64_t step) {
  return static_cast<int>(((step + 1) * d.blocks - 1) / d.steps);
}

struct StreamArgs {
  PartList list;
  const void* x;
  int rows;
  int in_features;
  Deal deal;
  int stages;
  int weight_bytes;    // room for a step's weights
  unsigned* arrivals;  // [groups], zero before and after
  float* partials;     // [2 blocks][kConsumerWarps][4 sums of each 8 rows][lanes]
};

template <typename Format, int kBlocks>
struct StageShape {
  static constexpr int kX = kBlocks * kBlockRows * kXStride;
  MOSAIC_HD int bytes(int weight_bytes) { return kX + weight_bytes; }
};

// Where the lengths of a block's steps lie.
struct StepsOfRun {
  const StreamArgs& a;
  int64_t first, last;

  __device__ const uint32_t* operator()(int64_t i) const {
    const int64_t step = first + i;
    if (step >= last) return nullptr;
    return offset_of(a.list, static_cast<int>(step / a.list.column_steps),
                     static_cast<int>(step % a.list.column_steps));
  }
};

template <typename Format>
__device__ __forceinline__ auto weight_copies(const StepsOfRun& steps, int lane) {
  if constexpr (Format::kTileBytes == 0) {
    return StepCopies<StepsOfRun>(steps, lane);
  } else {
    return TileCopies<Format::kTileBytes>(lane);
  }
}

template <typename Format>
using WeightCopies = decltype(weight_copies<Format>(std::declval<StepsOfRun>(), 0));

// One warp copies all steps of a block. The memory needs 700 to 1100 cycles of a multiprocessor of an H200
// for the bytes of a block's step (by accounting; not measured), and an instruction of a lone warp takes five
// or more of them. So a step's weights are one bulk copy, and rows of x, 128 bytes at a time, are none, which
// a warp starts one by one. A step of the tile bitmap with 8 rows of x takes the warp 60 instructions
// (nvcc 13.0, sm_90); 105 and three more rounds of a loop over lanes when bits and values of each tile were
// copies of their own.
template <typename Format, int kBlocks>
struct Producer {
  const StreamArgs& a;
  uint32_t barriers, stages;
  int64_t first, last;
  int lane;
  int group, column_step;            // of the next step
  int enter_at;                      // the group where weights begin that do not follow those before
  uint32_t full, memory;             // of the stage: its barrier, and that for `empty` kMaxStages behind it
  uint32_t behind_full, ring_bytes;  // the last stage's barrier, and its memory from the first's on
  uint32_t parity = 0;
  const char* x;        // this lane's piece of the next step's first rows
  uint32_t x_at;        // where that goes in a stage
  int x_rows, x_steps;  // of x that this lane copies; of a row that have the lane's columns
  WeightCopies<Format> weights;

  __device__ Producer(const StreamArgs& args, uint32_t barriers_, uint32_t stages_, int64_t first_,
                      int64_t last_, int lane_)
      : a(args),
        barriers(barriers_),
        stages(stages_),
        first(first_),
        last(last_),
        lane(lane_),
        full(barriers_),
        memory(stages_),
        weights(weight_copies<Format>({args, first_, last_}, lane_)) {
    group = static_cast<int>(first / a.list.column_steps);
    column_step = static_cast<int>(first % a.list.column_steps);
    enter();
    // Shuffled, so that the compiler keeps them and does not work them out anew in every step.
    behind_full = __shfl_sync(kFullWarp, barriers + 8 * a.stages, 0);
    ring_bytes = __shfl_sync(kFullWarp, a.stages * StageShape<Format, kBlocks>::bytes(a.weight_bytes), 0);
    x = x_of(column_step);
    const int row = lane / kRowLanes, column = lane % kRowLanes * kUnitValues;
    x_at = row * kXStride + 2 * column;
    x_rows = (a.rows - row + kRowsAtOnce - 1) / kRowsAtOnce;
    x_steps = (a.in_features - column + kTileColumns - 1) / kTileColumns;
  }

  __device__ void enter() {
    weights.enter(a.list, group, column_step);
    enter_at = group + 1;
    if constexpr (WeightCopies<Format>::kRunsOn) enter_at = end_of_part(a.list, group);
  }

  __device__ void first_stage() {
    full = barriers;
    memory = stages;
    parity = 0;
  }

  __device__ void next_stage() {
    memory += StageShape<Format, kBlocks>::bytes(a.weight_bytes);
    full += 8;
    if (full == behind_full) {
      full = barriers;
      memory -= ring_bytes;
      parity ^= 1;
    }
  }

  __device__ void copy_weights(int i) {
    weights.copy(memory + StageShape<Format, kBlocks>::kX, static_cast<uint32_t>(i), full);
  }

  // To the first step of the next group, and to its weights where they lie elsewhere.
  __device__ void next_group() {
    column_step = 0;
    if (++group == enter_at) enter();
  }

  static constexpr int kRowLanes =
      kTileColumns / kUnitValues;  // the 128 bytes of a row: 8 pieces, a lane each
  static constexpr int kRowsAtOnce = kWarpLanes / kRowLanes;

  __device__ const char* x_of(int step) const {
    const int row = lane / kRowLanes, column = step * kTileColumns + lane % kRowLanes * kUnitValues;
    return static_cast<const char*>(a.x) + 2 * (static_cast<int64_t>(row) * a.in_features + column);
  }

  // `count` of the lane's pieces.
  __device__ void copy_x(int count) {
    const int64_t rows_further = 2 * kRowsAtOnce * static_cast<int64_t>(a.in_features);
#pragma unroll
    for (int n = 0; n < kBlocks * kBlockRows / kRowsAtOnce; ++n) {
      if (n < count) copy_16(memory + x_at + n * kRowsAtOnce * kXStride, x + n * rows_further);
    }
    // Of lane 0, so that the compiler knows that all lanes have the same and makes no loop over them.
    barrier_arrive_after_copies(__shfl_sync(kFullWarp, full, 0));
    x += 2 * kTileColumns;
  }

  __device__ void run() {
    const int count = static_cast<int>(last - first), filled = min(a.stages, count);
    int x_step = column_step;
    for (int i = 0; i < filled; ++i) {
      if (column_step == a.list.column_steps) next_group();
      copy_weights(i);
      next_stage();
      ++column_step;
    }
    wait_for_previous_kernel();
    first_stage();
    for (int i = 0; i < filled; ++i) {
      if (x_step == a.list.column_steps) x = x_of(x_step = 0);
      copy_x(x_step++ < x_steps ? x_rows : 0);
      next_stage();
    }
    first_stage();
    for (int i = filled; i < count;) {
      if (column_step == a.list.column_steps) {
        next_group();
        x = x_of(0);
      }
      const int end = i + min(a.list.column_steps - column_step, count - i);
      const int x_end = i + x_steps - column_step;
      column_step += end - i;
#pragma unroll 1
      for (; i < end; ++i) {
        barrier_wait(full + 8 * kMaxStages, parity);
        copy_weights(i);
        copy_x(i < x_end ? x_rows : 0);
        next_stage();
      }
    }
    wait_for_copies();
  }
};

// sums[b][r] of a warp: rows lane / 4 (r 0, 1) and 8 below (r 2, 3) of its strip, rows of x 8 b + 2 (lane %
// 4) + r % 2.
template <typename T, int kBlocks>
__device__ __forceinline__ void write_out(const TilePart& part, int64_t strip_row, int rows,
                                          const float (&sums)[kBlocks][4], int lane) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t row = strip_row + lane / 4 + 8 * (r / 2);
    if (row >= part.out_features) continue;
    const float bias = part.bias ? to_float(static_cast<const T*>(part.bias)[row]) : 0.0f;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int n = kBlockRows * b + 2 * (lane % 4) + r % 2;
      if (n < rows) static_cast<T*>(part.out)[n * part.out_features + row] = from_float<T>(sums[b][r] + bias);
    }
  }
}

// The segment's sums go to the output, or to the block that arrives last.
template <typename T, int kBlocks>
__device__ void finish_segment(const StreamArgs& a, int group, bool whole, bool starts_run, uint32_t* flag,
                               float (&sums)[kBlocks][4], int warp, int lane) {
  const ListedPart& found = part_of(a.list, group);
  const int64_t strip_row =
      (static_cast<int64_t>(group - found.first_group) * kGroup * kStrips + warp) * kStripRows;
  if (!whole) {
    constexpr int kSums = kBlocks * 4 * kWarpLanes;
    const auto slot = [&](int64_t block, bool start) {
      return a.partials + ((2 * block + (start ? 0 : 1)) * kConsumerWarps + warp) * kSums + lane;
    };
    float* own = slot(blockIdx.x, starts_run);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 4; ++r) __stcg(own + (4 * b + r) * kWarpLanes, sums[b][r]);
    }
    const int64_t begin = static_cast<int64_t>(group) * a.list.column_steps;
    const int first_block = block_of(a.deal, begin);
    const int last_block = block_of(a.deal, begin + a.list.column_steps - 1);
    // The barrier orders the block's sums before one thread's arrival, which releases them to the last block;
    // that one's arrival acquires them, and the barrier behind it orders its other threads' loads.
    sync_threads_of(1, kConsumers);
    if (threadIdx.x == 0) {
      const auto others = static_cast<unsigned>(last_block - first_block);
      *flag = count_arrival(a.arrivals + group, others) == others;  // the last arrival sets it to zero again
    }
    sync_threads_of(1, kConsumers);
    if (!*flag) return;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 4; ++r) sums[b][r] = 0;
    }
    for (int block = first_block; block <= last_block; ++block) {
      const float* part = slot(block, first_step(a.deal, block) >= begin);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int r = 0; r < 4; ++r) sums[b][r] += __ldcg(part + (4 * b + r) * kWarpLanes);
      }
    }
  }
  write_out<T, kBlocks>(found.part, strip_row, a.rows, sums, lane);
}

template <typename Format, typename T, int kBlocks>
__device__ void consume(const StreamArgs& a, uint32_t* flag, uint32_t barriers, uint32_t area,
                        uint32_t stages, int64_t first, int64_t last, int warp, int lane) {
  float sums[kBlocks][4] = {};
  auto group = static_cast<int>(first / a.list.column_steps);
  auto column_step = static_cast<int>(first % a.list.column_steps);
  int segment_start = column_step, stage = 0;
  uint32_t parity = 0;
  // Tiles of the group: the tile bitmap fills up the last one with a tile of zeros.
  int tiles = Format::kTileBytes == 0 ? kGroup : tiles_of(a.list, group, column_step).count;
  const int tile = warp / kStrips;
  const uint32_t stage_bytes = StageShape<Format, kBlocks>::bytes(a.weight_bytes);
  for (int64_t step = first; step < last; ++step) {
    barrier_wait(barriers + 8 * stage, parity);
    if (Format::kTileBytes == 0 || tile < tiles) {
      const uint32_t x = stages + stage * stage_bytes;
      Format::template multiply<T, kBlocks>(sums, x + StageShape<Format, kBlocks>::kX, x, area, warp, lane);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(barriers + 8 * (kMaxStages + stage));
    if (++stage == a.stages) {
      stage = 0;
      parity ^= 1;
    }
    if (++column_step == a.list.column_steps || step + 1 == last) {
      const bool whole = segment_start == 0 && column_step == a.list.column_steps;
      const bool starts_run = step - first < column_step - segment_start;
      finish_segment<T, kBlocks>(a, group, whole, starts_run, flag, sums, warp, lane);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int r = 0; r < 4; ++r) sums[b][r] = 0;
      }
      segment_start = column_step = 0;
      ++group;
      if constexpr (Format::kTileBytes != 0) {
        if (step + 1 < last) tiles = tiles_of(a.list, group, 0).count;
      }
    }
  }
}

template <typename Format, typename T, int kBlocks>
__global__ void __launch_bounds__(kStreamThreads, 2) stream_linear(const __grid_constant__ StreamArgs a) {
  unsigned char* memory = dynamic_shared();
  const uint32_t barriers = shared_address(memory);
  auto* flag = reinterpret_cast<uint32_t*>(memory + 16 * kMaxStages);
  const uint32_t areas = barriers + kControlBytes, stages = barriers + kFixedShared;
  // Taken from lane 0, so that the compiler knows what is the same in a warp and keeps it in uniform
  // registers.
  const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpLanes, 0),
            lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  if (threadIdx.x == 0) {
    for (int i = 0; i < a.stages; ++i) {
      barrier_init(barriers + 8 * i, kWarpLanes + (kBulkCopies ? 1 : 0));
      barrier_init(barriers + 8 * (kMaxStages + i), kConsumerWarps);
    }
    barrier_init_fence();
  }
  if (a.in_features % kTileColumns != 0) {
    // The last copy of x does not reach the end of its row: a NaN left there would spoil its zero weights.
    const int bytes = StageShape<Format, kBlocks>::bytes(a.weight_bytes);
    for (int i = static_cast<int>(threadIdx.x); i < a.stages * (StageShape<Format, kBlocks>::kX / 16);
         i += kStreamThreads) {
      const int stage = i / (StageShape<Format, kBlocks>::kX / 16),
                at = i % (StageShape<Format, kBlocks>::kX / 16);
      store_shared_zero_16(stages + stage * bytes + 16 * at);
    }
  }
  __syncthreads();
  allow_next_kernel();
  const int64_t first = first_step(a.deal, blockIdx.x), last = first_step(a.deal, blockIdx.x + 1);
  if (warp == kConsumerWarps) {
    Producer<Format, kBlocks>(a, barriers, stages, first, last, lane).run();
  } else {
    consume<Format, T, kBlocks>(a, flag, barriers, areas + warp * kAreaBytes, stages, first, last, warp,
                                lane);
  }
}

template <typename Format, typename T, int kBlocks>
Status launch_stream(StreamArgs& a, Launch where) {
  const DeviceLimits limits = device_limits(where.device);
  const int stage = StageShape<Format, kBlocks>::bytes(a.weight_bytes);
  // Two blocks for each multiprocessor where three stages each fit, else one.
  const int half = (limits.shared_bytes / 2 - 1024 - kFixedShared) / stage;
  const int per_multiprocessor = half >= 3 ? 2 : 1;
  const int room = limits.shared_bytes / per_multiprocessor - 1024 - kFixedShared;
  a.stages = std::min(kMaxStages, room / stage);
  if (a.stages < 1) return invalid("this device's shared memory is too small for one step");
  a.deal.blocks =
      static_cast<int>(std::min<int64_t>(a.deal.steps, per_multiprocessor * limits.multiprocessors));
  const Shape shape{dim3(static_cast<unsigned>(a.deal.blocks)), kStreamThreads,
                    kFixedShared + a.stages * stage, true};
  return launch<stream_linear<Format, T, kBlocks>>(shape, where, a);
}

// Counters, then the partial sums of two segments for each block.
inline int64_t stream_workspace_bytes(int device) {
  const int64_t blocks = 2 * device_limits(device).multiprocessors;
  return kArrivalBytes + 2 * blocks * kConsumerWarps * kMaxBlocks * 4 * kWarpLanes * 4;
}

template <typename Format>
Status stream(const TileLinearArgs& given, Launch where) {
  if (given.rows == 0) return {};
  const DeviceScope device(where.device);
  if (given.workspace_bytes < stream_workspace_bytes(where.device))
    return invalid("the workspace is too small");
  StreamArgs a = {};
  a.in_features = static_cast<int>(given.in_features);
  ListSize size;
  const Status checked = list_parts(given, a.list, size);
  if (!checked.ok()) return checked;
  if (size.groups > kMaxGroups) return invalid("too many output features for one launch");
  if (size.groups == 0) return {};
  a.deal.steps = size.groups * a.list.column_steps;
  a.weight_bytes = Format::kTileBytes == 0 ? static_cast<int>(size.largest_step) * 16 + kWalkSlack
                                           : kGroup * Format::kTileBytes;
  a.arrivals = given.counters ? given.counters : static_cast<unsigned*>(given.workspace);
  a.partials = reinterpret_cast<float*>(static_cast<char*>(given.workspace) + kArrivalBytes);
  return with_half_type(given.dtype, [&](auto element) -> Status {
    using T = decltype(element);
    for (int64_t done = 0; done < given.rows; done += kMaxBlocks * kBlockRows) {
      a.rows = static_cast<int>(std::min<int64_t>(given.rows - done, kMaxBlocks * kBlockRows));
      a.x = static_cast<const T*>(given.x) + done * given.in_features;
      for (int p = 0; p < given.part_count; ++p) {
        a.list.parts[p].part.out = static_cast<T*>(given.parts[p].out) + done * given.parts[p].out_features;
      }
      const int blocks = (a.rows + kBlockRows - 1) / kBlockRows;
      const Status status = blocks == 1   ? launch_stream<Format, T, 1>(a, where)
                            : blocks == 2 ? launch_stream<Format, T, 2>(a, where)
                            : blocks <= 4 ? launch_stream<Format, T, 4>(a, where)
                                          : launch_stream<Format, T, 8>(a, where);
      if (status.code != Code::kOk) return status;
    }
    return {};
  });
}

}  // namespace mosaic::cuda
