// SPDX-License-Identifier: Apache-2.0
// What every launcher needs: the right device, the dtype as a type, and the launch's Status.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "mosaic/kernels.h"

namespace mosaic::cuda {

// Makes `device` current for this scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    cudaGetDevice(&before_);
    if (before_ != device)
      cudaSetDevice(device);
    else
      before_ = -1;
  }
  ~DeviceScope() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = -1;
};

inline Status launch_status() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return {Code::kUnavailable, cudaGetErrorString(error)};
}

// Calls run(T()) with T the element type of `dtype`.
template <typename Run>
Status with_type(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float());
    case DType::kBFloat16:
      return run(__nv_bfloat16());
    case DType::kFloat16:
      return run(__half());
  }
  return invalid("unknown dtype");
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half from_float(float v) {
  return __float2half_rn(v);
}

constexpr unsigned kFullWarp = 0xffffffffu;

}  // namespace mosaic::cuda
