// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "cuda/launch.cuh"
#include "simt/probes.h"

namespace mosaic::cuda {
namespace {

constexpr int kBytes = 4096;  // of shared memory in every probe
constexpr int kThreads = 2 * kWarpLanes;

struct ProbeArgs {
  int variant;
  const uint32_t* in;
  uint32_t* out;
};

// A lane takes what its neighbour stored; variant 0 lets the neighbour come first.
__global__ void neighbour(const ProbeArgs a) {
  const uint32_t base = shared_address(dynamic_shared()), t = threadIdx.x;
  store_shared_u64(base + 8 * t, make_uint2(t, t));
  if (a.variant == 0) __syncwarp();
  a.out[t] = load_shared_u32(base + 8 * (t ^ 1));
}

// 1 KB on its way to shared memory; variant 1 waits for the phase before the copy's, 2 for the one after it,
// 3 announces too little, 4 never waits.
__global__ void copy(const ProbeArgs a) {
  const uint32_t barrier = shared_address(dynamic_shared()), to = barrier + 1024, t = threadIdx.x;
  constexpr uint32_t kCopied = 1024;
  if (t == 0) barrier_init(barrier, kBulkCopies ? 1 : kThreads);
  __syncthreads();
  if constexpr (kBulkCopies) {
    if (t == 0) {
      barrier_arrive_expect(barrier, a.variant == 3 ? kCopied - 16 : kCopied);
      copy_bulk(to, a.in, kCopied, barrier);
    }
  } else {
    copy_16(to + 16 * t, a.in + 4 * t);
    if (a.variant != 3 || t != 0) barrier_arrive_after_copies(barrier);
  }
  __syncwarp();
  if (a.variant != 4) barrier_wait(barrier, a.variant == 1 ? 1 : 0);
  if (a.variant == 2) barrier_wait(barrier, 1);
  for (uint32_t i = t; i < kCopied / 4; i += kThreads) a.out[i] = load_shared_u32(to + 4 * i);
  barrier_wait(barrier, 0);  // a block may not end before its copies
}

// A [16][16], B^T [8][16] -> fp32 [16][8], by one warp; as variant (a DType) says.
template <typename T>
__device__ void multiply(const ProbeArgs& a) {
  const uint32_t base = shared_address(dynamic_shared()), lane = threadIdx.x;
  const auto* in = reinterpret_cast<const uint2*>(a.in);  // 8 bytes, of which a lane moves 6 times as many
  for (uint32_t i = lane; i < 96; i += kWarpLanes) store_shared_u64(base + 8 * i, in[i]);
  __syncwarp();
  uint32_t left[4], right[4];
  load_matrices(left, base + 32 * (lane % 16) + 16 * (lane / 16));
  load_matrices(right, base + 512 + 32 * (lane % 8) + 16 * (lane / 8 % 2));
  float sums[4] = {0, 0, 0, 0};
  mma_16x8x16<T>(sums, left, right[0], right[1]);
  auto* out = reinterpret_cast<float*>(a.out);
  for (int r = 0; r < 4; ++r) out[(lane / 4 + 8 * (r / 2)) * 8 + 2 * (lane % 4) + r % 2] = sums[r];
}

__global__ void matmul(const ProbeArgs a) {
  if (a.variant == static_cast<int>(DType::kBFloat16)) {
    multiply<__nv_bfloat16>(a);
  } else {
    multiply<__half>(a);
  }
}

// What the emulator refuses, one variant each.
__global__ void forbidden(const ProbeArgs a) {
  const uint32_t base = shared_address(dynamic_shared()), t = threadIdx.x;
  switch (a.variant) {
    case 0:
      a.out[t] = load_shared_u32(base + kBytes);
      break;
    case 1:
      a.out[t] = load_shared_u32(base + 4 * t + 2);
      break;
    case 2:
      if (t % 2 == 0) {
        __syncwarp();
      } else {
        a.out[t] = __shfl_sync(kFullWarp, t, 0);
      }
      break;
    case 3:
      if (t == 7) return;
      __syncwarp();
      break;
    case 4:
      if (t < kWarpLanes) __syncthreads();
      break;
    case 5:
      if (t == 0) barrier_init(base, 1);
      __syncthreads();
      barrier_arrive_expect(base, 16);
      if (!kBulkCopies) barrier_wait(base, 2);
      break;
    case 6:
      barrier_wait(base, 0);
      break;
    case 7:
      copy_16(base + 16 * t + 8, a.in);
      break;
    case 8:
      copy_16(base, a.in);
      break;
    case 9:
      copy_16(base + 16 * t, a.in + 4 * t);
      break;
    case 10:
      a.out[static_cast<int64_t>(t) << 40] = 1;
      break;
    case 11:
      sync_threads_of(1, t == 0 ? kThreads : kWarpLanes);
      break;
    case 12:
      if (t == 0) barrier_init(base, 2);
      __syncthreads();
      if (t == 0) barrier_arrive(base);
      barrier_wait(base, 0);
      break;
    case 13:
      if (t == 0) barrier_init(base, 2);
      __syncthreads();
      if (t == 0) store_shared_u64(base, make_uint2(0, 0));
      barrier_arrive(base);
      break;
    case 14:
      store_shared_u64(base + 8 * t, make_uint2(0, 0));
      if (t == 0) barrier_init(base + 1024, 1);
      __syncthreads();
      if (t == 0) copy_bulk(base, a.in, 512, base + 1024);
      break;
    case 15:
      a.out[t] = 1u << t;
      break;
    case 16:
      *reinterpret_cast<uint64_t*>(a.out + 1) = t;
      break;
    default:
      break;
  }
}

// Every thread of 8 blocks adds to one counter; variant 1 without an atomic.
__global__ void count(const ProbeArgs a) {
  if (a.variant == 0) {
    atomicAdd(a.out, 1u);
  } else {
    const uint32_t before = __ldcg(a.out);
    __stcg(a.out, before + 1);
  }
}

}  // namespace
}  // namespace mosaic::cuda

namespace mosaic::simt {

Status probe(const char* name, int variant, const void* in, void* out) {
  using namespace mosaic::cuda;
  const ProbeArgs args{variant, static_cast<const uint32_t*>(in), static_cast<uint32_t*>(out)};
  const Launch where{nullptr, 0};
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  const auto shape = [](unsigned blocks, int threads) { return Shape{dim3(blocks), threads, kBytes}; };
  if (is("neighbour")) return launch<neighbour>(shape(1, kThreads), where, args);
  if (is("copy")) return launch<cuda::copy>(shape(1, kThreads), where, args);
  if (is("matmul")) return launch<matmul>(shape(1, kWarpLanes), where, args);
  if (is("forbidden")) return launch<forbidden>(shape(1, kThreads), where, args);
  if (is("count")) return launch<cuda::count>(shape(8, kThreads), where, args);
  return invalid("no such probe");
}

}  // namespace mosaic::simt
