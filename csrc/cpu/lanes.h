// SPDX-License-Identifier: Apache-2.0
// As many fp32 lanes as a register holds, in the compiler's own vectors, so that a kernel written once
// is vector code on every instruction set. (Wider vectors than registers are taken apart lane by lane.)
#pragma once

#include <initializer_list>

#include "cpu/numeric.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace mosaic::MOSAIC_ISA {

using namespace mosaic::cpu;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
using Lanes = float __attribute__((vector_size(kLanes * 4)));
using Flags = int32_t __attribute__((vector_size(kLanes * 4)));  // -1 where true
using Bits = uint32_t __attribute__((vector_size(kLanes * 4)));
using Bytes = uint8_t __attribute__((vector_size(kLanes)));
using Doubles = double __attribute__((vector_size(kLanes * 4)));  // half as many lanes

MOSAIC_HD Lanes load_lanes(const float* from) {
  Lanes v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

MOSAIC_HD Lanes load_lanes(const BFloat16* from) {
#if defined(__AVX512F__)  // gcc 12 would widen each half on its own
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
#elif defined(__AVX2__)
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Lanes)_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16);
#else
  uint16_t __attribute__((vector_size(kLanes * 2))) narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  return (Lanes)(__builtin_convertvector(narrow, Bits) << 16);
#endif
}

MOSAIC_HD Lanes load_lanes(const Half* from) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return (Lanes)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Lanes v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(from[i]);
  return v;
#endif
}

MOSAIC_HD void store_lanes(float* to, Lanes v) { std::memcpy(to, &v, sizeof v); }

// Rounded to nearest even; NaN stays NaN.
MOSAIC_HD void store_lanes(BFloat16* to, Lanes v) {
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits kept = v == v ? rounded : Bits{} + 0x7fc0u;
  const auto narrow = __builtin_convertvector(kept, uint16_t __attribute__((vector_size(kLanes * 2))));
  std::memcpy(to, &narrow, sizeof narrow);
}

MOSAIC_HD void store_lanes(Half* to, Lanes v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) store(v[i], to + i);
#endif
}

// The first `count` lanes; the others are zero.
template <typename T>
MOSAIC_HD Lanes load_first(const T* from, int64_t count) {
  if (count >= kLanes) return load_lanes(from);
  T first[kLanes] = {};
  std::memcpy(first, from, count * sizeof(T));
  return load_lanes(first);
}

template <typename T>
MOSAIC_HD void store_first(T* to, Lanes v, int64_t count) {
  if (count >= kLanes) return store_lanes(to, v);
  T first[kLanes];
  store_lanes(first, v);
  std::memcpy(to, first, count * sizeof(T));
}

// To the nearest whole number, ties to even; for |v| < 2^22.
MOSAIC_HD Lanes nearest(Lanes v) {
  const Lanes shift = Lanes{} + static_cast<float>(3 << 22);
  return (v + shift) - shift;
}

// e^v to some 2 units in the last place: 2^n by its exponent, the rest, at most ln(2) / 2, by Taylor's
// series.
MOSAIC_HD Lanes exponential(Lanes v) {
  v = v < -87.0f ? Lanes{} - 87.0f : v > 88.0f ? Lanes{} + 88.0f : v;
  const Lanes n = nearest(v * 1.44269504f);
  const Lanes r =
      (v - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts, the first exact in products
  Lanes sum = Lanes{} + 1.0f / 5040;
  for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * r + factor;
  return sum * (Lanes)((__builtin_convertvector(n, Flags) + 127) << 23);
}

MOSAIC_HD float sum_of_lanes(Lanes v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

MOSAIC_HD Lanes absolute(Lanes v) { return (Lanes)((Bits)v & 0x7fffffffu); }

MOSAIC_HD Lanes broadcast(float v) { return v - Lanes{}; }

// Bit i is set where lane i is true.
MOSAIC_HD uint32_t mask_of(Flags flags) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)flags);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)flags);
#else
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (static_cast<uint32_t>(flags[i]) & 1u) << i;
  return mask;
#endif
}

// Writes the chosen lanes one after the other; what it leaves behind them is arbitrary, up to a whole vector.
MOSAIC_HD void store_chosen(float* to, Lanes v, uint32_t chosen) {
#if defined(__AVX512F__)
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(chosen), (__m512)v));
#else
  for (; chosen; chosen &= chosen - 1) *to++ = v[__builtin_ctz(chosen)];
#endif
}

// Adds the lanes to two vectors of doubles.
MOSAIC_HD void add_to(Doubles* sums, Lanes v) {
  using HalfLanes = float __attribute__((vector_size(kLanes * 2)));
  HalfLanes halves[2];
  std::memcpy(halves, &v, sizeof v);
  sums[0] += __builtin_convertvector(halves[0], Doubles);
  sums[1] += __builtin_convertvector(halves[1], Doubles);
}

MOSAIC_HD bool finite_bits(uint32_t bits) { return (bits & 0x7f800000u) != 0x7f800000u; }

}  // namespace mosaic::MOSAIC_ISA
