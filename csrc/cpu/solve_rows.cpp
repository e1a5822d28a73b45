// SPDX-License-Identifier: Apache-2.0
// What a solver does to a row between two matrix products, in one or two passes over it. In torch these are
// four and nine passes over whole matrices, each of which allocates its result.
#include "cpu/lanes.h"
#include "cpu/rows.h"

namespace mosaic::MOSAIC_ISA {
namespace {

Lanes chosen(const uint8_t* keep, Lanes kept, Lanes other) {
  Bytes bytes;
  std::memcpy(&bytes, keep, sizeof bytes);
  return __builtin_convertvector(bytes, Flags) != 0 ? kept : other;
}

double sum_of(const Doubles* lanes) {
  double sum = 0;
  for (int i = 0; i < kLanes / 2; ++i) sum += lanes[0][i] + lanes[1][i];
  return sum;
}

}  // namespace

void admm_row(float* proposal, const uint8_t* keep, const float* gradient, float penalty, int64_t columns,
              float* target) {
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    const Lanes own = load_lanes(proposal + j);
    store_lanes(target + j, load_lanes(gradient + j) + penalty * chosen(keep + j, own, -own));
    store_lanes(proposal + j, chosen(keep + j, Lanes{}, own));
  }
  for (; j < columns; ++j) {
    target[j] = gradient[j] + penalty * (keep[j] ? proposal[j] : -proposal[j]);
    if (keep[j]) proposal[j] = 0;
  }
}

float cg_row(const float* image, const uint8_t* keep, float energy, int64_t columns, float* solution,
             float* residual, float* direction) {
  constexpr float kTiny = 1e-30f;
  Doubles curves[2] = {}, squares[2] = {};
  double curve = 0, square = 0;
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    add_to(curves, load_lanes(direction + j) * chosen(keep + j, load_lanes(image + j), Lanes{}));
  }
  for (; j < columns; ++j) curve += keep[j] ? direction[j] * image[j] : 0;
  const auto bend = static_cast<float>(curve + sum_of(curves));
  const float step = energy / (bend > kTiny ? bend : kTiny);
  for (j = 0; j + kLanes <= columns; j += kLanes) {
    const Lanes rest = load_lanes(residual + j) - step * chosen(keep + j, load_lanes(image + j), Lanes{});
    store_lanes(solution + j, load_lanes(solution + j) + step * load_lanes(direction + j));
    store_lanes(residual + j, rest);
    add_to(squares, rest * rest);
  }
  for (; j < columns; ++j) {
    solution[j] += step * direction[j];
    if (keep[j]) residual[j] -= step * image[j];
    square += residual[j] * residual[j];
  }
  const auto left = static_cast<float>(square + sum_of(squares));
  const float turn = left / (energy > kTiny ? energy : kTiny);
  for (j = 0; j + kLanes <= columns; j += kLanes) {
    store_lanes(direction + j, load_lanes(residual + j) + turn * load_lanes(direction + j));
  }
  for (; j < columns; ++j) direction[j] = residual[j] + turn * direction[j];
  return left;
}

}  // namespace mosaic::MOSAIC_ISA
