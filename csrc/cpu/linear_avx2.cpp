// SPDX-License-Identifier: Apache-2.0
// Row bitmap times activations with AVX2. There is no expand instruction: eight columns at a time, their
// byte of the bitmap picks a shuffle that moves the next values into place and zeros the rest.
//
//     byte of bits ── table ──> shuffle ── 16 or 32 bytes of values ──> 8 weights ── widen ──> fp32
//
// Bound by the shuffles and loads at one row, by the multiply-adds from four rows up.
#include <immintrin.h>

#include "cpu/linear_blocks.h"
#include "cpu/thread_pool.h"

namespace mosaic::MOSAIC_ISA {
namespace {

constexpr int kLanes = 8;

// For each byte of bits the source of every lane, counted in values; 0x80 where the bit is clear.
struct Shuffles {
  alignas(64) uint8_t lane[256][8];     // for 32-bit values
  alignas(64) uint8_t halves[256][16];  // for 16-bit values, as pairs of bytes

  constexpr Shuffles() : lane(), halves() {
    for (int bits = 0; bits < 256; ++bits) {
      uint8_t source = 0;
      for (int i = 0; i < 8; ++i) {
        const bool kept = (bits >> i) & 1;
        lane[bits][i] = kept ? source : 0x80;
        halves[bits][2 * i] = kept ? 2 * source : 0x80;
        halves[bits][2 * i + 1] = kept ? 2 * source + 1 : 0x80;
        source += kept;
      }
    }
  }
};
constexpr Shuffles kShuffles;

__m128i expand_16bit(uint32_t byte, const void* values) {
  const __m128i shuffle = _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffles.halves[byte]));
  return _mm_shuffle_epi8(_mm_loadu_si128(static_cast<const __m128i*>(values)), shuffle);
}

__m256 expand(uint32_t byte, const BFloat16* values) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(expand_16bit(byte, values)), 16));
}

__m256 expand(uint32_t byte, const Half* values) { return _mm256_cvtph_ps(expand_16bit(byte, values)); }

__m256 expand(uint32_t byte, const float* values) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kShuffles.lane[byte]));
  const __m256i lane = _mm256_cvtepi8_epi32(bytes);  // negative where the bit is clear
  const __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), lane);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lane, 31)), moved);
}

__m256 expand(uint32_t byte, const int8_t* values) {
  const __m128i shuffle = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kShuffles.lane[byte]));
  const __m128i kept = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(kept, shuffle)));
}

float horizontal_sum(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Scales, adds the bias and stores the sums of `count` weight rows, from `row` on, for row n of x.
template <typename T>
void store_sums(const LinearTask& task, int64_t row, int64_t n, const float* sums, int count) {
  const LinearArgs& a = task.args;
  const T* bias = static_cast<const T*>(a.bias);
  T* out = static_cast<T*>(a.out) + n * a.out_features + row;
  for (int r = 0; r < count; ++r) {
    float sum = a.scale_groups == 1 ? sums[r] * a.scales[row + r] : sums[r];
    if (task.x_scales) sum *= task.x_scales[n];
    store(bias ? sum + to_float(bias[row + r]) : sum, out + r);
  }
}

// R weight rows from `row` on and N rows of x from `first` on; V is what a value is stored as. kWithin: never
// load past the last value of a row, for the rows whose end is less than a full load from the end of the
// values.
template <typename T, typename V, int R, int N, bool kWithin>
void multiply(const LinearTask& task, int64_t row, int64_t first) {
  static_assert(R * N <= 8, "the sums, a weight and its shuffle must fit 16 registers");
  const LinearArgs& a = task.args;
  const int64_t words = bitmask_words(a.in_features);
  const float* x = static_cast<const float*>(task.x) + first * words * kWordBits;
  const uint32_t* bits = a.words + row * words;
  const V* value[R];
  for (int r = 0; r < R; ++r) value[r] = static_cast<const V*>(a.values) + a.offsets[row + r];

  __m256 sum[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[r][n] = _mm256_setzero_ps();

  for (int64_t w = 0; w < words; ++w, x += N * kWordBits) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint32_t word = bits[r * words + w];
      V copy[kWithin ? kWordBits + kLanes : 1];
      const V* from = value[r];
      if (kWithin) {
        std::memcpy(copy, from, popcount(word) * sizeof(V));
        from = copy;
      }
#pragma GCC unroll 4
      for (int q = 0; q < kWordBits / kLanes; ++q) {
        const uint32_t byte = (word >> (q * kLanes)) & 0xff;
        __m256 weight = expand(byte, from);
        if (sizeof(V) == 1 && a.scale_groups > 1) {
          const float scale = a.scales[(row + r) * a.scale_groups + w * kWordBits / kScaleColumns];
          weight = _mm256_mul_ps(weight, _mm256_set1_ps(scale));
        }
        from += popcount(byte);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          sum[r][n] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x + n * kWordBits + q * kLanes), sum[r][n]);
        }
      }
      value[r] += popcount(word);
    }
  }

#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    float sums[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[r] = horizontal_sum(sum[r][n]);
    store_sums<T>(task, row, first + n, sums, R);
  }
}

// From kPanelRows rows of x on, weights are expanded once for all of them instead of once for every 8:
//
//     12 weight rows x 256 columns ── expand ──> panel (12 KB) x block of 8 rows of x (8 KB), both in L1
//
// Sums wait in memory between two panels, as vectors, so that every one of them adds up what it does at one
// row, in the same order: the same bits.
constexpr int64_t kPanelRows = 32;
constexpr int64_t kPanelWeights = 12;
constexpr int64_t kPanelWords = 8;
constexpr int64_t kPanelColumns = kPanelWords * kWordBits;

// The next `words` words of a weight row to `to`; returns where its values go on.
template <typename V, bool kWithin>
const V* expand_words(const LinearArgs& a, int64_t row, int64_t first, int64_t words, const V* value,
                      float* to) {
  const uint32_t* bits = a.words + row * bitmask_words(a.in_features) + first;
  for (int64_t w = 0; w < words; ++w) {
    V copy[kWithin ? kWordBits + kLanes : 1];
    const V* from = value;
    if (kWithin) {
      std::memcpy(copy, from, popcount(bits[w]) * sizeof(V));
      from = copy;
    }
    for (int q = 0; q < kWordBits / kLanes; ++q, to += kLanes) {
      const uint32_t byte = (bits[w] >> (q * kLanes)) & 0xff;
      __m256 weight = expand(byte, from);
      if (sizeof(V) == 1 && a.scale_groups > 1) {
        const float scale = a.scales[row * a.scale_groups + (first + w) * kWordBits / kScaleColumns];
        weight = _mm256_mul_ps(weight, _mm256_set1_ps(scale));
      }
      _mm256_store_ps(to, weight);
      from += popcount(byte);
    }
    value += popcount(bits[w]);
  }
  return value;
}

// Adds R weight rows of the panel times N rows of x to their sums, [row of x][row of the panel][8].
template <int R, int N>
void add_products(const float* panel, const float* x, int64_t x_stride, int64_t words, float* sums) {
  static_assert(R * N + R + 1 <= 16, "the sums, the weights and one x must fit 16 registers");
  __m256 sum[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[r][n] = _mm256_load_ps(sums + (n * kPanelWeights + r) * kLanes);
  for (int64_t w = 0; w < words; ++w, x += x_stride) {
#pragma GCC unroll 4
    for (int q = 0; q < kWordBits; q += kLanes, panel += kLanes) {
      __m256 weight[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) weight[r] = _mm256_load_ps(panel + r * kPanelColumns);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const __m256 own = _mm256_loadu_ps(x + n * kWordBits + q);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r][n] = _mm256_fmadd_ps(weight[r], own, sum[r][n]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) _mm256_store_ps(sums + (n * kPanelWeights + r) * kLanes, sum[r][n]);
}

// Weight rows [row, row + count), at most kPanelWeights, times all rows of x. Rows that the panel lacks are
// multiplied as zeros and not stored.
template <typename T, typename V>
void multiply_panel(const LinearTask& task, int64_t row, int64_t count, int64_t guarded, float* panel,
                    float* sums) {
  const LinearArgs& a = task.args;
  const int64_t words = bitmask_words(a.in_features), used = (count + 2) / 3 * 3;
  const V* value[kPanelWeights];
  for (int64_t r = 0; r < count; ++r) value[r] = static_cast<const V*>(a.values) + a.offsets[row + r];
  std::memset(panel, 0, kPanelWeights * kPanelColumns * sizeof(float));
  std::memset(sums, 0, a.rows * kPanelWeights * kLanes * sizeof(float));
  for (int64_t first = 0; first < words; first += kPanelWords) {
    const int64_t here = words - first < kPanelWords ? words - first : kPanelWords;
    for (int64_t r = 0; r < count; ++r) {
      float* to = panel + r * kPanelColumns;
      value[r] = row + r < guarded ? expand_words<V, false>(a, row + r, first, here, value[r], to)
                                   : expand_words<V, true>(a, row + r, first, here, value[r], to);
    }
    for (int64_t block = 0; block < a.rows; block += kRowBlock) {
      const int64_t rows = a.rows - block < kRowBlock ? a.rows - block : kRowBlock, stride = rows * kWordBits;
      const float* x = static_cast<const float*>(task.x) + block * words * kWordBits + first * stride;
      for (int64_t r = 0; r < used; r += 3) {
        const float* weights = panel + r * kPanelColumns;
        float* to = sums + (block * kPanelWeights + r) * kLanes;
        const auto add = [&](int64_t n, auto count_of_x) {
          add_products<3, decltype(count_of_x)::value>(weights, x + n * kWordBits, stride, here,
                                                       to + n * kPanelWeights * kLanes);
        };
        int64_t n = 0;
        for (; n + 4 <= rows; n += 4) add(n, Count<4>());
        for (; n < rows; ++n) add(n, Count<1>());
      }
    }
  }
  for (int64_t n = 0; n < a.rows; ++n) {
    float whole[kPanelWeights];
    for (int64_t r = 0; r < count; ++r) {
      whole[r] = horizontal_sum(_mm256_load_ps(sums + (n * kPanelWeights + r) * kLanes));
    }
    store_sums<T>(task, row, n, whole, static_cast<int>(count));
  }
}

// False where memory is short.
template <typename T, typename V>
bool multiply_panels(const LinearTask& task, int64_t begin, int64_t end, int64_t guarded) {
  constexpr int64_t kPanel = kPanelWeights * kPanelColumns;
  auto* panel = static_cast<float*>(scratch(1, (kPanel + task.args.rows * kPanelWeights * kLanes) * 4));
  if (!panel) return false;
  for (int64_t row = begin; row < end; row += kPanelWeights) {
    const int64_t count = end - row < kPanelWeights ? end - row : kPanelWeights;
    multiply_panel<T, V>(task, row, count, guarded, panel, panel + kPanel);
  }
  return true;
}

template <typename T, typename V>
void multiply_all(const LinearTask& task, int64_t begin, int64_t end) {
  const int64_t guarded = first_guarded_row(task, begin, end);
  if (task.args.rows >= kPanelRows && multiply_panels<T, V>(task, begin, end, guarded)) return;
  for_each_block(task.args.rows, [&](int64_t first, auto count) {
    constexpr int N = decltype(count)::value;
    constexpr int kRows = N <= 2 ? 4 : N <= 4 ? 2 : 1;
    int64_t row = begin;
    for (; row + kRows <= guarded; row += kRows) multiply<T, V, kRows, N, false>(task, row, first);
    for (; row < guarded; ++row) multiply<T, V, 1, N, false>(task, row, first);
    for (; row < end; ++row) multiply<T, V, 1, N, true>(task, row, first);
  });
}

}  // namespace

template <typename T>
bool linear(const LinearTask& task, int64_t begin, int64_t end) {
  multiply_all<T, T>(task, begin, end);
  return true;
}

template <typename T>
bool linear_int8(const LinearTask& task, int64_t begin, int64_t end) {
  multiply_all<T, int8_t>(task, begin, end);
  return true;
}

#define MOSAIC_INSTANTIATE(T)                                   \
  template bool linear<T>(const LinearTask&, int64_t, int64_t); \
  template bool linear_int8<T>(const LinearTask&, int64_t, int64_t);
MOSAIC_INSTANTIATE(float)
MOSAIC_INSTANTIATE(BFloat16)
MOSAIC_INSTANTIATE(Half)
#undef MOSAIC_INSTANTIATE

}  // namespace mosaic::MOSAIC_ISA
