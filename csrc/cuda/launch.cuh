// SPDX-License-Identifier: Apache-2.0
// What every launcher shares: the value types, and errors as a Status.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "mosaic/format.h"
#include "mosaic/status.h"

namespace mosaic::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) { return v; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16(v); }
template <>
__device__ __forceinline__ __half from_float<__half>(float v) { return __float2half(v); }

// The launch's own error only; a kernel's later failure surfaces at the caller's next synchronisation.
inline Status launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? Status{} : Status{Code::kUnavailable, cudaGetErrorString(error)};
}

// Calls run.template operator()<T>() with the C++ type of a dtype.
template <typename Run>
Status with_type(DType dtype, Run run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kBFloat16:
      return run(__nv_bfloat16{});
    case DType::kFloat16:
      return run(__half{});
  }
  return invalid("dtype must be fp32, bf16 or fp16");
}

}  // namespace mosaic::cuda
