// SPDX-License-Identifier: Apache-2.0
// Entry points of the CUDA module. They launch on the given stream and neither allocate nor synchronise.
#pragma once

#include "mosaic/kernels.h"

struct CUstream_st;  // cudaStream_t without the CUDA headers

namespace mosaic::cuda {

const char* why_not();  // nullptr where a device is usable, else the driver's reason
Status sparse_linear(const LinearArgs&, CUstream_st* stream);
Status unpack(const PackValuesArgs&, CUstream_st* stream);

}  // namespace mosaic::cuda
