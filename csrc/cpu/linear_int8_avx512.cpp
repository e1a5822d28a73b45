// SPDX-License-Identifier: Apache-2.0
// int8 values with AVX-512. Times x as it is, for accuracy: a word's bytes are expanded, widened to fp32
// (exact), scaled where a row has several scales, and multiplied as any other weight. Times x rounded to
// int8, for speed: 64 products in one instruction, exact in int32.
#include "cpu/linear_avx512.h"

namespace mosaic::MOSAIC_ISA {
namespace {

// The int8 values of R rows: where each row's next ones are, and what to ask for ahead.
template <int R>
struct Bytes {
  Bytes(const LinearArgs& a, int64_t row) : words(bitmask_words(a.in_features)), bits(a.words + row * words) {
    for (int r = 0; r < R; ++r) {
      const int64_t next_block = row + R + r < a.out_features ? row + R + r : a.out_features;
      value[r] = static_cast<const int8_t*>(a.values) + a.offsets[row + r];
      ahead[r] = a.offsets[next_block] - a.offsets[row + r];
    }
  }
  void prefetch(int r, int64_t w) const {
    _mm_prefetch(reinterpret_cast<const char*>(value[r] + ahead[r]), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(bits + (R + r) * words + w), _MM_HINT_T1);
  }

  int64_t words;
  const uint32_t* bits;
  const int8_t* value[R];
  int64_t ahead[R];
};

template <typename T, bool kGrouped>
struct PackedInt8 {
  template <int R, bool kWithin>
  struct Rows : Bytes<R> {
    Rows(const LinearArgs& a, int64_t row)
        : Bytes<R>(a, row), groups(a.scale_groups), scale(a.scales + row * groups) {}
    typename Traits<T>::Word next(int r, int64_t w) {
      const uint32_t word = this->bits[r * this->words + w];
      const int8_t* from = this->value[r];
      if (!kWithin && w % 2 == 0) this->prefetch(r, w);
      this->value[r] += popcount(word);
      const __m256i kept = kWithin ? _mm256_maskz_loadu_epi8(bits_below(popcount(word)), from)
                                   : in_register(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
      const __m256i weights = _mm256_maskz_expand_epi8(word, kept);
      __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(weights)));
      __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(weights, 1)));
      if (kGrouped) {
        const __m512 s = _mm512_set1_ps(scale[r * groups + w / 2]);
        low = _mm512_mul_ps(low, s);
        high = _mm512_mul_ps(high, s);
      }
      return Traits<T>::round(low, high);
    }

    int64_t groups;
    const float* scale;
  };
};

// 64 weights of each of R rows at a time.
template <int R, bool kWithin>
struct WideRows : Bytes<R> {
  using Bytes<R>::Bytes;
  __m512i next(int r, int64_t g) {
    const uint32_t* word = this->bits + r * this->words + 2 * g;
    const uint64_t mask = 2 * g + 1 < this->words ? word[0] | static_cast<uint64_t>(word[1]) << 32 : word[0];
    const int8_t* from = this->value[r];
    const int count = __builtin_popcountll(mask);
    if (!kWithin) this->prefetch(r, 2 * g);
    this->value[r] += count;
    const __m512i kept = kWithin ? _mm512_maskz_loadu_epi8(count < 64 ? (1ull << count) - 1 : ~0ull, from)
                                 : in_register(_mm512_loadu_si512(from));
    return _mm512_maskz_expand_epi8(mask, kept);
  }
};

template <int R>
struct WidePanel {
  __m512i next(int r, int64_t g) const { return _mm512_loadu_si512(panel + (g * R + r) * kScaleColumns); }
  const int8_t* panel;
};

// R weight rows from `row` on and N rows of x from `first` on. x holds 128 too much in every byte, because
// vpdpbusd takes it unsigned; 128 times the sum of the weights is what that adds.
template <typename T, int R, int N, bool kGrouped, typename Rows>
void multiply_wide(const LinearTask& task, Rows weights, int64_t row, int64_t first) {
  const LinearArgs& a = task.args;
  const int64_t groups = scale_groups_of(a.in_features);
  const auto* x = static_cast<const uint8_t*>(task.x) + first * groups * kScaleColumns;
  const __m512i ones = _mm512_set1_epi8(1), zero = _mm512_setzero_si512();
  __m512i sum[R][N], plain[R];
  __m512 scaled[4][N];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      scaled[r][n] = _mm512_setzero_ps();
      if (r < R) sum[r % R][n] = plain[r % R] = zero;
    }
  for (int64_t g = 0; g < groups; ++g, x += N * kScaleColumns) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512i weight = weights.next(r, g);
      plain[r] = _mm512_dpbusd_epi32(kGrouped ? zero : plain[r], ones, weight);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const __m512i many = _mm512_loadu_si512(x + n * kScaleColumns);
        sum[r][n] = _mm512_dpbusd_epi32(kGrouped ? zero : sum[r][n], many, weight);
        if (kGrouped) {
          const __m512i exact = _mm512_sub_epi32(sum[r][n], _mm512_slli_epi32(plain[r], 7));
          const __m512 scale = _mm512_set1_ps(a.scales[(row + r) * groups + g]);
          scaled[r][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scale, scaled[r][n]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if (kGrouped) continue;
      scaled[r][n] = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[r][n], _mm512_slli_epi32(plain[r], 7)));
    }
    const __m128 sums = horizontal_sums(scaled[0][n], scaled[1][n], scaled[2][n], scaled[3][n]);
    store_sums<T, R>(a, row, first + n, _mm_mul_ps(sums, _mm_set1_ps(task.x_scales[first + n])));
  }
}

template <typename T, bool kGrouped, int N, bool kWithin>
void multiply_wide_rows(const LinearTask& task, int64_t begin, int64_t end, int64_t first) {
  constexpr int kRows = kWithin ? 1 : kGrouped ? (N <= 2 ? 4 : N <= 4 ? 2 : 1) : N <= 4 ? 4 : 2;
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) {
    multiply_wide<T, kRows, N, kGrouped>(task, WideRows<kRows, kWithin>(task.args, row), row, first);
  }
  for (; row < end; ++row) {
    multiply_wide<T, 1, N, kGrouped>(task, WideRows<1, kWithin>(task.args, row), row, first);
  }
}

constexpr int kWidePanelRows = 2;

template <typename T, bool kGrouped>
void multiply_wide_all(const LinearTask& task, int64_t begin, int64_t guarded, int64_t end) {
  const int64_t rows = task.args.rows, groups = scale_groups_of(task.args.in_features);
  const int64_t pair_bytes = groups * kScaleColumns * kWidePanelRows;
  if (rows >= kPanelMinRows && guarded - begin >= kWidePanelRows) {
    int64_t pairs = kPanelBytes / pair_bytes;
    if (pairs < 1) pairs = 1;
    auto* panel = static_cast<int8_t*>(scratch(1, pairs * pair_bytes));
    for (; panel && begin + kWidePanelRows <= guarded; begin += pairs * kWidePanelRows) {
      if (begin + pairs * kWidePanelRows > guarded) pairs = (guarded - begin) / kWidePanelRows;
      int8_t* to = panel;
      for (int64_t p = 0; p < pairs; ++p) {
        WideRows<kWidePanelRows, false> weights(task.args, begin + p * kWidePanelRows);
        for (int64_t g = 0; g < groups; ++g) {
          for (int r = 0; r < kWidePanelRows; ++r, to += kScaleColumns) {
            _mm512_storeu_si512(to, weights.next(r, g));
          }
        }
      }
      for_each_block(rows, [&](int64_t n, auto count) {
        for (int64_t p = 0; p < pairs; ++p) {
          multiply_wide<T, kWidePanelRows, decltype(count)::value, kGrouped>(
              task, WidePanel<kWidePanelRows>{panel + p * pair_bytes}, begin + p * kWidePanelRows, n);
        }
      });
    }
  }
  for_each_block(rows, [&](int64_t n, auto count) {
    multiply_wide_rows<T, kGrouped, decltype(count)::value, false>(task, begin, guarded, n);
    multiply_wide_rows<T, kGrouped, decltype(count)::value, true>(task, guarded, end, n);
  });
}

}  // namespace

template <typename T>
void linear_int8(const LinearTask& task, int64_t begin, int64_t end) {
  const int64_t guarded = first_guarded_row(task, begin, end);
  if (task.args.scale_groups > 1) {
    multiply_all<T, PackedInt8<T, true>>(task, begin, guarded, end);
  } else {
    multiply_all<T, PackedInt8<T, false>>(task, begin, guarded, end);
  }
}

template <typename T>
void linear_int8_times_int8(const LinearTask& task, int64_t begin, int64_t end) {
  const int64_t guarded = first_guarded_row(task, begin, end);
  if (task.args.scale_groups > 1) {
    multiply_wide_all<T, true>(task, begin, guarded, end);
  } else {
    multiply_wide_all<T, false>(task, begin, guarded, end);
  }
}

#define MOSAIC_INSTANTIATE(T)                                        \
  template void linear_int8<T>(const LinearTask&, int64_t, int64_t); \
  template void linear_int8_times_int8<T>(const LinearTask&, int64_t, int64_t);
MOSAIC_INSTANTIATE(float)
MOSAIC_INSTANTIATE(BFloat16)
MOSAIC_INSTANTIATE(Half)
#undef MOSAIC_INSTANTIATE

}  // namespace mosaic::MOSAIC_ISA
