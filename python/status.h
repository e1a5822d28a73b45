// SPDX-License-Identifier: Apache-2.0
// The border between Python and csrc: a Status becomes an exception of mosaic_kernels.errors.
#pragma once

#include <pybind11/pybind11.h>

#include "mosaic/status.h"

namespace mosaic::python {

void raise_unless_ok(const Status& status, const char* op);
[[noreturn]] void raise_invalid(const std::string& message);

}  // namespace mosaic::python
