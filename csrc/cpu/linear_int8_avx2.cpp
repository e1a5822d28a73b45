// SPDX-License-Identifier: Apache-2.0
// int8 weights times x rounded to integers with AVX2, for few rows of x. The integer products and sums
// are exact. Both factors are read as integers of 16 bits:
//
//     2 bytes of bits ── table ──> shuffles ─┐
//     8 and 8 values, a half of a register each ─┴─> 16 weights in the upper halves of 16 bits
//                     ── vpsraw (x of 16 bits) ── vpmaddwd with 16 of x ──> int32
//
// A weight in the upper 8 of 16 bits is 256 times too large. With x of 16 bits the kernel shifts it down
// (vpsraw), because the sums would overflow. With x of 8 bits they cannot, so the kernel skips the shift and
// divides the sums by 256 instead.
//
// Widening weights to fp32 takes two instructions for 8 weights; this takes one for 16. With fp32 one row of
// x took 1.15 times as long, and 1.2 times with a scale for every 64 columns. (Weights in L2; Xeon, Sapphire
// Rapids class, Dec 2026)
#include "cpu/linear_avx2.h"

namespace mosaic::MOSAIC_ISA {
namespace {

constexpr Shuffles<16, 1> kUpper8;

struct X8 {
  static constexpr float kUnit = 1.0f / 256;  // undoes the factor of 256
  static __m256i weights(__m256i upper) { return upper; }
};

struct X16 {
  static constexpr float kUnit = 1;
  static __m256i weights(__m256i upper) { return _mm256_srai_epi16(upper, 8); }
};

// At most this many words are added up in int32, so that no lane overflows. Each word adds four products to a
// lane, of up to 127 x 32767 (x of 16 bits) or 127 x 127 x 256 (x of 8 bits).
constexpr int64_t kMostWords = 128;
static_assert(kMostWords * 4 * 127 * 32767 < int64_t{1} << 31 &&
              kMostWords * 4 * 127 * 127 * 256 < int64_t{1} << 31);

MOSAIC_HD __m256i both(__m128i low, const void* high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                 _mm_loadu_si128(static_cast<const __m128i*>(high)), 1);
}

// Expands bytes q and q + 1 of a word to 16 weights, each multiplied by 256.
MOSAIC_HD __m256i expand_whole(uint32_t word, int q, const int8_t* values) {
  const auto at = [&](int byte) { return values + values_before(word, byte); };
  const __m256i source = _mm256_inserti128_si256(_mm256_castsi128_si256(row_of<__m128i>(kUpper8, word, q)),
                                                 row_of<__m128i>(kUpper8, word, q + 1), 1);
  const __m256i kept = both(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at(q))), at(q + 1));
  return _mm256_shuffle_epi8(kept, source);
}

// Multiplies R weight rows, from `row` on, by N rows of x, from `first` on. kWithin: never load past the last
// value of a row.
template <typename X, bool kGrouped, int R, int N, bool kWithin>
void multiply(const LinearTask& task, int64_t row, int64_t first, __m256 (&sums)[N][R]) {
  const LinearArgs& a = task.args;
  const int64_t words = bitmask_words(a.in_features);
  const auto* x = static_cast<const int16_t*>(task.x) + first * words * kWordBits;
  const uint32_t* bits = a.words + row * words;
  const int64_t distance = task.rows_ahead * words;
  const int8_t* value[R];
  for (int r = 0; r < R; ++r) value[r] = static_cast<const int8_t*>(a.values) + a.offsets[row + r];
  Streams ahead = values_of(a, row + task.rows_ahead, row + task.rows_ahead + R, 1, words);

  __m256 scaled[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) scaled[r][n] = _mm256_setzero_ps();

  for (int64_t w = 0; w < words;) {
    __m256i sum[R][N];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r][n] = _mm256_setzero_si256();

    const int64_t group = w * kWordBits / kScaleColumns;
    const int64_t some = kGrouped ? kScaleColumns / kWordBits : kMostWords;
    const int64_t end = words - w < some ? words : w + some;
    for (; w < end; ++w, x += N * kWordBits) {
      if (!kWithin) ahead.step();
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const uint32_t word = bits[r * words + w];
        if (!kWithin && w % kWordsPerLine == 0) fetch(bits + distance + r * words + w);
        const int8_t* from = value[r];
        int8_t copy[kWithin ? 2 * kWordBits : 1];
        if (kWithin) {
          std::memcpy(copy, from, popcount(word));
          from = copy;
        }
        const int16_t* own = N > 2 ? as_is(x) : x;
#pragma GCC unroll 2
        for (int q = 0; q < kWordBytes; q += 2) {
          const __m256i weights = X::weights(expand_whole(word, q, from));
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) {
            const auto* at = reinterpret_cast<const __m256i*>(own + n * kWordBits + q * kLanes);
            sum[r][n] = _mm256_add_epi32(sum[r][n], _mm256_madd_epi16(weights, _mm256_loadu_si256(at)));
          }
        }
        value[r] += popcount(word);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float unit = kGrouped ? X::kUnit * a.scales[(row + r) * a.scale_groups + group] : X::kUnit;
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        scaled[r][n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][n]), _mm256_set1_ps(unit), scaled[r][n]);
      }
    }
  }

#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[n][r] = scaled[r][n];
}

template <typename T, typename X, bool kGrouped, int R, int N, bool kWithin>
void multiply_store(const LinearTask& task, int64_t row, int64_t first) {
  __m256 sums[N][R];
  multiply<X, kGrouped, R, N, kWithin>(task, row, first, sums);
  for (int n = 0; n < N; ++n) store_sums<T>(task, row, first + n, sums[n], R);
}

template <typename T, typename X, bool kGrouped>
void multiply_all(const LinearTask& task, int64_t begin, int64_t end) {
  fetch_first_rows(task, begin, end, 1);
  const int64_t guarded = first_guarded_row(task, begin, end);
  for_each_block(task.args.rows, [&](int64_t first, auto count) {
    constexpr int N = decltype(count)::value;
    if constexpr (N <= kWholeRows) {
      constexpr int kRows = kGrouped ? (N == 1 ? 4 : N <= 3 ? 2 : 1) : N <= 3 ? 4 : N == 4 ? 3 : 2;
      int64_t row = begin;
      for (; row + kRows <= guarded; row += kRows) {
        multiply_store<T, X, kGrouped, kRows, N, false>(task, row, first);
      }
      for (; row < guarded; ++row) multiply_store<T, X, kGrouped, 1, N, false>(task, row, first);
      for (; row < end; ++row) multiply_store<T, X, kGrouped, 1, N, true>(task, row, first);
    }
  });
}

}  // namespace

template <typename T>
bool linear_int8_times_int16(const LinearTask& task, int64_t begin, int64_t end) {
  (task.args.scale_groups > 1 ? multiply_all<T, X16, true> : multiply_all<T, X16, false>)(task, begin, end);
  return true;
}

template <typename T>
bool linear_int8_times_int8(const LinearTask& task, int64_t begin, int64_t end) {
  (task.args.scale_groups > 1 ? multiply_all<T, X8, true> : multiply_all<T, X8, false>)(task, begin, end);
  return true;
}

#define MOSAIC_INSTANTIATE(T) template bool linear_int8_times_int8<T>(const LinearTask&, int64_t, int64_t);
MOSAIC_INSTANTIATE(float)
MOSAIC_INSTANTIATE(BFloat16)
MOSAIC_INSTANTIATE(Half)
#undef MOSAIC_INSTANTIATE
template bool linear_int8_times_int16<BFloat16>(const LinearTask&, int64_t, int64_t);

}  // namespace mosaic::MOSAIC_ISA
