// SPDX-License-Identifier: Apache-2.0
// Weights times few rows of x with AVX2. Products and sums are in fp32.
//
//     byte of bits ── table ──> shuffle ─┐
//     8 values, in both halves of a register ─┴─> 8 weights in fp32 ── multiply-add with 8 of x
//
// With one row of x the kernel is bound by memory or, where memory is fast, by the 8 or so instructions for 8
// weights. From two rows on it is bound by the multiply-adds. Three things keep it fast: the shuffle puts a
// bf16 value where fp32 has its upper half, so widening takes no instruction; the addresses of a word's bytes
// do not wait for each other; and weights are prefetched. Compared with a kernel without these, one row of x
// took 0.78 times as long with bf16 and 0.82 times with fp16 and fp32, and four rows 0.81 to 0.88 times.
// (4096x4096, half kept, from memory, one thread, Xeon, Sapphire Rapids class, Dec 2026)
//
// For any number of rows of x below 64 a sum is built in the same order: lane by lane, column after column.
// From 64 rows on linear_tiles_avx2.cpp builds it in another order, again the same for every row.
#include "cpu/linear_avx2.h"

#include "cpu/thread_pool.h"

namespace mosaic::MOSAIC_ISA {
namespace {

// Reads a packed weight row: its bitmap, and its values, stored as V. kGrouped: values have a scale for every
// 64 columns.
template <typename V, bool kGrouped>
struct Packed {
  // 32 weights of a row. kWithin: never load past the last value of a row; needed for rows that end less than
  // one full load before the end of all values.
  template <bool kWithin>
  struct Word {
    __m256 weights(int q) const {
      const __m256 plain = expand(bits, q, (kWithin ? copy : from) + values_before(bits, q));
      return kGrouped ? _mm256_mul_ps(plain, _mm256_set1_ps(scale)) : plain;
    }

    uint32_t bits;
    const V* from;
    float scale;
    V copy[kWithin ? 2 * kWordBits : 1];
  };

  Packed() = default;
  Packed(const LinearTask& task, int64_t row)
      : bits(task.args.words + row * bitmask_words(task.args.in_features)),
        value(static_cast<const V*>(task.args.values) + task.args.offsets[row]),
        scales(kGrouped ? task.args.scales + row * task.args.scale_groups : nullptr) {}

  // Reads word w of the row. Words must be read in order.
  template <bool kWithin>
  MOSAIC_HD void next(Packed& row, int64_t w, Word<kWithin>& word) {
    word.bits = row.bits[w];
    word.from = row.value;
    if (kWithin) std::memcpy(word.copy, row.value, popcount(word.bits) * sizeof(V));
    if (kGrouped) word.scale = row.scales[w * kWordBits / kScaleColumns];
    row.value += popcount(word.bits);
  }

  // Prefetches the `count` rows that are `distance` rows ahead of `row` into L2, step by step.
  struct Ahead {
    Ahead(const LinearTask& task, int64_t row, int64_t count, int64_t distance, int64_t steps)
        : values(values_of(task.args, row + distance, row + distance + count, sizeof(V), steps)),
          bits(task.args.words + (row + distance) * bitmask_words(task.args.in_features)),
          words(bitmask_words(task.args.in_features)) {}
    void step() { values.step(); }
    void bits_of(int r, int64_t w) const {
      if (w % kWordsPerLine == 0) fetch(bits + r * words + w);
    }

    Streams values;
    const uint32_t* bits;
    int64_t words;
  };

  const uint32_t* bits;
  const V* value;
  const float* scales;
};

// Reads a dense weight row. This exists because torch's F.linear reads bf16 at half the speed of memory.
template <typename V>
struct Dense {
  template <bool>
  struct Word {
    __m256 weights(int q) const { return load(from + q * kLanes); }

    const V* from;
    V copy[kWordBits];
  };

  Dense() = default;
  Dense(const LinearTask& task, int64_t row)
      : columns(task.args.in_features), weight(static_cast<const V*>(task.args.values) + row * columns) {}

  template <bool kWithin>
  MOSAIC_HD void next(Dense& row, int64_t w, Word<kWithin>& word) {
    const int64_t left = row.columns - w * kWordBits;
    word.from = row.weight + w * kWordBits;
    if (left >= kWordBits) return;
    std::memset(word.copy, 0, sizeof word.copy);
    std::memcpy(word.copy, word.from, left * sizeof(V));
    word.from = word.copy;
  }

  struct Ahead {
    Ahead(const LinearTask& task, int64_t row, int64_t count, int64_t distance, int64_t steps)
        : values(at(task.args, row + distance), at(task.args, row + distance + count), steps) {}
    static const V* at(const LinearArgs& a, int64_t row) {
      return static_cast<const V*>(a.values) + (row < a.out_features ? row : a.out_features) * a.in_features;
    }
    void step() { values.step(); }
    void bits_of(int, int64_t) const {}

    Streams values;
  };

  int64_t columns;
  const V* weight;
};

// Multiplies R weight rows, from `row` on, by N rows of x, from `first` on.
template <typename Form, int R, int N, bool kWithin>
void multiply(const LinearTask& task, int64_t row, int64_t first, __m256 (&sums)[N][R]) {
  static_assert(R * N <= 12, "the sums, a weight and its shuffle must fit 16 registers");
  const int64_t words = bitmask_words(task.args.in_features);
  const float* x = static_cast<const float*>(task.x) + first * words * kWordBits;
  Form weight[R];
  for (int r = 0; r < R; ++r) weight[r] = Form(task, row + r);
  typename Form::Ahead ahead(task, row, R, task.rows_ahead, words);

  __m256 sum[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[r][n] = _mm256_setzero_ps();

  for (int64_t w = 0; w < words; ++w, x += N * kWordBits) {
    if (!kWithin) ahead.step();
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      // The loop over weight rows is outside the loop over bytes. The other way round the compiler keeps so
      // many addresses that it spills them, and 4 rows of x took 1.13 times as long. Each weight row loads x
      // again. Loading x once for all of them spilled sums: 4 rows of x took 1.15 times as long, 6 rows 1.2
      // times. (Xeon, Sapphire Rapids class, Dec 2026)
      typename Form::template Word<kWithin> word;
      Form::template next<kWithin>(weight[r], w, word);
      if (!kWithin) ahead.bits_of(r, w);
      const float* own = N > 2 ? as_is(x) : x;
#pragma GCC unroll 4
      for (int q = 0; q < kWordBytes; ++q) {
        const __m256 weights = word.weights(q);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          sum[r][n] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(own + n * kWordBits + q * kLanes), sum[r][n]);
        }
      }
    }
  }

#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[n][r] = sum[r][n];
}

template <typename T, typename Form, int R, int N, bool kWithin>
void multiply_store(const LinearTask& task, int64_t row, int64_t first) {
  __m256 sums[N][R];
  multiply<Form, R, N, kWithin>(task, row, first, sums);
  for (int n = 0; n < N; ++n) store_sums<T>(task, row, first + n, sums[n], R);
}

// If x has at least kPanelRows rows, weights are expanded once for all of them not once for every 6 rows:
//
//     12 weight rows x 256 columns ── expand ──> panel (12 KB) x block of 8 rows of x (8 KB), both in L1
//
// Between two panels the sums are in memory, still as vectors of lanes. Every sum therefore adds the same
// terms in the same order as with one row of x, and has the same bits. 7 rows take 1.3 times as long as 6,
// and 8 as long as 7. Without panels 8 rows took 1.3 times as long, and 16 rows 1.5 times. (4096x4096, half
// kept, bf16, Xeon, Sapphire Rapids class, Dec 2026)
constexpr int64_t kPanelRows = 7;
constexpr int64_t kPanelWeights = 12;
constexpr int64_t kPanelWords = 8;
constexpr int64_t kPanelColumns = kPanelWords * kWordBits;

// Expands `words` words of a weight row, from word `first` on, to `to`.
template <typename Form, bool kWithin>
void expand_words(Form& row, int64_t r, int64_t first, int64_t words, typename Form::Ahead& ahead,
                  float* to) {
  for (int64_t w = first; w < first + words; ++w) {
    typename Form::template Word<kWithin> word;
    Form::template next<kWithin>(row, w, word);
    if (!kWithin) {
      ahead.step();
      ahead.bits_of(static_cast<int>(r), w);
    }
    for (int q = 0; q < kWordBytes; ++q, to += kLanes) _mm256_store_ps(to, word.weights(q));
  }
}

// Multiplies R weight rows of the panel by N rows of x, and adds the products to their sums,
// [row of x][row of the panel][8].
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

// Multiplies weight rows [row, row + count), at most kPanelWeights, by all rows of x. If the panel is not
// full, its other rows are zero; they are multiplied too, and not stored.
template <typename T, typename Form>
void multiply_panel(const LinearTask& task, int64_t row, int64_t count, int64_t guarded, float* panel,
                    float* sums) {
  const LinearArgs& a = task.args;
  const int64_t words = bitmask_words(a.in_features), used = (count + 2) / 3 * 3;
  Form weight[kPanelWeights];
  for (int64_t r = 0; r < count; ++r) weight[r] = Form(task, row + r);
  typename Form::Ahead ahead(task, row, kPanelWeights, kPanelWeights, words * kPanelWeights);
  std::memset(panel, 0, kPanelWeights * kPanelColumns * sizeof(float));
  std::memset(sums, 0, a.rows * kPanelWeights * kLanes * sizeof(float));
  for (int64_t first = 0; first < words; first += kPanelWords) {
    const int64_t here = words - first < kPanelWords ? words - first : kPanelWords;
    for (int64_t r = 0; r < count; ++r) {
      const auto expand_some = row + r < guarded ? expand_words<Form, false> : expand_words<Form, true>;
      expand_some(weight[r], r, first, here, ahead, panel + r * kPanelColumns);
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
        if (rows - n == 3) add(n, Count<3>());
        if (rows - n == 2) add(n, Count<2>());
        if (rows - n == 1) add(n, Count<1>());
      }
    }
  }
  for (int64_t n = 0; n < a.rows; ++n) {
    store_sums<T>(task, row, n, reinterpret_cast<const __m256*>(sums) + n * kPanelWeights,
                  static_cast<int>(count));
  }
}

// Multiplies weight rows [begin, end) by all rows of x, panel by panel. Returns false if memory is short.
template <typename T, typename Form>
bool multiply_panels(const LinearTask& task, int64_t begin, int64_t guarded, int64_t end) {
  constexpr int64_t kPanel = kPanelWeights * kPanelColumns;
  auto* panel = static_cast<float*>(scratch(1, (kPanel + task.args.rows * kPanelWeights * kLanes) * 4));
  if (!panel) return false;
  for (int64_t row = begin; row < end; row += kPanelWeights) {
    const int64_t count = end - row < kPanelWeights ? end - row : kPanelWeights;
    multiply_panel<T, Form>(task, row, count, guarded, panel, panel + kPanel);
  }
  return true;
}

// Multiplies weight rows [begin, end) by all rows of x. Loads must not pass the end of rows from `guarded`
// on.
template <typename T, typename Form>
void multiply_all(const LinearTask& task, int64_t begin, int64_t guarded, int64_t end) {
  if (task.args.rows >= kPanelRows && multiply_panels<T, Form>(task, begin, guarded, end)) return;
  for_each_block(task.args.rows, [&](int64_t first, auto count) {
    constexpr int N = decltype(count)::value;
    constexpr int kRows = N <= 3 ? 4 : N <= 4 ? 3 : N <= 6 ? 2 : 1;
    int64_t row = begin;
    for (; row + kRows <= guarded; row += kRows) multiply_store<T, Form, kRows, N, false>(task, row, first);
    for (; row < guarded; ++row) multiply_store<T, Form, 1, N, false>(task, row, first);
    for (; row < end; ++row) multiply_store<T, Form, 1, N, true>(task, row, first);
  });
}

template <typename T, typename V, bool kGrouped>
bool multiply_packed(const LinearTask& task, int64_t begin, int64_t end) {
  fetch_first_rows(task, begin, end, sizeof(V));
  multiply_all<T, Packed<V, kGrouped>>(task, begin, first_guarded_row(task, begin, end), end);
  return true;
}

}  // namespace

template <typename T>
bool linear(const LinearTask& task, int64_t begin, int64_t end) {
  if (has_turned_rows(task.args)) return linear_tiles<T>(task, begin, end);
  return multiply_packed<T, T, false>(task, begin, end);
}

template <typename T>
bool linear_int8(const LinearTask& task, int64_t begin, int64_t end) {
  if (has_turned_rows(task.args)) return linear_int8_tiles<T>(task, begin, end);
  if (task.args.scale_groups > 1) return multiply_packed<T, int8_t, true>(task, begin, end);
  return multiply_packed<T, int8_t, false>(task, begin, end);
}

template <typename T>
bool linear_dense(const LinearTask& task, int64_t begin, int64_t end) {
  if (has_turned_rows(task.args)) return linear_dense_tiles<T>(task, begin, end);
  multiply_all<T, Dense<T>>(task, begin, end, end);
  return true;
}

#define MOSAIC_INSTANTIATE(T)                                        \
  template bool linear<T>(const LinearTask&, int64_t, int64_t);      \
  template bool linear_int8<T>(const LinearTask&, int64_t, int64_t); \
  template bool linear_dense<T>(const LinearTask&, int64_t, int64_t);
MOSAIC_INSTANTIATE(float)
MOSAIC_INSTANTIATE(BFloat16)
MOSAIC_INSTANTIATE(Half)
#undef MOSAIC_INSTANTIATE

}  // namespace mosaic::MOSAIC_ISA
