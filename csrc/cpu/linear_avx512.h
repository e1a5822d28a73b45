// SPDX-License-Identifier: Apache-2.0
// What the AVX-512 kernels share: how each element type is multiplied, and a block of R weight rows and N
// rows of x. A kernel adds a Form, which says where its weight rows come from:
//
//     struct Form {
//       template <int R, bool kWithin>     // kWithin: never load past the end of the values
//       struct Rows {
//         Rows(const LinearTask&, int64_t row);
//         void step(int64_t w);            // goes to the next word of each row
//         Word next(int r, int64_t w);     // 32 weights of row + r
//       };
//     };
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "cpu/linear_blocks.h"
#include "cpu/linear_streams.h"
#include "cpu/thread_pool.h"

namespace mosaic::MOSAIC_ISA {
namespace {

// Keeps the compiler from folding the load into the expand, whose memory form is slower.
template <typename Vector>
Vector in_register(Vector v) {
  __asm__("" : "+v"(v));
  return v;
}

// Keeps the compiler from computing p's neighbours once for a whole loop: registers are short there.
template <typename T>
const T* as_is(const T* p) {
  __asm__("" : "+r"(p));
  return p;
}

template <typename T>
struct Traits;

template <>
struct Traits<BFloat16> {
  using X = BFloat16;
  using Word = __m512i;  // 32 weights, zeros where the bit is clear

  static Word expand(uint32_t bits, const BFloat16* values) {
    return _mm512_maskz_expand_epi16(bits, in_register(_mm512_loadu_si512(values)));
  }
  static Word expand_within(uint32_t bits, const BFloat16* values) {
    return _mm512_maskz_expand_epi16(bits, _mm512_maskz_loadu_epi16(bits_below(popcount(bits)), values));
  }
  // Up to four values: a bias, or sums rounded to nearest even.
  static __m128 load_few(const BFloat16* from, __mmask8 rows) {
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_maskz_loadu_epi16(rows, from)), 16));
  }
  static void store_few(BFloat16* to, __m128 sums, __mmask8 rows) {
    _mm_mask_storeu_epi16(to, rows, (__m128i)_mm_cvtneps_pbh(sums));
  }
  static void store(BFloat16* to, __m512 sums) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(sums));
  }
  // The first weights of a dense row, as many as `present` has bits.
  static Word load_some(const BFloat16* from, __mmask32 present) {
    return _mm512_maskz_loadu_epi16(present, from);
  }
  static Word round(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
  static void save(char* to, int64_t, Word w) { _mm512_storeu_si512(to, w); }
  static __m512 dot(__m512 sum, Word w, const X* x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
  }
};

template <>
struct Traits<Half> {
  using X = float;
  struct Word {
    __m512 low, high;
  };

  static Word widen(__m512i w) {
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(w)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(w, 1))};
  }
  static Word expand(uint32_t bits, const Half* values) {
    return widen(_mm512_maskz_expand_epi16(bits, in_register(_mm512_loadu_si512(values))));
  }
  static Word expand_within(uint32_t bits, const Half* values) {
    return widen(
        _mm512_maskz_expand_epi16(bits, _mm512_maskz_loadu_epi16(bits_below(popcount(bits)), values)));
  }
  static __m128 load_few(const Half* from, __mmask8 rows) {
    return _mm_cvtph_ps(_mm_maskz_loadu_epi16(rows, from));
  }
  static void store_few(Half* to, __m128 sums, __mmask8 rows) {
    _mm_mask_storeu_epi16(to, rows, _mm_cvtps_ph(sums, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(Half* to, __m512 sums) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(sums, _MM_FROUND_TO_NEAREST_INT));
  }
  static Word load_some(const Half* from, __mmask32 present) {
    return widen(_mm512_maskz_loadu_epi16(present, from));
  }
  static Word round(__m512 low, __m512 high) { return {low, high}; }
  static void save(char* to, int64_t stride, const Word& w) {
    _mm512_storeu_ps(to, w.low);
    _mm512_storeu_ps(to + stride, w.high);
  }
  static __m512 dot(__m512 sum, const Word& w, const X* x) {
    sum = _mm512_fmadd_ps(w.low, _mm512_loadu_ps(x), sum);
    return _mm512_fmadd_ps(w.high, _mm512_loadu_ps(x + 16), sum);
  }
};

template <>
struct Traits<float> : Traits<Half> {
  static __m128 load_few(const float* from, __mmask8 rows) { return _mm_maskz_loadu_ps(rows, from); }
  static Word load_some(const float* from, __mmask32 present) {
    return {_mm512_maskz_loadu_ps(present & 0xffff, from), _mm512_maskz_loadu_ps(present >> 16, from + 16)};
  }
  static void store_few(float* to, __m128 sums, __mmask8 rows) { _mm_mask_storeu_ps(to, rows, sums); }
  static void store(float* to, __m512 sums) { _mm512_storeu_ps(to, sums); }
  static Word expand(uint32_t bits, const float* values) {
    const __mmask16 first = bits & 0xffff, second = bits >> 16;
    return {_mm512_maskz_expand_ps(first, in_register(_mm512_loadu_ps(values))),
            _mm512_maskz_expand_ps(second, in_register(_mm512_loadu_ps(values + popcount(first))))};
  }
  static Word expand_within(uint32_t bits, const float* values) {
    const __mmask16 first = bits & 0xffff, second = bits >> 16;
    const __mmask16 in_first = bits_below(popcount(first)), in_second = bits_below(popcount(second));
    return {_mm512_maskz_expand_ps(first, _mm512_maskz_loadu_ps(in_first, values)),
            _mm512_maskz_expand_ps(second, _mm512_maskz_loadu_ps(in_second, values + popcount(first)))};
  }
};

// The lanes of four vectors added up: a transpose that adds, 13 instructions for four sums.
inline __m128 horizontal_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 low = _mm512_shuffle_ps(ab, cd, 0x44), high = _mm512_shuffle_ps(ab, cd, 0xee);
  const __m512 quarters = _mm512_add_ps(low, high);
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// What is left to do with the sums of `count` weight rows, at most four, and row n of x: a scale per row, the
// bias, rounding.
template <typename T>
void store_sums(const LinearArgs& a, int64_t row, int count, int64_t n, __m128 sums) {
  const __mmask8 rows = static_cast<__mmask8>((1 << count) - 1);
  if (a.scales && a.scale_groups == 1) sums = _mm_mul_ps(sums, _mm_maskz_loadu_ps(rows, a.scales + row));
  if (a.bias) sums = _mm_add_ps(sums, Traits<T>::load_few(static_cast<const T*>(a.bias) + row, rows));
  Traits<T>::store_few(static_cast<T*>(a.out) + n * a.out_features + row, sums, rows);
}

// R weight rows from `row` on and N rows of x from `first` on.
template <typename T, int R, int N, typename Rows>
void multiply(const LinearTask& task, Rows weights, int64_t row, int64_t first) {
  using D = Traits<T>;
  static_assert(R <= 4 && R * N <= 24, "the sums, R weights and one x must fit 32 registers");
  const LinearArgs& a = task.args;
  const int64_t words = bitmask_words(a.in_features);
  const auto* x = static_cast<const typename D::X*>(task.x) + first * words * kWordBits;

  // Every loop over r and n is unrolled in full: an index that is not constant puts the sums in memory.
  __m512 sum[4][N];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[r][n] = _mm512_setzero_ps();

  for (int64_t w = 0; w < words; ++w, x += N * kWordBits) {
    weights.step(w);
    typename D::Word weight[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) weight[r] = weights.next(r, w);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][n] = D::dot(sum[r][n], weight[r], x + n * kWordBits);
  }

#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    store_sums<T>(a, row, R, first + n, horizontal_sums(sum[0][n], sum[1][n], sum[2][n], sum[3][n]));
  }
}

// Weight rows [begin, end) and N rows of x.
template <typename T, typename Form, int N, bool kWithin>
void multiply_rows(const LinearTask& task, int64_t begin, int64_t end, int64_t first) {
  constexpr int kRows = kWithin ? 1 : N <= 6 ? 4 : 3;
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) {
    multiply<T, kRows, N>(task, typename Form::template Rows<kRows, kWithin>(task, row), row, first);
  }
  for (; row < end; ++row) {
    multiply<T, 1, N>(task, typename Form::template Rows<1, kWithin>(task, row), row, first);
  }
}

}  // namespace
}  // namespace mosaic::MOSAIC_ISA
