// SPDX-License-Identifier: Apache-2.0
// mosaic_kernels._C_cpu: addresses and sizes in, exceptions out. The GIL is released around the work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
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

template <typename Args>
void call(const char* op, Status (*run)(const Args&), const Args& args) {
  Status status;
  {
    py::gil_scoped_release unlocked;
    status = run(args);
  }
  raise_unless_ok(status, op);
}

void sparse_linear(uintptr_t x, uintptr_t values, uintptr_t words, uintptr_t offsets, uintptr_t bias,
                   uintptr_t out, int64_t rows, int64_t in_features, int64_t out_features, int64_t nnz,
                   int dtype, int threads) {
  call("sparse_linear", cpu::sparse_linear,
       LinearArgs{address<void>(x), address<void>(values), address<uint32_t>(words),
                  address<int64_t>(offsets), address<void>(bias), address<void>(out), rows, in_features,
                  out_features, nnz, DType(dtype), threads});
}

void sparse_linear_int8(uintptr_t x, uintptr_t values, uintptr_t words, uintptr_t offsets, uintptr_t bias,
                        uintptr_t out, int64_t rows, int64_t in_features, int64_t out_features, int64_t nnz,
                        int dtype, int threads, uintptr_t scales, int64_t scale_groups, bool quantize_x) {
  call(
      "sparse_linear", cpu::sparse_linear,
      LinearArgs{address<void>(x), address<void>(values), address<uint32_t>(words), address<int64_t>(offsets),
                 address<void>(bias), address<void>(out), rows, in_features, out_features, nnz, DType(dtype),
                 threads, address<float>(scales), scale_groups, quantize_x});
}

// One weight, named once: a call names what differs from call to call. Its caller keeps the memory alive.
struct PreparedLinear {
  LinearArgs args;

  void run(uintptr_t x, uintptr_t out, int64_t rows, int threads) const {
    LinearArgs now = args;
    now.x = address<void>(x);
    now.out = address<void>(out);
    now.rows = rows;
    now.threads = threads;
    call("sparse_linear", cpu::sparse_linear, now);
  }
};

PreparedLinear prepare_linear(uintptr_t values, uintptr_t words, uintptr_t offsets, uintptr_t bias,
                              int64_t in_features, int64_t out_features, int64_t nnz, int dtype,
                              uintptr_t scales, int64_t scale_groups, bool quantize_x) {
  return {{nullptr, address<void>(values), address<uint32_t>(words), address<int64_t>(offsets),
           address<void>(bias), nullptr, 0, in_features, out_features, nnz, DType(dtype), 1,
           address<float>(scales), scale_groups, quantize_x}};
}

// Each part: (values, words, offsets, bias, out, out_features, nnz, scales, scale_groups).
void sparse_linear_group(uintptr_t x, int64_t rows, int64_t in_features, int dtype, int threads,
                         bool quantize_x, const std::vector<std::array<int64_t, 9>>& parts) {
  std::vector<LinearArgs> args;
  args.reserve(parts.size());
  for (const auto& p : parts) {
    args.push_back({address<void>(x), address<void>(p[0]), address<uint32_t>(p[1]), address<int64_t>(p[2]),
                    address<void>(p[3]), address<void>(p[4]), rows, in_features, p[5], p[6], DType(dtype),
                    threads, address<float>(p[7]), p[8], quantize_x});
  }
  Status status;
  {
    py::gil_scoped_release unlocked;
    status = cpu::sparse_linear_group(args.data(), static_cast<int64_t>(args.size()));
  }
  raise_unless_ok(status, "sparse_linear");
}

void pack_bits(uintptr_t weight, uintptr_t keep, uintptr_t bitmask, uintptr_t offsets, int64_t rows,
               int64_t columns, int dtype, int threads) {
  call("pack", cpu::pack_bits,
       PackBitsArgs{address<void>(weight), address<uint8_t>(keep), address<uint8_t>(bitmask),
                    address<int64_t>(offsets), rows, columns, DType(dtype), threads});
}

template <Status (*kRun)(const PackValuesArgs&)>
void pack_or_unpack(uintptr_t weight, uintptr_t values, uintptr_t bitmask, int64_t bitmask_stride,
                    uintptr_t offsets, int64_t rows, int64_t columns, int64_t nnz, int dtype, int threads) {
  call("pack", kRun,
       PackValuesArgs{address<void>(weight), address<void>(values), address<uint8_t>(bitmask), bitmask_stride,
                      address<int64_t>(offsets), rows, columns, nnz, DType(dtype), threads});
}

void outlier_stats(uintptr_t weight, uintptr_t norms, uintptr_t alphas, uintptr_t total, uintptr_t counts,
                   int64_t rows, int64_t columns, int64_t alpha_count, int dtype, int threads) {
  call("outlier_stats", cpu::outlier_stats,
       OutlierArgs{address<void>(weight), address<float>(norms), address<double>(alphas),
                   address<double>(total), address<int64_t>(counts), rows, columns, alpha_count, DType(dtype),
                   threads});
}

void column_square_sums(uintptr_t x, uintptr_t sums, int64_t rows, int64_t columns, int dtype, int threads) {
  call("column_square_sums", cpu::column_square_sums,
       ColumnSumsArgs{address<void>(x), address<double>(sums), rows, columns, DType(dtype), threads});
}

void select(uintptr_t scores, uintptr_t keep, uintptr_t mask, int64_t rows, int64_t columns, int scope,
            int threads) {
  call("select", cpu::select,
       SelectArgs{address<float>(scores), nullptr, nullptr, DType::kFloat32, address<int64_t>(keep),
                  address<uint8_t>(mask), rows, columns, Scope(scope), threads});
}

void score_select(uintptr_t weight, uintptr_t norms, uintptr_t keep, uintptr_t mask, int64_t rows,
                  int64_t columns, int dtype, int scope, int threads) {
  call("score_select", cpu::select,
       SelectArgs{nullptr, address<void>(weight), address<float>(norms), DType(dtype), address<int64_t>(keep),
                  address<uint8_t>(mask), rows, columns, Scope(scope), threads});
}

void obs_block(uintptr_t weight, uintptr_t factor, uintptr_t keep, uintptr_t errors, int64_t rows,
               int64_t block, int64_t n, int64_t m, int threads) {
  call("select", cpu::obs_block,
       ObsArgs{address<float>(weight), address<float>(factor), address<uint8_t>(keep), address<float>(errors),
               rows, block, n, m, threads});
}

}  // namespace
}  // namespace mosaic::python

PYBIND11_MODULE(_C_cpu, m) {
  using namespace mosaic;
  using namespace mosaic::python;
  m.doc() = "CPU kernels of mosaic_kernels; call them through mosaic_kernels.ops";
  m.def("sparse_linear", python::sparse_linear);
  m.def("sparse_linear_int8", python::sparse_linear_int8);
  py::class_<PreparedLinear>(m, "PreparedLinear")
      .def(py::init(&prepare_linear))
      .def("run", &PreparedLinear::run);
  m.def("sparse_linear_group", python::sparse_linear_group);
  m.def("pack_bits", python::pack_bits);
  m.def("pack_values", pack_or_unpack<cpu::pack_values>);
  m.def("unpack", pack_or_unpack<cpu::unpack>);
  m.def("outlier_stats", python::outlier_stats);
  m.def("column_square_sums", python::column_square_sums);
  m.def("select", python::select);
  m.def("score_select", python::score_select);
  m.def("obs_block", python::obs_block);
  m.def("isa", cpu::isa);
  m.def("features", cpu::features);
  m.def("set_isa", [](const char* level) { raise_unless_ok(cpu::set_isa(level), "set_isa"); });
}
