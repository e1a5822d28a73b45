// SPDX-License-Identifier: Apache-2.0
// Row bitmap times activations with AVX-512 (VBMI2 and BF16).
//
// One row of x is bound by reading the weight; from four rows up by the dot products, one cycle each
// per 32 weights and row of x. A word of 32 columns goes
//
//     bits ── popcount ──> where the next word's values begin
//     64 bytes of values ── vpexpandw with the bits ──> 32 weights, zeros in place
//                        ── vdpbf16ps with 32 of x ──> 16 fp32 sums
//
// An expand whose result is used at once costs 6.1 cycles a word, two or more kept in registers before
// their dots 3.8 (Zen 4, Nov 2026): hence expand all words of a step first, then multiply.
#include <immintrin.h>

#include "cpu/rows.h"

namespace mosaic::MOSAIC_ISA {
namespace {

// How far ahead of the values being read the next ones are asked for.
constexpr int64_t kPrefetchBytes = 3072;

template <typename T>
struct Traits;

template <>
struct Traits<BFloat16> {
  using X = uint16_t;
  using Word = __m512i;  // 32 weights, zeros where the bit is clear

  static const X* x(const LinearTask& task) { return static_cast<const X*>(task.args.x); }
  static Word expand(uint32_t bits, const BFloat16* values) {
    return _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(values));
  }
  static Word expand_within(uint32_t bits, const BFloat16* values) {
    const __mmask32 present = bits_below(popcount(bits));
    return _mm512_maskz_expand_epi16(bits, _mm512_maskz_loadu_epi16(present, values));
  }
  static __m512 dot(__m512 sum, Word w, const X* x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
  }
  static __m512 dot_within(__m512 sum, Word w, const X* x, __mmask32 columns) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_maskz_loadu_epi16(columns, x));
  }
};

template <>
struct Traits<Half> {
  using X = float;
  using Word = __m512i;

  static const X* x(const LinearTask& task) { return task.x32; }
  static Word expand(uint32_t bits, const Half* values) {
    return _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(values));
  }
  static Word expand_within(uint32_t bits, const Half* values) {
    const __mmask32 present = bits_below(popcount(bits));
    return _mm512_maskz_expand_epi16(bits, _mm512_maskz_loadu_epi16(present, values));
  }
  static __m512 low(Word w) { return _mm512_cvtph_ps(_mm512_castsi512_si256(w)); }
  static __m512 high(Word w) { return _mm512_cvtph_ps(_mm512_extracti64x4_epi64(w, 1)); }
  static __m512 dot(__m512 sum, Word w, const X* x) {
    sum = _mm512_fmadd_ps(low(w), _mm512_loadu_ps(x), sum);
    return _mm512_fmadd_ps(high(w), _mm512_loadu_ps(x + 16), sum);
  }
  static __m512 dot_within(__m512 sum, Word w, const X* x, __mmask32 columns) {
    sum = _mm512_fmadd_ps(low(w), _mm512_maskz_loadu_ps(columns, x), sum);
    return _mm512_fmadd_ps(high(w), _mm512_maskz_loadu_ps(columns >> 16, x + 16), sum);
  }
};

template <>
struct Traits<float> {
  using X = float;
  struct Word {
    __m512 low, high;
  };

  static const X* x(const LinearTask& task) { return task.x32; }
  static Word expand(uint32_t bits, const float* values) {
    const __mmask16 first = bits & 0xffff, second = bits >> 16;
    return {_mm512_maskz_expand_ps(first, _mm512_loadu_ps(values)),
            _mm512_maskz_expand_ps(second, _mm512_loadu_ps(values + popcount(first)))};
  }
  static Word expand_within(uint32_t bits, const float* values) {
    const __mmask16 first = bits & 0xffff, second = bits >> 16;
    const __mmask16 in_first = bits_below(popcount(first)), in_second = bits_below(popcount(second));
    return {_mm512_maskz_expand_ps(first, _mm512_maskz_loadu_ps(in_first, values)),
            _mm512_maskz_expand_ps(second, _mm512_maskz_loadu_ps(in_second, values + popcount(first)))};
  }
  static __m512 dot(__m512 sum, const Word& w, const X* x) {
    sum = _mm512_fmadd_ps(w.low, _mm512_loadu_ps(x), sum);
    return _mm512_fmadd_ps(w.high, _mm512_loadu_ps(x + 16), sum);
  }
  static __m512 dot_within(__m512 sum, const Word& w, const X* x, __mmask32 columns) {
    sum = _mm512_fmadd_ps(w.low, _mm512_maskz_loadu_ps(columns, x), sum);
    return _mm512_fmadd_ps(w.high, _mm512_maskz_loadu_ps(columns >> 16, x + 16), sum);
  }
};

template <typename T>
void store_sum(const LinearTask& task, int64_t row, int64_t n, float sum) {
  const T* bias = static_cast<const T*>(task.args.bias);
  store(bias ? sum + to_float(bias[row]) : sum, static_cast<T*>(task.args.out) + n * task.args.out_features + row);
}

// R weight rows from `row` on, N rows of x from `first` on, U words a step. kWithin: never load past the
// last value of a word, for the rows whose end is less than a full load from the end of the values.
template <typename T, int R, int N, int U, bool kWithin>
void multiply(const LinearTask& task, int64_t row, int64_t first) {
  using D = Traits<T>;
  const LinearArgs& a = task.args;
  const int64_t words = bitmask_words(a.in_features), whole = a.in_features / kWordBits;
  const auto* x = D::x(task) + first * a.in_features;
  const uint32_t* bits = a.words + row * words;
  const T* value[R];
  for (int r = 0; r < R; ++r) value[r] = static_cast<const T*>(a.values) + a.offsets[row + r];
  const auto next = [&](int r, int64_t w) {
    const uint32_t word = bits[r * words + w];
    const auto expanded = kWithin ? D::expand_within(word, value[r]) : D::expand(word, value[r]);
    value[r] += popcount(word);
    return expanded;
  };

  __m512 sum[R][N][U];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n)
      for (int u = 0; u < U; ++u) sum[r][n][u] = _mm512_setzero_ps();

  int64_t w = 0;
  for (; w + U <= whole; w += U) {
    typename D::Word weight[R][U];
    for (int r = 0; r < R; ++r) {
      for (int u = 0; u < U; ++u) {
        _mm_prefetch(reinterpret_cast<const char*>(value[r]) + kPrefetchBytes, _MM_HINT_T0);
        weight[r][u] = next(r, w + u);
      }
    }
    for (int n = 0; n < N; ++n) {
      for (int u = 0; u < U; ++u) {
        for (int r = 0; r < R; ++r) {
          sum[r][n][u] = D::dot(sum[r][n][u], weight[r][u], x + n * a.in_features + (w + u) * kWordBits);
        }
      }
    }
  }
  for (; w < words; ++w) {
    const int64_t left = a.in_features - w * kWordBits;
    const __mmask32 columns = left >= kWordBits ? ~0u : bits_below(static_cast<uint32_t>(left));
    for (int r = 0; r < R; ++r) {
      const auto weight = next(r, w);
      for (int n = 0; n < N; ++n) {
        sum[r][n][0] = D::dot_within(sum[r][n][0], weight, x + n * a.in_features + w * kWordBits, columns);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      for (int u = 1; u < U; ++u) sum[r][n][0] = _mm512_add_ps(sum[r][n][0], sum[r][n][u]);
      store_sum<T>(task, row + r, first + n, _mm512_reduce_add_ps(sum[r][n][0]));
    }
  }
}

// N rows of x against weight rows [begin, end).
template <typename T, int N>
void multiply_rows(const LinearTask& task, int64_t begin, int64_t end, int64_t first) {
  constexpr int kRows = N == 1 ? 1 : N <= 4 ? 4 : 2;  // R * N * U <= 16 sums
  constexpr int kWords = N == 1 ? 4 : N == 2 ? 2 : 1;
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) multiply<T, kRows, N, kWords, false>(task, row, first);
  for (; row < end; ++row) multiply<T, 1, N, kWords, false>(task, row, first);
}

constexpr int64_t kMaxRows = 8;

template <typename T>
void multiply_rows(const LinearTask& task, int64_t begin, int64_t end, int64_t first, int64_t count) {
  using Run = void (*)(const LinearTask&, int64_t, int64_t, int64_t);
  static constexpr Run kRun[kMaxRows] = {multiply_rows<T, 1>, multiply_rows<T, 2>, multiply_rows<T, 3>,
                                         multiply_rows<T, 4>, multiply_rows<T, 5>, multiply_rows<T, 6>,
                                         multiply_rows<T, 7>, multiply_rows<T, 8>};
  kRun[count - 1](task, begin, end, first);
}

// The first row of [begin, end) from which a full load might pass the end of the values.
int64_t first_guarded_row(const LinearTask& task, int64_t begin, int64_t end) {
  while (end > begin && task.args.offsets[end] >= task.fast_values) --end;
  return end;
}

}  // namespace

bool wants_x32(DType dtype, int64_t) { return dtype != DType::kBFloat16; }

template <typename T>
void linear(const LinearTask& task, int64_t begin, int64_t end) {
  const int64_t guarded = first_guarded_row(task, begin, end), rows = task.args.rows;
  constexpr int64_t kBlock = 8;
  for (int64_t row = begin; row < guarded; row += kBlock) {
    const int64_t last = row + kBlock < guarded && rows > kMaxRows ? row + kBlock : guarded;
    for (int64_t n = 0; n < rows; n += kMaxRows) {
      multiply_rows<T>(task, row, last, n, rows - n < kMaxRows ? rows - n : kMaxRows);
    }
    if (last == guarded) break;
  }
  for (int64_t row = guarded; row < end; ++row) {
    for (int64_t n = 0; n < rows; ++n) multiply<T, 1, 1, 1, true>(task, row, n);
  }
}

template void linear<float>(const LinearTask&, int64_t, int64_t);
template void linear<BFloat16>(const LinearTask&, int64_t, int64_t);
template void linear<Half>(const LinearTask&, int64_t, int64_t);

}  // namespace mosaic::MOSAIC_ISA
