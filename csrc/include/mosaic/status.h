// SPDX-License-Identifier: Apache-2.0
// What every entry point returns: csrc throws nothing and prints nothing.
#pragma once

namespace mosaic {

enum class Code : int {
  kOk = 0,
  kInvalid = 1,      // an argument contradicts another; becomes KernelError
  kNonFinite = 2,    // data holds NaN or Inf; becomes NonFiniteError
  kUnavailable = 3,  // no memory, no device, a failed launch; becomes BackendError
};

struct Status {
  Code code = Code::kOk;
  const char* message = "";  // a string literal or a runtime library's static string

  bool ok() const { return code == Code::kOk; }
};

inline Status invalid(const char* message) { return {Code::kInvalid, message}; }

}  // namespace mosaic
