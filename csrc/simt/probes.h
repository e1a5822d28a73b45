// SPDX-License-Identifier: Apache-2.0
// Kernels on which the emulator itself is tested; most are wrong on purpose.
#pragma once

#include "mosaic/kernels.h"

namespace mosaic::simt {

// `name` is one of probes.cu's; `variant` chooses between its right and its wrong forms.
Status probe(const char* name, int variant, const void* in, void* out);

}  // namespace mosaic::simt
