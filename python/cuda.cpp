// SPDX-License-Identifier: Apache-2.0
// mosaic_kernels._C_cuda: device addresses, sizes and a stream in, exceptions out. Importing it calls
// nothing of CUDA. A launch does not wait for the device, so the GIL is kept.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "mosaic/kernels.h"
#include "status.h"

namespace py = pybind11;

namespace mosaic::python {
namespace {

template <typename T>
T* address(uintptr_t p) {
  return reinterpret_cast<T*>(p);
}

void linear_rows(uintptr_t x, uintptr_t values, uintptr_t words, uintptr_t offsets, uintptr_t bias,
                 uintptr_t out, int64_t rows, int64_t in_features, int64_t out_features, int64_t nnz,
                 int dtype, int device, uintptr_t stream) {
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
  raise_unless_ok(cuda::linear_rows(args, {address<void>(stream), device}), "sparse_linear");
}

// (tiles, offsets, bias, out, out_features, largest_step) of one weight
using Part = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t>;

template <Status (*kRun)(const cuda::TileLinearArgs&, cuda::Launch)>
void tile_linear(const std::vector<Part>& parts, uintptr_t x, int64_t rows, int64_t in_features, int dtype,
                 uintptr_t workspace, int64_t workspace_bytes, int device, uintptr_t stream,
                 uintptr_t counters) {
  cuda::TileLinearArgs args = {};
  if (parts.size() > cuda::kMaxParts) throw py::value_error("a launch takes at most 4 weights");
  for (const auto& [tiles, offsets, bias, out, out_features, largest_step] : parts) {
    args.parts[args.part_count++] = {address<void>(tiles), address<uint32_t>(offsets),
                                     address<void>(bias),  address<void>(out),
                                     out_features,         largest_step};
  }
  args.x = address<void>(x);
  args.rows = rows;
  args.in_features = in_features;
  args.dtype = DType(dtype);
  args.workspace = address<void>(workspace);
  args.workspace_bytes = workspace_bytes;
  args.counters = address<unsigned>(counters);
  raise_unless_ok(kRun(args, {address<void>(stream), device}), "sparse_linear");
}

void expand_tiles(uintptr_t tiles, uintptr_t offsets, uintptr_t weight, int64_t rows, int64_t columns,
                  int64_t first_row_tile, int64_t last_row_tile, int device, uintptr_t stream) {
  const cuda::ExpandTilesArgs args{
      address<void>(tiles), address<uint32_t>(offsets), address<void>(weight), rows, columns, first_row_tile,
      last_row_tile};
  raise_unless_ok(cuda::expand_tiles(args, {address<void>(stream), device}), "unpack");
}

void expand_2to4(uintptr_t tiles, uintptr_t weight, int64_t rows, int64_t columns, int device,
                 uintptr_t stream) {
  const cuda::ExpandArgs args{address<void>(tiles), address<void>(weight), rows, columns};
  raise_unless_ok(cuda::expand_2to4(args, {address<void>(stream), device}), "unpack");
}

template <Status (*kRun)(const cuda::PackArgs&, cuda::Launch)>
void pack(uintptr_t weight, uintptr_t values, uintptr_t words, uintptr_t counts, uintptr_t offsets,
          uintptr_t keep, int64_t rows, int64_t columns, int dtype, int device, uintptr_t stream) {
  const cuda::PackArgs args{address<void>(weight),
                            address<void>(values),
                            address<uint32_t>(words),
                            address<int64_t>(counts),
                            address<int64_t>(offsets),
                            address<uint8_t>(keep),
                            rows,
                            columns,
                            DType(dtype)};
  raise_unless_ok(kRun(args, {address<void>(stream), device}), "pack");
}

template <Status (*kRun)(const cuda::PackTilesArgs&, cuda::Launch)>
void pack_tiles(uintptr_t weight, uintptr_t keep, uintptr_t bits, uintptr_t offsets, uintptr_t tiles,
                int64_t rows, int64_t columns, int dtype, int device, uintptr_t stream) {
  const cuda::PackTilesArgs args{address<void>(weight),
                                 address<uint8_t>(keep),
                                 address<uint32_t>(bits),
                                 address<uint32_t>(offsets),
                                 address<void>(tiles),
                                 rows,
                                 columns,
                                 DType(dtype)};
  raise_unless_ok(kRun(args, {address<void>(stream), device}), "pack_tiles");
}

}  // namespace
}  // namespace mosaic::python

#ifndef MOSAIC_CUDA_MODULE  // tests build this under other names, with the kernels on the CPU
#define MOSAIC_CUDA_MODULE _C_cuda
#endif

PYBIND11_MODULE(MOSAIC_CUDA_MODULE, m) {
  using namespace mosaic;
  using namespace mosaic::python;
  m.doc() = "CUDA kernels of mosaic_kernels; call them through mosaic_kernels.ops";
  const auto def_tile_linear = [&](const char* name, auto* function) {
    m.def(name, function, py::arg("parts"), py::arg("x"), py::arg("rows"), py::arg("in_features"),
          py::arg("dtype"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("device"),
          py::arg("stream"), py::arg("counters") = 0);
  };
  m.def("linear_rows", python::linear_rows);
  def_tile_linear("linear_decode", tile_linear<cuda::linear_decode>);
  def_tile_linear("linear_prefill", tile_linear<cuda::linear_prefill>);
  def_tile_linear("linear_2to4", tile_linear<cuda::linear_2to4>);
  m.def("has_linear_prefill", cuda::has_linear_prefill);
  m.def("expand_tiles", python::expand_tiles);
  m.def("expand_2to4", python::expand_2to4);
  m.def("linear_workspace_bytes", cuda::linear_workspace_bytes);
  m.def("pack_bits", pack<cuda::pack_bits>);
  m.def("pack_values", pack<cuda::pack_values>);
  m.def("unpack", pack<cuda::unpack>);
  m.def("pack_tile_bits", pack_tiles<cuda::pack_tile_bits>);
  m.def("pack_tile_values", pack_tiles<cuda::pack_tile_values>);
  m.def("why_not", [](int device) -> py::object {
    const char* reason = cuda::why_not(device);
    return reason ? py::object(py::str(reason)) : py::object(py::none());
  });
}
