// SPDX-License-Identifier: Apache-2.0
// mosaic_kernels._C_cpu: addresses and sizes in, exceptions out. The GIL is released around the work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <string_view>
#include <vector>

#include "mosaic/kernels.h"
#include "status.h"
#include "unchanged.h"

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

  // Runs only if `holder` still holds the weight, see unchanged(); the weight then lives until the end of the
  // call.
  bool run_if(const py::dict& holder, const py::tuple& names, const py::tuple& objects,
              const py::bytes& addresses, uintptr_t x, uintptr_t out, int64_t rows, int threads) const {
    std::vector<py::object> kept;
    kept.reserve(4);
    if (!unchanged(holder, names, objects, addresses, &kept)) return false;
    run(x, out, rows, threads);
    return true;
  }
};

PreparedLinear prepare_linear(uintptr_t values, uintptr_t words, uintptr_t offsets, uintptr_t bias,
                              int64_t in_features, int64_t out_features, int64_t nnz, int dtype,
                              uintptr_t scales, int64_t scale_groups, bool quantize_x) {
  return {{nullptr, address<void>(values), address<uint32_t>(words), address<int64_t>(offsets),
           address<void>(bias), nullptr, 0, in_features, out_features, nnz, DType(dtype), 1,
           address<float>(scales), scale_groups, quantize_x}};
}

// Several weights on the same x, likewise. What its parts are prepared with says nothing of dtypes: a call
// does.
struct PreparedGroup {
  std::vector<LinearArgs> args;

  void run(uintptr_t x, const std::vector<uintptr_t>& outs, int64_t rows, int dtype, int threads) const {
    if (outs.size() != args.size()) raise_invalid("sparse_linear: as many results as weights are needed");
    std::vector<LinearArgs> now = args;
    for (size_t i = 0; i < now.size(); ++i) {
      now[i].x = address<void>(x);
      now[i].out = address<void>(outs[i]);
      now[i].rows = rows;
      now[i].dtype = DType(dtype);
      now[i].threads = threads;
    }
    Status status;
    {
      py::gil_scoped_release unlocked;
      status = cpu::sparse_linear_group(now.data(), static_cast<int64_t>(now.size()));
    }
    raise_unless_ok(status, "sparse_linear");
  }
};

// Each part: (values, words, offsets, bias, out_features, nnz, scales, scale_groups).
PreparedGroup prepare_group(const std::vector<std::array<int64_t, 8>>& parts, int64_t in_features,
                            bool quantize_x) {
  PreparedGroup group;
  for (const auto& p : parts) {
    group.args.push_back({nullptr, address<void>(p[0]), address<uint32_t>(p[1]), address<int64_t>(p[2]),
                          address<void>(p[3]), nullptr, 0, in_features, p[4], p[5], DType::kFloat32, 1,
                          address<float>(p[6]), p[7], quantize_x});
  }
  return group;
}

// A decoder block for one token, see BlockArgs; its caller keeps the memory alive.
struct PreparedBlock {
  BlockArgs args;

  void input(uintptr_t x, uintptr_t cosine, uintptr_t sine, uintptr_t query, uintptr_t key, uintptr_t value,
             int threads) const {
    run(BlockInput{address<void>(x), address<void>(cosine), address<void>(sine), address<void>(query),
                   address<void>(key), address<void>(value)},
        cpu::block_input, threads);
  }
  void output(uintptr_t x, uintptr_t query, uintptr_t keys, uintptr_t values, uintptr_t mask, int64_t tokens,
              std::array<int64_t, 4> strides, uintptr_t out, int threads) const {
    run(BlockOutput{address<void>(x), address<void>(query), address<void>(keys), address<void>(values),
                    address<uint8_t>(mask), tokens, strides[0], strides[1], strides[2], strides[3],
                    address<void>(out)},
        cpu::block_output, threads);
  }

 private:
  template <typename Half>
  void run(const Half& half, Status (*function)(const BlockArgs&, const Half&), int threads) const {
    BlockArgs now = args;
    now.threads = threads;
    Status status;
    {
      py::gil_scoped_release unlocked;
      status = function(now, half);
    }
    raise_unless_ok(status, "decoder block");
  }
};

// Each layer, from query to down: (values, words, offsets, bias, in_features, out_features, nnz, scales,
// scale_groups, quantize_x). Norms: of attention, FFN, query and key.
PreparedBlock prepare_block(int dtype, const std::array<std::array<int64_t, 10>, 7>& layers,
                            const std::array<uintptr_t, 4>& norms, const std::array<float, 4>& epsilons,
                            int64_t head_dim, float scaling) {
  LinearArgs linear[7];
  for (int i = 0; i < 7; ++i) {
    const auto& p = layers[i];
    linear[i] = {nullptr,
                 address<void>(p[0]),
                 address<uint32_t>(p[1]),
                 address<int64_t>(p[2]),
                 address<void>(p[3]),
                 nullptr,
                 1,
                 p[4],
                 p[5],
                 p[6],
                 DType(dtype),
                 1,
                 address<float>(p[7]),
                 p[8],
                 p[9] != 0};
  }
  return {{linear[0], linear[1], linear[2], linear[3], linear[4], linear[5], linear[6],
           address<void>(norms[0]), address<void>(norms[1]), address<void>(norms[2]), address<void>(norms[3]),
           epsilons[0], epsilons[1], epsilons[2], epsilons[3], head_dim, scaling, DType(dtype), 1}};
}

// strides: from one head and one token to the next, of keys and of values.
void attend(uintptr_t query, uintptr_t keys, uintptr_t values, uintptr_t mask, uintptr_t out,
            int64_t query_heads, int64_t key_heads, int64_t dim, int64_t tokens,
            std::array<int64_t, 4> strides, float scaling, int dtype, int threads) {
  call("attention", cpu::attend,
       AttentionArgs{address<void>(query), address<void>(keys), address<void>(values), address<uint8_t>(mask),
                     address<void>(out), query_heads, key_heads, dim, tokens, strides[0], strides[1],
                     strides[2], strides[3], scaling, DType(dtype), threads});
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

void score_bits(uintptr_t weight, uintptr_t norms, uintptr_t keep, uintptr_t bitmask, uintptr_t offsets,
                int64_t rows, int64_t columns, int dtype, int scope, int threads) {
  call("score_pack", cpu::select,
       SelectArgs{nullptr, address<void>(weight), address<float>(norms), DType(dtype), address<int64_t>(keep),
                  nullptr, rows, columns, Scope(scope), threads, address<uint8_t>(bitmask),
                  address<int64_t>(offsets)});
}

void obs_block(uintptr_t weight, uintptr_t factor, uintptr_t keep, uintptr_t errors, int64_t rows,
               int64_t block, int64_t n, int64_t m, int threads) {
  call("select", cpu::obs_block,
       ObsArgs{address<float>(weight), address<float>(factor), address<uint8_t>(keep), address<float>(errors),
               rows, block, n, m, threads});
}

void admm_step(uintptr_t proposal, uintptr_t keep, uintptr_t gradient, uintptr_t target, float penalty,
               int64_t rows, int64_t columns, int threads) {
  call("admm_step", cpu::admm_step,
       AdmmArgs{address<float>(proposal), address<uint8_t>(keep), address<float>(gradient),
                address<float>(target), penalty, rows, columns, threads});
}

void cg_step(uintptr_t solution, uintptr_t residual, uintptr_t direction, uintptr_t energy, uintptr_t image,
             uintptr_t keep, int64_t rows, int64_t columns, int threads) {
  call("cg_step", cpu::cg_step,
       CgArgs{address<float>(solution), address<float>(residual), address<float>(direction),
              address<float>(energy), address<float>(image), address<uint8_t>(keep), rows, columns, threads});
}

py::bytes bytes_at(uintptr_t x, size_t count) { return py::bytes(address<char>(x), count); }

bool holds(uintptr_t x, std::string_view bytes) {
  py::gil_scoped_release unlocked;
  return bytes.empty() || std::memcmp(address<char>(x), bytes.data(), bytes.size()) == 0;
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
      .def("run", &PreparedLinear::run)
      .def("run_if", &PreparedLinear::run_if);
  py::class_<PreparedGroup>(m, "PreparedGroup").def(py::init(&prepare_group)).def("run", &PreparedGroup::run);
  py::class_<PreparedBlock>(m, "PreparedBlock")
      .def(py::init(&prepare_block))
      .def("input", &PreparedBlock::input)
      .def("output", &PreparedBlock::output);
  m.def("attend", python::attend);
  m.def("pack_bits", python::pack_bits);
  m.def("pack_values", pack_or_unpack<cpu::pack_values>);
  m.def("unpack", pack_or_unpack<cpu::unpack>);
  m.def("outlier_stats", python::outlier_stats);
  m.def("column_square_sums", python::column_square_sums);
  m.def("select", python::select);
  m.def("score_select", python::score_select);
  m.def("score_bits", python::score_bits);
  m.def("obs_block", python::obs_block);
  m.def("admm_step", python::admm_step);
  m.def("cg_step", python::cg_step);
  m.def("bytes_at", python::bytes_at);
  m.def("holds", python::holds);
  m.def("unchanged",
        [](const py::object& holders, const py::tuple& names, const py::tuple& objects,
           const py::bytes& addresses) { return unchanged(holders, names, objects, addresses); });
  m.def("isa", cpu::isa);
  m.def("features", cpu::features);
  m.def("set_isa", [](const char* level) { raise_unless_ok(cpu::set_isa(level), "set_isa"); });
}
