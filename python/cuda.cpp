// SPDX-License-Identifier: Apache-2.0
// mosaic_kernels._C_cuda: addresses, sizes and a stream in, exceptions out.
#include "mosaic/cuda.h"

#include <pybind11/pybind11.h>

#include "status.h"

namespace py = pybind11;

namespace mosaic::python {
namespace {

template <typename T>
T* address(uintptr_t p) {
  return reinterpret_cast<T*>(p);
}

void sparse_linear(uintptr_t x, uintptr_t values, uintptr_t words, uintptr_t offsets, uintptr_t bias,
                   uintptr_t out, int64_t rows, int64_t in_features, int64_t out_features, int64_t nnz,
                   int dtype, uintptr_t stream) {
  const LinearArgs args{address<void>(x),
                        address<void>(values),
                        address<uint32_t>(words),
                        address<int64_t>(offsets),
                        address<void>(bias),
                        address<void>(out),
                        rows,
                        in_features,
                        out_features,
                        nnz,
                        DType(dtype),
                        0};
  raise_unless_ok(cuda::sparse_linear(args, address<CUstream_st>(stream)), "sparse_linear");
}

void unpack(uintptr_t weight, uintptr_t values, uintptr_t bitmask, int64_t bitmask_stride, uintptr_t offsets,
            int64_t rows, int64_t columns, int64_t nnz, int dtype, uintptr_t stream) {
  const PackValuesArgs args{address<void>(weight),
                            address<void>(values),
                            address<uint8_t>(bitmask),
                            bitmask_stride,
                            address<int64_t>(offsets),
                            rows,
                            columns,
                            nnz,
                            DType(dtype),
                            0};
  raise_unless_ok(cuda::unpack(args, address<CUstream_st>(stream)), "unpack");
}

}  // namespace
}  // namespace mosaic::python

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of mosaic_kernels; call them through mosaic_kernels.ops";
  m.def("why_not", mosaic::cuda::why_not);
  m.def("sparse_linear", mosaic::python::sparse_linear);
  m.def("unpack", mosaic::python::unpack);
}
