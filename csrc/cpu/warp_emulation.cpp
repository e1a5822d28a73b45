// SPDX-License-Identifier: Apache-2.0
// cuda/linear_decode.cu without a GPU: the same index functions, the 32 lanes in a plain loop, so that
// a machine without a device still proves the walk right.
#include "mosaic/kernels.h"

namespace mosaic::cpu {

Status emulate_linear_decode(const LinearArgs& a) {
  if (a.dtype != DType::kFloat32) return invalid("emulate_linear_decode takes fp32");
  const int64_t words = bitmask_words(a.in_features);
  const auto* x = static_cast<const float*>(a.x);
  const auto* bias = static_cast<const float*>(a.bias);
  for (int64_t row = 0; row < a.out_features; ++row) {
    for (int64_t n = 0; n < a.rows; ++n) {
      const uint32_t* bits = a.words + row * words;
      const float* values = static_cast<const float*>(a.values) + a.offsets[row];
      float sums[kWarpLanes] = {};
      for (int64_t base = 0; base < words; base += kWarpLanes) {
        uint32_t word[kWarpLanes];
        int first_value[kWarpLanes + 1] = {};
        for (int lane = 0; lane < kWarpLanes; ++lane) {
          word[lane] = base + lane < words ? bits[base + lane] : 0;
          first_value[lane + 1] = first_value[lane] + popcount(word[lane]);
        }
        for (int step = 0; step < kWarpLanes; step += kStepWords) {
          for (int lane = 0; lane < kWarpLanes; ++lane) {
            const LanePair pair = lane_pair(word[step], word[step + 1], first_value[step], lane);
            const int64_t column = (base + step) * kWordBits + 2 * lane;
            if (pair.first) sums[lane] += values[pair.first_value] * x[n * a.in_features + column];
            if (pair.second) sums[lane] += values[pair.second_value] * x[n * a.in_features + column + 1];
          }
        }
        values += first_value[kWarpLanes];
      }
      float sum = bias ? bias[row] : 0;
      for (const float lane_sum : sums) sum += lane_sum;
      static_cast<float*>(a.out)[n * a.out_features + row] = sum;
    }
  }
  return {};
}

}  // namespace mosaic::cpu
