// SPDX-License-Identifier: Apache-2.0
// int8 values with AVX-512, 64 columns at a time. Whole numbers are multiplied exactly and added up in int32:
//
//     64 bits of the bitmap ── popcount ──> where the next values begin
//     64 bytes of values ── vpexpandb with the bits ──> 64 weights, zeros in place
//       x rounded to int8:   ── vpdpbusd with 64 of x, unsigned (128 added; see multiply_wide) ──> int32
//       x as it is (bf16):   ── vpmovsxbw ── vpdpwssd with 2 x 32 of x in 16 bits ──> int32
//
// bf16 dots would need the weights in bf16, which took longer than reading a bf16 bitmap (18 cycles for 64
// weights by table, 24 through fp32; Zen 4, Nov 2026). Sixteen bits hold the elements of a row as well as
// bf16 does unless one of them dwarfs the rest; such rows, and fp16 and fp32 activations, are multiplied as
// they are, by weights that are widened to fp32.
#include "cpu/linear_tiles_avx512.h"

namespace mosaic::MOSAIC_ISA {
namespace {

// The int8 values of R rows: where each row's next ones are, and what to ask for ahead. (Streams, as for
// bf16, made these kernels slower by 0 to 13 %: a line is asked for half as often here; Zen 4, Nov 2026.)
template <int R>
struct Bytes {
  Bytes(const LinearTask& task, int64_t row)
      : words(bitmask_words(task.args.in_features)),
        distance(task.rows_ahead * words),
        bits(task.args.words + row * words) {
    const LinearArgs& a = task.args;
    for (int r = 0; r < R; ++r) {
      const int64_t later = row + task.rows_ahead + r,
                    next_block = later < a.out_features ? later : a.out_features;
      value[r] = static_cast<const int8_t*>(a.values) + a.offsets[row + r];
      ahead[r] = a.offsets[next_block] - a.offsets[row + r];
    }
  }
  void prefetch(int r, int64_t w) const {
    _mm_prefetch(reinterpret_cast<const char*>(value[r] + ahead[r]), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(bits + distance + r * words + w), _MM_HINT_T1);
  }

  int64_t words, distance;
  const uint32_t* bits;
  const int8_t* value[R];
  int64_t ahead[R];
};

// 32 weights of each of R rows at a time, widened by way of fp32.
template <typename T, bool kGrouped, int R, bool kWithin>
struct Int8Rows : Bytes<R> {
  Int8Rows(const LinearTask& task, int64_t row)
      : Bytes<R>(task, row), groups(task.args.scale_groups), scale(task.args.scales + row * groups) {}
  void step(int64_t) const {}
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

template <typename T, bool kGrouped>
struct PackedInt8 {
  template <int R, bool kWithin>
  using Rows = Int8Rows<T, kGrouped, R, kWithin>;
};

// 64 weights of each of R rows at a time; kWhole: the second of its two words is one of the row's.
template <int R, bool kWithin>
struct WideRows : Bytes<R> {
  using Bytes<R>::Bytes;
  template <bool kWhole>
  __m512i next(int r, int64_t g) {
    const uint32_t* word = this->bits + r * this->words + 2 * g;
    uint64_t mask = *word;
    if (kWhole) std::memcpy(&mask, word, sizeof mask);
    const int8_t* from = this->value[r];
    const int count = __builtin_popcountll(mask);
    if (!kWithin) this->prefetch(r, 2 * g);
    this->value[r] += count;
    const __m512i kept = kWithin ? _mm512_maskz_loadu_epi8(count < 64 ? (1ull << count) - 1 : ~0ull, from)
                                 : in_register(_mm512_loadu_si512(from));
    return _mm512_maskz_expand_epi8(mask, kept);
  }
};

// x rounded to int8. vpdpbusd takes it unsigned, so it holds 128 too much, and 128 times the sum of the
// weights is what that adds.
struct X8 {
  static constexpr int kMostSteps = 1 << 14;  // 4 products of up to 127 x 255 each: int32 holds 16,577
  static constexpr int64_t kBytes = kScaleColumns;
  using Weight = __m512i;

  static Weight widen(__m512i bytes) { return bytes; }
  static __m512i add_plain(__m512i sum, Weight w) { return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), w); }
  static __m512i dot(__m512i sum, Weight w, const char* x) {
    return _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(x), w);
  }
  static __m512i exact(__m512i sum, __m512i plain) {
    return _mm512_sub_epi32(sum, _mm512_slli_epi32(plain, 7));
  }
};

// x in 16 bits.
struct X16 {
  static constexpr int kMostSteps = 127;  // 4 products of up to 127 x 32767 each
  static constexpr int64_t kBytes = 2 * kScaleColumns;
  struct Weight {
    __m512i first, second;
  };

  static Weight widen(__m512i bytes) {
    return {_mm512_cvtepi8_epi16(_mm512_castsi512_si256(bytes)),
            _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(bytes, 1))};
  }
  static __m512i add_plain(__m512i sum, const Weight&) { return sum; }
  static __m512i dot(__m512i sum, const Weight& w, const char* x) {
    sum = _mm512_dpwssd_epi32(sum, w.first, _mm512_loadu_si512(x));
    return _mm512_dpwssd_epi32(sum, w.second, _mm512_loadu_si512(x + 64));
  }
  static __m512i exact(__m512i sum, __m512i) { return sum; }
};

template <typename X, int R, bool kWithin>
struct WideValues : WideRows<R, kWithin> {
  using WideRows<R, kWithin>::WideRows;
  template <bool kWhole>
  typename X::Weight next(int r, int64_t g) {
    return X::widen(WideRows<R, kWithin>::template next<kWhole>(r, g));
  }
};

template <typename X, int R, int N, bool kWhole, typename Rows>
MOSAIC_HD void add_products(Rows& weights, int64_t g, const char* x, __m512i (&sum)[R][N],
                            __m512i (&plain)[R]) {
  typename X::Weight weight[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    weight[r] = weights.template next<kWhole>(r, g);
    plain[r] = X::add_plain(plain[r], weight[r]);
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[r][n] = X::dot(sum[r][n], weight[r], x + n * X::kBytes);
}

// R weight rows from `row` on and N rows of x from `first` on.
template <typename T, typename X, int R, int N, bool kGrouped, typename Rows>
void multiply_wide(const LinearTask& task, Rows weights, int64_t row, int64_t first) {
  const LinearArgs& a = task.args;
  const int64_t groups = scale_groups_of(a.in_features), whole = bitmask_words(a.in_features) / 2;
  const char* x = static_cast<const char*>(task.x) + first * groups * X::kBytes;
  const __m512i zero = _mm512_setzero_si512();
  __m512 scaled[4][N];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) scaled[r][n] = _mm512_setzero_ps();

  // With a scale for the row, int32 sums of as many columns as cannot overflow; else of 64.
  for (int64_t g = 0; g < groups;) {
    __m512i sum[R][N], plain[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      plain[r] = zero;
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r][n] = zero;
    }
    const int64_t begin = g, steps = kGrouped ? 1 : X::kMostSteps;
    const int64_t end = whole < g + steps ? whole : g + steps;
    for (; g < end; ++g, x += N * X::kBytes) add_products<X, R, N, true>(weights, g, x, sum, plain);
    if (g == whole && g < groups && g < begin + steps) {
      add_products<X, R, N, false>(weights, g++, x, sum, plain);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512 scale = _mm512_set1_ps(kGrouped ? a.scales[(row + r) * groups + begin] : 1);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const __m512 exact = _mm512_cvtepi32_ps(X::exact(sum[r][n], plain[r]));
        scaled[r][n] = _mm512_fmadd_ps(exact, scale, scaled[r][n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const __m128 sums = horizontal_sums(scaled[0][n], scaled[1][n], scaled[2][n], scaled[3][n]);
    store_sums<T>(a, row, R, first + n, _mm_mul_ps(sums, _mm_set1_ps(task.x_scales[first + n])));
  }
}

template <typename T, typename X, bool kGrouped, int N, bool kWithin>
void multiply_wide_rows(const LinearTask& task, int64_t begin, int64_t end, int64_t first) {
  // With several scales the int32 and the fp32 sums are needed at once.
  constexpr int kRows = kWithin ? 1 : kGrouped ? (N <= 2 ? 4 : N <= 4 ? 2 : 1) : N <= 4 ? 4 : 2;
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) {
    multiply_wide<T, X, kRows, N, kGrouped>(task, WideValues<X, kRows, kWithin>(task, row), row, first);
  }
  for (; row < end; ++row) {
    multiply_wide<T, X, 1, N, kGrouped>(task, WideValues<X, 1, kWithin>(task, row), row, first);
  }
}

// Calls save(r, g, weights) for each 64 columns g of R weight rows.
template <typename X, int R, bool kWithin, typename Save>
void expand_wide(const LinearTask& task, int64_t row, const Save& save) {
  const LinearArgs& a = task.args;
  const int64_t groups = scale_groups_of(a.in_features), whole = bitmask_words(a.in_features) / 2;
  WideValues<X, R, kWithin> weights(task, row);
  for (int64_t g = 0; g < groups; ++g) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      save(r, g, g < whole ? weights.template next<true>(r, g) : weights.template next<false>(r, g));
    }
  }
}

// x rounded to int8, many rows at a time. What the 128 too much add is known before the first product.
struct Expanded8 {
  struct Product {
    static constexpr bool kWhole = true;
    template <typename Lanes>
    using Sum = typename Lanes::Items;
    // A lane gets all 64 products of a step here, not 4 of them.
    static constexpr int64_t kGroupSteps = 1, kMostSteps = X8::kMostSteps / 16;

    static int32_t start(int32_t plain) { return -128 * plain; }
    template <typename Items>
    static Items add(Items sum, Items x, Items weights) {
      __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weights));
      return sum;
    }
  };

  static int64_t steps(const LinearArgs& a) { return scale_groups_of(a.in_features); }
  template <int R, bool kWithin>
  static void expand(const LinearTask& task, int64_t row, int64_t stride, char* to, int32_t* plain) {
    const Pieces pieces = pieces_of<Product>(task.args, steps(task.args));
    expand_wide<X8, R, kWithin>(task, row, [&](int r, int64_t g, __m512i weights) {
      _mm512_storeu_si512(to + g * stride + r * kStepBytes, weights);
      plain[r * pieces.count + g / pieces.steps] +=
          _mm512_reduce_add_epi32(X8::add_plain(_mm512_setzero_si512(), weights));
    });
  }
};

// x in 16 bits, many rows at a time.
struct Expanded16 {
  struct Product {
    static constexpr bool kWhole = true;
    template <typename Lanes>
    using Sum = typename Lanes::Items;
    static constexpr int64_t kGroupSteps = 2, kMostSteps = 2 * X16::kMostSteps / 16;

    static int32_t start(int32_t) { return 0; }
    template <typename Items>
    static Items add(Items sum, Items x, Items weights) {
      __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weights));
      return sum;
    }
  };

  static int64_t steps(const LinearArgs& a) { return 2 * scale_groups_of(a.in_features); }
  template <int R, bool kWithin>
  static void expand(const LinearTask& task, int64_t row, int64_t stride, char* to, int32_t*) {
    expand_wide<X16, R, kWithin>(task, row, [&](int r, int64_t g, const X16::Weight& weights) {
      _mm512_storeu_si512(to + 2 * g * stride + r * kStepBytes, weights.first);
      _mm512_storeu_si512(to + (2 * g + 1) * stride + r * kStepBytes, weights.second);
    });
  }
};

template <typename T, typename X, typename Form, bool kGrouped>
bool multiply_wide_all(const LinearTask& task, int64_t begin, int64_t end) {
  const int64_t guarded = first_guarded_row(task, begin, end);
  if (has_turned_rows(task.args)) return multiply_tiles<T, Form>(task, begin, guarded, end);
  for_each_block(task.args.rows, [&](int64_t n, auto count) {
    multiply_wide_rows<T, X, kGrouped, decltype(count)::value, false>(task, begin, guarded, n);
    multiply_wide_rows<T, X, kGrouped, decltype(count)::value, true>(task, guarded, end, n);
  });
  return true;
}

}  // namespace

template <typename T>
bool linear_int8(const LinearTask& task, int64_t begin, int64_t end) {
  return (task.args.scale_groups > 1
              ? multiply_all<T, PackedInt8<T, true>>
              : multiply_all<T, PackedInt8<T, false>>)(task, begin, first_guarded_row(task, begin, end), end);
}

template <typename T>
bool linear_int8_times_int16(const LinearTask& task, int64_t begin, int64_t end) {
  return (task.args.scale_groups > 1 ? multiply_wide_all<T, X16, Expanded16, true>
                                     : multiply_wide_all<T, X16, Expanded16, false>)(task, begin, end);
}

template <typename T>
bool linear_int8_times_int8(const LinearTask& task, int64_t begin, int64_t end) {
  return (task.args.scale_groups > 1 ? multiply_wide_all<T, X8, Expanded8, true>
                                     : multiply_wide_all<T, X8, Expanded8, false>)(task, begin, end);
}

#define MOSAIC_INSTANTIATE(T)                                        \
  template bool linear_int8<T>(const LinearTask&, int64_t, int64_t); \
  template bool linear_int8_times_int8<T>(const LinearTask&, int64_t, int64_t);
MOSAIC_INSTANTIATE(float)
MOSAIC_INSTANTIATE(BFloat16)
MOSAIC_INSTANTIATE(Half)
#undef MOSAIC_INSTANTIATE
template bool linear_int8_times_int16<BFloat16>(const LinearTask&, int64_t, int64_t);

}  // namespace mosaic::MOSAIC_ISA
