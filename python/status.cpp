// SPDX-License-Identifier: Apache-2.0
#include "status.h"

#include <string>

namespace py = pybind11;

namespace mosaic::python {
namespace {

[[noreturn]] void raise(const char* exception, const std::string& message) {
  const py::object type = py::module_::import("mosaic_kernels.errors").attr(exception);
  PyErr_SetString(type.ptr(), message.c_str());
  throw py::error_already_set();
}

}  // namespace

void raise_invalid(const std::string& message) { raise("KernelError", message); }

void raise_unless_ok(const Status& status, const char* op) {
  switch (status.code) {
    case Code::kOk:
      return;
    case Code::kInvalid:
      raise("KernelError", status.message);
    case Code::kNonFinite:
      raise("NonFiniteError",
            std::string(op) + ": scores hold NaN or Inf; check the weight and its calibration statistics");
    case Code::kUnavailable:
      raise("BackendError", status.message);
  }
}

}  // namespace mosaic::python
