// SPDX-License-Identifier: Apache-2.0
// Wrappers of what compute capability 9.0 alone has: warpgroup products (wgmma; four warps, the first one's
// number a multiple of 4) and copies by tensor map. simt/ptx_sm90a.h gives each the same meaning on the CPU.
#pragma once

#include "cuda/launch.cuh"

#ifdef MOSAIC_SIMT
#include "simt/ptx_sm90a.h"
#else

#include <cuda.h>
#include <cudaTypedefs.h>

namespace mosaic::cuda {

// Where a row-major matrix of 16-bit elements lies, for the copy engine.
using TensorMap = CUtensorMap;

// Copies by this map are boxes of 64 columns and `box_rows` rows in the 128-byte swizzle. What lies outside
// the matrix arrives as zeros. The driver's function is asked for at run time, so that nothing links libcuda.
inline Status map_matrix(TensorMap& map, DType dtype, const void* matrix, int64_t rows, int64_t columns,
                         int box_rows) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    cudaGetLastError();
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  if (encode == nullptr) return {Code::kUnavailable, "this driver has no cuTensorMapEncodeTiled"};
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {2 * static_cast<cuuint64_t>(columns)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)}, every[] = {1, 1};
  const CUresult error = encode(
      &map, dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
      const_cast<void*>(matrix), sizes, row_bytes, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_SUCCESS ? Status{} : invalid("the driver refuses a tensor map of x");
}

// One thread copies the box whose first element is (row, column), to a multiple of 1024 bytes; the barrier
// counts all its bytes, zeros, too.
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap& map, int row, int column,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The compiler takes a product for an ordinary instruction: what it reads or writes may not move past this
// point, which belongs before the first product on these sums and after the wait for the last one.
__device__ __forceinline__ void settle(float (&sum)[64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// All warps of a warpgroup: the registers that each of its threads has from here on, a multiple of 8. The
// block's registers stay as many as at its launch: growing waits until others have shrunk.
template <int kCount>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Before a warpgroup's first product, and between writing registers and a product that reads them.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a group of products.
__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most the last `kRunning` groups still run. Before that neither the sums nor the A registers of the
// others may be touched, nor their B written.
template <int kRunning>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kRunning) : "memory");
}

#define MOSAIC_PRODUCT_64X128X16(type)                                                                       \
  asm volatile(                                                                                              \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                           \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "    \
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, " \
      "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, " \
      "%61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"                                               \
      : MOSAIC_SUMS(0), MOSAIC_SUMS(16), MOSAIC_SUMS(32), MOSAIC_SUMS(48)                                    \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b))
#define MOSAIC_SUMS(i) MOSAIC_SUMS_4(i), MOSAIC_SUMS_4(i + 4), MOSAIC_SUMS_4(i + 8), MOSAIC_SUMS_4(i + 12)
#define MOSAIC_SUMS_4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])

// sum += A . B, when its group is waited for: A 64 x 16 in registers, 16 rows a warp in the order of
// mma.m16n8k16; B 16 x 128 in shared memory, as `b` describes it. sum[4 j + r] of a lane: row lane / 4 (r 0,
// 1) or 8 below of its warp's 16, column 8 j + 2 (lane % 4) + r % 2.
template <typename T>
__device__ __forceinline__ void product_64x128x16(float (&sum)[64], uint32_t a0, uint32_t a1, uint32_t a2,
                                                  uint32_t a3, uint64_t b);

template <>
__device__ __forceinline__ void product_64x128x16<__nv_bfloat16>(float (&sum)[64], uint32_t a0, uint32_t a1,
                                                                 uint32_t a2, uint32_t a3, uint64_t b) {
  MOSAIC_PRODUCT_64X128X16("bf16");
}

template <>
__device__ __forceinline__ void product_64x128x16<__half>(float (&sum)[64], uint32_t a0, uint32_t a1,
                                                          uint32_t a2, uint32_t a3, uint64_t b) {
  MOSAIC_PRODUCT_64X128X16("f16");
}

#undef MOSAIC_PRODUCT_64X128X16
#undef MOSAIC_SUMS
#undef MOSAIC_SUMS_4

// Stores four 8 x 8 matrices of 16-bit elements, each transposed: lane l gives the address of column l % 8 of
// matrix l / 8, and of each matrix holds row l / 4, columns 2 (l % 4) and the next.
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, uint32_t v0, uint32_t v1,
                                                          uint32_t v2, uint32_t v3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(v0), "r"(v1), "r"(v2), "r"(v3)
               : "memory");
}

}  // namespace mosaic::cuda
#endif

namespace mosaic::cuda {

// The descriptor of operand B, columns of 64 elements (128 bytes) in the 128-byte swizzle, one column after
// the other from `address` on (a multiple of 1024, plus 32 for each 16 elements that are passed over):
//   bits 0-13   address / 16              bits 32-45  from one eight columns to the next: 1024 / 16
//   bits 16-29  unused in this swizzle: 1 bits 62-63  1: swizzle over 128 bytes
// (PTX ISA, "Matrix Descriptor Format" and "Strides").
MOSAIC_HD uint64_t describe_swizzled(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

}  // namespace mosaic::cuda
