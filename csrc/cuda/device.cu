// SPDX-License-Identifier: Apache-2.0
// Whether there is a device to run on.
#include <cuda_runtime.h>

#include "mosaic/cuda.h"

namespace mosaic::cuda {

const char* why_not() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count > 0 ? nullptr : "the driver shows no CUDA device";
}

}  // namespace mosaic::cuda
