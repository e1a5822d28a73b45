// SPDX-License-Identifier: Apache-2.0
// What a decoder block does to one token between its linear layers. Results are rounded to the dtype wherever
// transformers' modules round, so that a block in one call differs from those by the order of sums alone.
#include <cmath>
#include <initializer_list>

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

// e^v to some 2 units in the last place: 2^n by its exponent, the rest, at most ln(2) / 2, by Taylor's
// series.
Lanes exponential(Lanes v) {
  v = v < -87.0f ? Lanes{} - 87.0f : v > 88.0f ? Lanes{} + 88.0f : v;
  const Lanes n = nearest(v * 1.44269504f);
  const Lanes r =
      (v - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts, the first exact in products
  Lanes sum = Lanes{} + 1.0f / 5040;
  for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * r + factor;
  return sum * (Lanes)((__builtin_convertvector(n, Flags) + 127) << 23);
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

template <typename T>
void attend(const AttendArgs& a) {
  const T *queries = static_cast<const T*>(a.query), *keys = static_cast<const T*>(a.keys);
  const T* values = static_cast<const T*>(a.values);
  // A key is read once for all heads, a value once for each: values of one head stay in L1 or L2.
  for (int64_t t = 0; t < a.tokens; ++t) {
    const T* key = keys + t * a.key_stride;
    for (int64_t h = 0; h < a.heads; ++h) {
      Lanes sum = {};
      for (int64_t i = 0; i < a.dim; i += kLanes) {
        sum += load_first(queries + h * a.dim + i, a.dim - i) * load_first(key + i, a.dim - i);
      }
      const bool seen = !a.mask || a.mask[t];
      a.weights[h * a.tokens + t] = seen ? sum_of_lanes(sum) * a.scaling : -__builtin_inff();
    }
  }
  for (int64_t h = 0; h < a.heads; ++h) {
    float* weights = a.weights + h * a.tokens;
    float most = weights[0];
    for (int64_t t = 1; t < a.tokens; ++t)
      most = weights[t] > most || weights[t] != weights[t] ? weights[t] : most;
    if (most == -__builtin_inff()) most = 0;  // nothing is attended to: all weights are zero
    Lanes total = {};
    for (int64_t t = 0; t < a.tokens; t += kLanes) {
      const Lanes score = load_first(weights + t, a.tokens - t) - most;
      const Lanes weight = score < -87.0f ? Lanes{} : exponential(score);
      store_first(weights + t, weight, a.tokens - t);
      total += load_first(weights + t, a.tokens - t);
    }
    const float all = sum_of_lanes(total);
    const Lanes share = Lanes{} + (all == 0 ? 0 : 1 / all);
    for (int64_t i = 0; i < a.dim; i += kLanes) {
      Lanes sum = {};
      for (int64_t t = 0; t < a.tokens; ++t) {
        sum += weights[t] * load_first(values + t * a.value_stride + i, a.dim - i);
      }
      store_first(static_cast<T*>(a.out) + h * a.dim + i, sum * share, a.dim - i);
    }
  }
}

#define MOSAIC_INSTANTIATE(T)                                                              \
  template void rms_norm<T>(const void*, const void*, float, int64_t, void*);              \
  template void rotate<T>(const void*, const void*, const void*, int64_t, int64_t, void*); \
  template void gated<T>(const void*, const void*, int64_t, void*);                        \
  template void add<T>(const void*, const void*, int64_t, void*);                          \
  template void attend<T>(const AttendArgs&);
MOSAIC_INSTANTIATE(float)
MOSAIC_INSTANTIATE(BFloat16)
MOSAIC_INSTANTIATE(Half)
#undef MOSAIC_INSTANTIATE

}  // namespace mosaic::MOSAIC_ISA
