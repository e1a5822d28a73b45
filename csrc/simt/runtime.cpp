// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA runtime that launchers call, for devices whose limits a test chooses.
#include <array>
#include <map>
#include <utility>

#include "simt/cuda.h"

namespace {

using mosaic::simt::Device;
using mosaic::simt::kDevices;

constexpr int kDefaultShared = 48 * 1024;  // what a launch may have without cudaFuncSetAttribute
constexpr int kReserved = 1024;            // of a multiprocessor's shared memory, for each block

std::array<Device, kDevices>& devices() {
  static std::array<Device, kDevices> all = [] {
    std::array<Device, kDevices> initial;
    initial.fill({4, 228 * 1024, MOSAIC_SIMT_ARCH / 10});
    return initial;
  }();
  return all;
}

int current_device = 0;
std::map<std::pair<int, const void*>, int> allowed;

}  // namespace

namespace mosaic::simt {

void set_device(int device, Device limits) { devices().at(static_cast<size_t>(device)) = limits; }

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes > devices()[static_cast<size_t>(current_device)].shared_bytes - kReserved)
    return cudaErrorInvalidValue;
  allowed[{current_device, kernel}] = bytes;
  return cudaSuccess;
}

cudaError_t run_kernel(const cudaLaunchConfig_t& config, const void* kernel,
                       const std::function<void()>& body) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (block.x == 0 || block.x > 1024 || block.y != 1 || block.z != 1) return cudaErrorInvalidConfiguration;
  // Such a launch may begin before the kernel ahead of it has ended; code for sm_80 does not wait for that.
  if (config.numAttrs > 0 && MOSAIC_SIMT_ARCH < 90) return cudaErrorInvalidConfiguration;
  const auto shared = static_cast<int>(config.dynamicSmemBytes);
  const auto more = allowed.find({current_device, kernel});
  if (shared > (more == allowed.end() ? kDefaultShared : more->second)) return cudaErrorInvalidValue;
  const bool ok = run_grid({grid.x, grid.y, grid.z}, static_cast<int>(block.x), shared, body);
  return ok ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace mosaic::simt

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  const Device& limits = devices()[static_cast<size_t>(device)];
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = limits.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = limits.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = limits.shared_bytes;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = limits.shared_bytes - kReserved;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchFailure:
      return mosaic::simt::error();
  }
  return "unknown error";
}
