// SPDX-License-Identifier: Apache-2.0
// The names of CUDA that our sources use, with their meaning on fibers (see simt.h): qualifiers, types,
// intrinsics, and the part of the runtime that launches. There is no __shared__: kernels take their shared
// memory from dynamic_shared(), which is checked.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/numeric.h"
#include "simt/simt.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Of the fiber that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

// --- numbers ---

struct __half {
  mosaic::cpu::Half value;
};
struct __nv_bfloat16 {
  mosaic::cpu::BFloat16 value;
};

inline float __half2float(__half v) { return mosaic::cpu::to_float(v.value); }
inline float __bfloat162float(__nv_bfloat16 v) { return mosaic::cpu::to_float(v.value); }
inline __half __float2half_rn(float v) {
  __half result;
  mosaic::cpu::store(v, &result.value);
  return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  __nv_bfloat16 result;
  mosaic::cpu::store(v, &result.value);
  return result;
}
inline unsigned short __half_as_ushort(__half v) { return v.value.bits; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {{bits}}; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {{bits}}; }
inline unsigned __float_as_uint(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }

// Four bytes of the eight of b:a, each chosen by a nibble of s (its high bit: the byte's sign, repeated).
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = s >> (4 * i) & 0xf;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (nibble & 7))) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}

// --- lanes of a warp ---

namespace mosaic::simt {

// Each lane is given the `v` of lane source(its number), or keeps its own where that is negative.
template <typename T, typename Source>
T shuffle(const char* what, uint32_t mask, T v, const Source& source) {
  struct Lane {
    T given, taken;
    int from;
  } lane{v, v, source(thread_number() % kLanes)};
  meet_warp(what, mask, lane, [&](Lane* const* lanes) {
    for (int l = 0; l < kLanes; ++l) {
      if (lanes[l] == nullptr || lanes[l]->from < 0) continue;
      if (lanes[lanes[l]->from] == nullptr)
        fail("%s reads lane %d, which is not in its mask", what, lanes[l]->from);
      lanes[l]->taken = lanes[lanes[l]->from]->given;
    }
  });
  return lane.taken;
}

template <typename T, typename Combine>
T reduce(const char* what, uint32_t mask, T v, const Combine& combine) {
  meet_warp(what, mask, v, [&](T* const* lanes) {
    T* first = nullptr;
    for (int l = 0; l < kLanes; ++l) {
      if (lanes[l] == nullptr) continue;
      if (first == nullptr) {
        first = lanes[l];
      } else {
        *first = combine(*first, *lanes[l]);
      }
    }
    for (int l = 0; l < kLanes; ++l)
      if (lanes[l] != nullptr) *lanes[l] = *first;
  });
  return v;
}

}  // namespace mosaic::simt

template <typename T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  return mosaic::simt::shuffle("__shfl_sync", mask, v,
                               [=](int lane) { return lane / width * width + (source & (width - 1)); });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned distance, int width = 32) {
  return mosaic::simt::shuffle("__shfl_up_sync", mask, v, [=](int lane) {
    return lane % width < static_cast<int>(distance) ? -1 : lane - static_cast<int>(distance);
  });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T v, unsigned distance, int width = 32) {
  return mosaic::simt::shuffle("__shfl_down_sync", mask, v, [=](int lane) {
    return lane % width + static_cast<int>(distance) >= width ? -1 : lane + static_cast<int>(distance);
  });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
  return mosaic::simt::shuffle("__shfl_xor_sync", mask, v, [=](int lane) {
    const int source = lane ^ bits;
    return source / width > lane / width ? -1 : source;
  });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned own = predicate ? 1u << (mosaic::simt::thread_number() % 32) : 0;
  return mosaic::simt::reduce("__ballot_sync", mask, own, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate) {
  return mosaic::simt::reduce("__any_sync", mask, predicate != 0, [](bool a, bool b) { return a || b; });
}
inline int __all_sync(unsigned mask, int predicate) {
  return mosaic::simt::reduce("__all_sync", mask, predicate != 0, [](bool a, bool b) { return a && b; });
}
template <typename T>
T __reduce_add_sync(unsigned mask, T v) {
  return mosaic::simt::reduce("__reduce_add_sync", mask, v, [](T a, T b) { return static_cast<T>(a + b); });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T v) {
  return mosaic::simt::reduce("__reduce_max_sync", mask, v, [](T a, T b) { return max(a, b); });
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  char nothing = 0;
  mosaic::simt::meet_warp("__syncwarp", mask, nothing, [](char* const*) {});
}
inline void __syncthreads() { mosaic::simt::sync_block(0, 0); }

// --- global memory ---

inline void __threadfence() { mosaic::simt::step(); }
inline void __threadfence_block() { mosaic::simt::step(); }

template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  mosaic::simt::step();
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
void __stcg(T* to, T v) {
  mosaic::simt::step();
  *to = v;
}
template <typename T, typename V>
T atomicAdd(T* at, V v) {
  mosaic::simt::step();
  const T before = *at;
  *at = before + v;
  return before;
}
template <typename T, typename V>
T atomicMax(T* at, V v) {
  mosaic::simt::step();
  const T before = *at;
  *at = max(before, v);
  return before;
}
inline unsigned atomicInc(unsigned* at, unsigned most) {
  mosaic::simt::step();
  const unsigned before = *at;
  *at = before >= most ? 0 : before + 1;
  return before;
}

// --- the runtime ---

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };

using cudaStream_t = struct CUstream_st*;
struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace mosaic::simt {

struct Device {
  int multiprocessors, shared_bytes, major;
};
constexpr int kDevices = 128;  // those from 64 on are not cached by launch.cuh, so they may change
void set_device(int device, Device limits);

cudaError_t allow_shared(const void* kernel, int bytes);
cudaError_t run_kernel(const cudaLaunchConfig_t& config, const void* kernel,
                       const std::function<void()>& body);

}  // namespace mosaic::simt

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = MOSAIC_SIMT_ARCH;
  return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout)  // a hint: percent
    return value >= -1 && value <= 100 ? cudaSuccess : cudaErrorInvalidValue;
  return mosaic::simt::allow_shared(reinterpret_cast<const void*>(kernel), value);
}

template <typename... Parameters, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Args&... args) {
  return mosaic::simt::run_kernel(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(args...); });
}
