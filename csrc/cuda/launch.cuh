// SPDX-License-Identifier: Apache-2.0
// What every launcher needs: the right device and its limits, the dtype as a type, one way to launch.
#pragma once

#include <algorithm>
#include <atomic>

#include "cuda/ptx.cuh"
#include "mosaic/kernels.h"

namespace mosaic::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

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

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // of one multiprocessor; a block may have all but 1 KB of it
  int major;         // compute capability
};

constexpr int kMaxDevices = 64;

// Read once for each device: an attribute costs a driver call.
inline DeviceLimits device_limits(int device) {
  static std::atomic<uint64_t> known[kMaxDevices];
  const bool kept = device >= 0 && device < kMaxDevices;
  uint64_t packed = kept ? known[device].load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    int multiprocessors = 1, shared = 0, major = 0;
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    packed = static_cast<uint64_t>(multiprocessors) | static_cast<uint64_t>(shared) << 16 |
             static_cast<uint64_t>(major) << 48;
    if (kept) known[device].store(packed, std::memory_order_relaxed);
  }
  return {static_cast<int>(packed & 0xffff), static_cast<int>(packed >> 16 & 0xffffffff),
          static_cast<int>(packed >> 48)};
}

inline Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return {};
  return {Code::kUnavailable, cudaGetErrorString(error)};
}

// Whether the kernel's code for the current device, whose number is `device`, waits for the kernel before it
// (wait_for_previous_kernel): a later device runs code for an earlier one, too, and that does not.
template <auto kKernel>
bool waits_itself(int device) {
  static std::atomic<int> known[kMaxDevices];
  const bool kept = device >= 0 && device < kMaxDevices;
  int version = kept ? known[device].load(std::memory_order_relaxed) : 0;
  if (version == 0) {
    cudaFuncAttributes attributes = {};
    cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel));
    version = attributes.ptxVersion;  // 90: compiled for compute capability 9.0
    if (kept) known[device].store(version, std::memory_order_relaxed);
  }
  return version >= 90;
}

struct Shape {
  dim3 grid;
  int threads;
  int shared_bytes = 0;
  bool overlaps = false;  // may start while the kernel before it still runs (see allow_next_kernel)
};

template <auto kKernel, typename... Args>
Status launch(const Shape& shape, Launch where, const Args&... args) {
  if (shape.shared_bytes > 48 * 1024) {  // more has to be asked for, once for each kernel and device
    static std::atomic<int> allowed[kMaxDevices];
    const bool kept = where.device >= 0 && where.device < kMaxDevices;
    if (!kept || allowed[where.device].load(std::memory_order_relaxed) < shape.shared_bytes) {
      const cudaError_t error =
          cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
      if (error != cudaSuccess) {
        cudaGetLastError();
        return status_of(error);
      }
      if (kept) allowed[where.device].store(shape.shared_bytes, std::memory_order_relaxed);
    }
  }
  if (shape.overlaps) {
    // As much shared memory as there is, so that blocks of the next kernel find room beside these; else the
    // driver may set the multiprocessor for one kernel's needs alone and wait until it is empty to change
    // that.
    static std::atomic<bool> carved[kMaxDevices];
    const bool kept = where.device >= 0 && where.device < kMaxDevices;
    if (!kept || !carved[where.device].load(std::memory_order_relaxed)) {
      const cudaError_t error =
          cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
      if (error != cudaSuccess) {
        cudaGetLastError();
        return status_of(error);
      }
      if (kept) carved[where.device].store(true, std::memory_order_relaxed);
    }
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(where.stream);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = shape.overlaps && waits_itself<kKernel>(where.device) ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kKernel, args...);
  cudaGetLastError();
  return status_of(error);
}

// Calls run(T()) with T the element type of `dtype`.
template <typename Run>
Status with_type(DType dtype, const Run& run) {
  if (dtype == DType::kFloat32) return run(float());
  if (dtype == DType::kBFloat16) return run(__nv_bfloat16());
  if (dtype == DType::kFloat16) return run(__half());
  return invalid("unknown dtype");
}

// The same where tensor cores multiply: bf16 and fp16 alone.
template <typename Run>
Status with_half_type(DType dtype, const Run& run) {
  if (dtype == DType::kBFloat16) return run(__nv_bfloat16());
  if (dtype == DType::kFloat16) return run(__half());
  return invalid("this kernel takes bf16 and fp16");
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

__device__ __forceinline__ bool is_zero(float v) { return (__float_as_uint(v) & 0x7fffffffu) == 0; }
__device__ __forceinline__ bool is_zero(__nv_bfloat16 v) { return (__bfloat16_as_ushort(v) & 0x7fffu) == 0; }
__device__ __forceinline__ bool is_zero(__half v) { return (__half_as_ushort(v) & 0x7fffu) == 0; }

// The sum of the lanes up to this one.
__device__ __forceinline__ int inclusive_sum(int v) {
#pragma unroll
  for (int distance = 1; distance < kWarpLanes; distance *= 2) v = plus_lane_below(v, distance);
  return v;
}

}  // namespace mosaic::cuda
