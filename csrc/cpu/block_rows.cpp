// SPDX-License-Identifier: Apache-2.0
// What a decoder block does to one token between its linear layers. Results are rounded to the dtype wherever
// transformers' modules round, so that a block in one call differs from those by the order of sums alone.
#include <cmath>

#include "cpu/lanes.h"
#include "cpu/rows.h"

namespace mosaic::MOSAIC_ISA {
namespace {

// As torch would hold it between two operators.
template <typename T>
Lanes rounded(Lanes v) {
  T held[kLanes];
  store_lanes(held, v);
  return load_lanes(held);
}
template <>
Lanes rounded<float>(Lanes v) {
  return v;
}

}  // namespace

template <typename T>
void rms_norm(const void* from, const void* weights, float epsilon, int64_t columns, void* out) {
  const T* x = static_cast<const T*>(from);
  Lanes squares = {};
  for (int64_t i = 0; i < columns; i += kLanes) {
    const Lanes v = load_first(x + i, columns - i);
    squares += v * v;
  }
  const float mean = sum_of_lanes(squares) / static_cast<float>(columns);
  const Lanes scale = Lanes{} + 1 / std::sqrt(mean + epsilon);
  for (int64_t i = 0; i < columns; i += kLanes) {
    const Lanes normed = rounded<T>(load_first(x + i, columns - i) * scale);
    const Lanes weight = load_first(static_cast<const T*>(weights) + i, columns - i);
    store_first(static_cast<T*>(out) + i, weight * normed, columns - i);
  }
}

template <typename T>
void rotate(const void* from, const void* cosines, const void* sines, int64_t heads, int64_t dim, void* out) {
  const int64_t half = dim / 2;
  const T *cosine = static_cast<const T*>(cosines), *sine = static_cast<const T*>(sines);
  for (int64_t h = 0; h < heads; ++h) {
    const T* x = static_cast<const T*>(from) + h * dim;
    T* to = static_cast<T*>(out) + h * dim;
    for (int64_t i = 0; i < half; i += kLanes) {
      const auto at = [&](const T* p) { return load_first(p + i, half - i); };
      const Lanes low = at(x), high = at(x + half);
      store_first(to + i, rounded<T>(low * at(cosine)) - rounded<T>(high * at(sine)), half - i);
      store_first(to + half + i, rounded<T>(high * at(cosine + half)) + rounded<T>(low * at(sine + half)),
                  half - i);
    }
  }
}

template <typename T>
void gated(const void* gates, const void* ups, int64_t columns, void* out) {
  for (int64_t i = 0; i < columns; i += kLanes) {
    const Lanes gate = load_first(static_cast<const T*>(gates) + i, columns - i);
    const Lanes up = load_first(static_cast<const T*>(ups) + i, columns - i);
    store_first(static_cast<T*>(out) + i, rounded<T>(gate / (1 + exponential(-gate))) * up, columns - i);
  }
}

template <typename T>
void add(const void* a, const void* b, int64_t columns, void* out) {
  for (int64_t i = 0; i < columns; i += kLanes) {
    store_first(static_cast<T*>(out) + i,
                load_first(static_cast<const T*>(a) + i, columns - i) +
                    load_first(static_cast<const T*>(b) + i, columns - i),
                columns - i);
  }
}

#define MOSAIC_INSTANTIATE(T)                                                              \
  template void rms_norm<T>(const void*, const void*, float, int64_t, void*);              \
  template void rotate<T>(const void*, const void*, const void*, int64_t, int64_t, void*); \
  template void gated<T>(const void*, const void*, int64_t, void*);                        \
  template void add<T>(const void*, const void*, int64_t, void*);
MOSAIC_INSTANTIATE(float)
MOSAIC_INSTANTIATE(BFloat16)
MOSAIC_INSTANTIATE(Half)
#undef MOSAIC_INSTANTIATE

}  // namespace mosaic::MOSAIC_ISA
