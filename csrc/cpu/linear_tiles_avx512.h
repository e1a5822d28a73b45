// SPDX-License-Identifier: Apache-2.0
// Many rows of x with AVX-512: weights are expanded once for all of them, and lanes are rows of x.
//
//     12 weight rows ── expand ──> a group of the panel, [64 bytes of a row][12]; as many groups as fit L2
//     panel: 4 bytes of a row, broadcast ──┐
//     x: the same columns of 32 rows ──────┴─ vdpbf16ps, vpdpbusd, ... ──> 12 x 32 sums in registers
//
// The sum for one output stays in one lane, so nothing is added across lanes, and 24 products need 2 + 12
// loads. 12 x 32 sums, as 8 x 48 and 6 x 64, run at the speed of the products, 3.6 per ns and core, and 12 x
// 32 reads the least from L2; 3 x 8 sums of 16 lanes each came to 2.9, torch's F.linear to 3.0. (256 rows of
// x, 2048 to 11008 columns; Zen 4, Nov 2026)
//
// A kernel adds a Form, which says what is multiplied and where the weights come from:
//
//     struct Form {
//       using Product = ...;                 // below
//       static int64_t steps(const LinearArgs&);   // of 64 bytes in an expanded weight row
//       // R weight rows: step s of row r goes to `to` + s * stride + r * 64. Adds up the whole numbers of
//       // each piece to plain[r * pieces + piece], if Product wants that.
//       template <int R, bool kWithin>       // kWithin: never load past the end of the values
//       static void expand(const LinearTask&, int64_t row, int64_t stride, char* to, int32_t* plain);
//     };
#pragma once

#include "cpu/linear_avx512.h"

namespace mosaic::MOSAIC_ISA {
namespace {

constexpr int64_t kStepBytes = 64;
constexpr int kGroupRows = 12;
constexpr int64_t kPanelBytes = 3 << 17;  // of 1 MB L2; the rest is for a tile of x

// Lanes are rows of x: 16, or 8 where no more are left.
struct Lanes16 {
  using Floats = __m512;
  using Items = __m512i;
  static Items load(const void* from) { return _mm512_loadu_si512(from); }
  static Items spread(int32_t item) { return _mm512_set1_epi32(item); }
  static Floats to_floats(Items whole) { return _mm512_cvtepi32_ps(whole); }
};

struct Lanes8 {
  using Floats = __m256;
  using Items = __m256i;
  static Items load(const void* from) { return _mm256_loadu_si256(static_cast<const Items*>(from)); }
  static Items spread(int32_t item) { return _mm256_set1_epi32(item); }
  static Floats to_floats(Items whole) { return _mm256_cvtepi32_ps(whole); }
};

// A product adds those of 4 bytes of a weight row and the same columns of some rows of x. Sums of whole
// numbers go by the type of floats as well: as __m512i gcc 12 kept them in memory.
struct Bf16Product {
  static constexpr bool kWhole = false;  // numbers, in int32
  template <typename Lanes>
  using Sum = typename Lanes::Floats;

  static __m512 add(__m512 sum, __m512i x, __m512i weights) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)weights);
  }
  static __m256 add(__m256 sum, __m256i x, __m256i weights) {
    return _mm256_dpbf16_ps(sum, (__m256bh)x, (__m256bh)weights);
  }
};

struct FloatProduct {
  static constexpr bool kWhole = false;  // numbers, in int32
  template <typename Lanes>
  using Sum = typename Lanes::Floats;

  static __m512 add(__m512 sum, __m512i x, __m512i weight) {
    return _mm512_fmadd_ps((__m512)x, (__m512)weight, sum);
  }
  static __m256 add(__m256 sum, __m256i x, __m256i weight) {
    return _mm256_fmadd_ps((__m256)x, (__m256)weight, sum);
  }
};

// In how many pieces of how many steps the columns are added up. Sums of whole numbers are exact, and brought
// to fp32 before they overflow, or their scale ends; sums in fp32 lose less in pieces: of 11008 positive
// terms 4e-7, as torch does, and 6e-6 without.
struct Pieces {
  int64_t steps, count;
};

template <typename Product>
Pieces pieces_of(const LinearArgs& a, int64_t steps) {
  int64_t piece = 32;
  if constexpr (Product::kWhole) piece = a.scale_groups > 1 ? Product::kGroupSteps : Product::kMostSteps;
  return {piece, (steps + piece - 1) / piece};
}

// How many sums of its whole numbers an expanded row has.
template <typename Product>
int64_t plain_sums(const LinearArgs& a, int64_t steps) {
  return Product::kWhole ? pieces_of<Product>(a, steps).count : 0;
}

// Adds the products of a group of M weight rows and V lanes of x, `steps` steps of each.
template <typename Product, typename Lanes, int M, int V>
MOSAIC_HD void add_products(const char* weights, const char* x, int64_t steps,
                            typename Product::template Sum<Lanes> (&sum)[M][V]) {
  for (int64_t s = 0; s < steps; ++s, weights += (M - 1) * kStepBytes) {
#pragma GCC unroll 4
    for (int i = 0; i < kStepBytes; i += 4, weights += 4, x += V * sizeof(typename Lanes::Items)) {
      typename Lanes::Items rows[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) rows[v] = Lanes::load(x + v * sizeof rows[v]);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        int32_t few;
        std::memcpy(&few, weights + m * kStepBytes, sizeof few);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[m][v] = Product::add(sum[m][v], rows[v], Lanes::spread(few));
      }
    }
  }
}

// Adds a group of M weight rows, of which `count` are some from `row` on, times V lanes of x to
// sums[M][kTurnRows].
template <typename Product, typename Lanes, int M, int V>
void multiply_tile(const LinearArgs& a, int64_t row, int64_t count, const char* weights, const int32_t* plain,
                   const char* x, int64_t steps, float* sums) {
  const Pieces pieces = pieces_of<Product>(a, steps);
  for (int64_t p = 0; p < pieces.count; ++p) {
    typename Product::template Sum<Lanes> sum[M][V];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        sum[m][v] = typename Product::template Sum<Lanes>{};
        if constexpr (Product::kWhole) sum[m][v] = Lanes::spread(Product::start(plain[m * pieces.count + p]));
      }
    const int64_t first = p * pieces.steps, left = steps - first;
    add_products<Product, Lanes, M, V>(weights + first * M * kStepBytes,
                                       x + first * kStepBytes / 4 * V * sizeof(typename Lanes::Items),
                                       left < pieces.steps ? left : pieces.steps, sum);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const bool scaled = a.scale_groups > 1 && m < count;
      const float scale = Product::kWhole && scaled ? a.scales[(row + m) * pieces.count + p] : 1;
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        auto* to = reinterpret_cast<typename Lanes::Floats*>(sums + m * kTurnRows) + v;
        if constexpr (Product::kWhole) {
          *to += Lanes::to_floats(sum[m][v]) * scale;
        } else {
          *to += sum[m][v];
        }
      }
    }
  }
}

// Sums of weight row `row` and 16 rows of x from `first` on, of which some are `rows`: scales, bias.
template <typename T>
__m512 finished(const LinearTask& task, const float* sums, int64_t row, int64_t first, int64_t rows) {
  const LinearArgs& a = task.args;
  __m512 sum = _mm512_loadu_ps(sums);
  if (task.x_scales) {
    const __mmask16 present =
        static_cast<__mmask16>(bits_below(rows < 16 ? static_cast<uint32_t>(rows) : 16));
    sum = _mm512_mul_ps(sum, _mm512_maskz_loadu_ps(present, task.x_scales + first));
  }
  if (a.scales && a.scale_groups == 1) sum = _mm512_mul_ps(sum, _mm512_set1_ps(a.scales[row]));
  if (a.bias) sum = _mm512_add_ps(sum, _mm512_set1_ps(to_float(static_cast<const T*>(a.bias)[row])));
  return sum;
}

// Weight rows [row, row + count), at most four, and 16 rows of x from `first` on, of which some are `rows`:
// from sums to the result.
template <typename T>
void store_turned(const LinearTask& task, const float* sums, int64_t row, int64_t count, int64_t first,
                  int64_t rows) {
  __m512 four[4];
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m) {
    four[m] = finished<T>(task, sums + m * kTurnRows, m < count ? row + m : row, first, rows);
  }
  const __m512 low01 = _mm512_unpacklo_ps(four[0], four[1]), high01 = _mm512_unpackhi_ps(four[0], four[1]);
  const __m512 low23 = _mm512_unpacklo_ps(four[2], four[3]), high23 = _mm512_unpackhi_ps(four[2], four[3]);
  alignas(64) T turned[4][4][4];  // column 4 i + j is at [j][i]
  Traits<T>::store(turned[0][0], _mm512_shuffle_ps(low01, low23, 0x44));
  Traits<T>::store(turned[1][0], _mm512_shuffle_ps(low01, low23, 0xee));
  Traits<T>::store(turned[2][0], _mm512_shuffle_ps(high01, high23, 0x44));
  Traits<T>::store(turned[3][0], _mm512_shuffle_ps(high01, high23, 0xee));
  T* to = static_cast<T*>(task.args.out) + first * task.args.out_features + row;
  for (int64_t n = 0; n < 16 && n < rows; ++n, to += task.args.out_features) {
    const T* from = turned[n % 4][n / 4];
    if (count >= 4) {
      std::memcpy(to, from, 4 * sizeof(T));
    } else {
      for (int64_t m = 0; m < count; ++m) to[m] = from[m];
    }
  }
}

// Weight rows [row, row + count) from a group of M of the panel, times the tile of x that begins with
// `first`.
template <typename T, typename Product, int M>
void multiply_group(const LinearTask& task, const char* group, const int32_t* plain, int64_t row,
                    int64_t count, int64_t first, int64_t steps) {
  const int64_t rows = task.args.rows - first, tile = turned_rows(rows);
  const char* x = static_cast<const char*>(task.x) + first * steps * kStepBytes;
  alignas(64) float sums[M * kTurnRows] = {};
  (tile == 32   ? multiply_tile<Product, Lanes16, M, 2>
   : tile == 16 ? multiply_tile<Product, Lanes16, M, 1>
                : multiply_tile<Product, Lanes8, M, 1>)(task.args, row, count, group, plain, x, steps, sums);
  for (int64_t n = 0; n < tile && n < rows; n += 16) {
    for (int64_t m = 0; m < count; m += 4) {
      store_turned<T>(task, sums + m * kTurnRows + n, row + m, count - m, first + n, rows - n);
    }
  }
}

// How many rows a group has that holds `count` of the weight.
inline int64_t group_rows(int64_t count) { return count > 8 ? 12 : count > 4 ? 8 : 4; }

// One group: weight rows [row, end), of which those from `guarded` on must not be read past their end; zeros
// where there are none.
template <typename Form>
void expand_group(const LinearTask& task, int64_t row, int64_t guarded, int64_t end, int64_t steps,
                  char* group, int32_t* plain) {
  const int64_t size = group_rows(end - row), stride = size * kStepBytes;
  const int64_t pieces = plain_sums<typename Form::Product>(task.args, steps);
  std::memset(plain, 0, size * pieces * sizeof *plain);
  for (int64_t r = 0, some; r < size; r += some) {
    char* to = group + r * kStepBytes;
    some = row + r + 4 <= guarded && row + r + 4 <= end ? 4 : 1;
    if (some == 4) {
      Form::template expand<4, false>(task, row + r, stride, to, plain + r * pieces);
    } else if (row + r < guarded) {
      Form::template expand<1, false>(task, row + r, stride, to, plain + r * pieces);
    } else if (row + r < end) {
      Form::template expand<1, true>(task, row + r, stride, to, plain + r * pieces);
    } else {
      for (int64_t s = 0; s < steps; ++s) std::memset(to + s * stride, 0, kStepBytes);
    }
  }
}

// Tiles of x against weight rows [begin, end). False where memory is short.
template <typename T, typename Form>
bool multiply_tiles(const LinearTask& task, int64_t begin, int64_t guarded, int64_t end) {
  using Product = typename Form::Product;
  const LinearArgs& a = task.args;
  const int64_t steps = Form::steps(a), row_bytes = steps * kStepBytes;
  const int64_t pieces = plain_sums<Product>(a, steps);
  const int64_t most = kPanelBytes / (kGroupRows * row_bytes + 1);
  int64_t panel_rows = (most > 0 ? most : 1) * kGroupRows;
  if (panel_rows > end - begin) panel_rows = (end - begin + kGroupRows - 1) / kGroupRows * kGroupRows;
  char* panel = static_cast<char*>(scratch(1, panel_rows * (row_bytes + pieces * sizeof(int32_t))));
  if (!panel) return false;
  auto* plain = reinterpret_cast<int32_t*>(panel + panel_rows * row_bytes);
  for (int64_t next; begin < end; begin = next) {
    next = end - begin < panel_rows ? end : begin + panel_rows;
    for (int64_t row = begin; row < next; row += kGroupRows) {
      const int64_t last = next - row < kGroupRows ? next : row + kGroupRows, before = row - begin;
      expand_group<Form>(task, row, guarded, last, steps, panel + before * row_bytes,
                         plain + before * pieces);
    }
    for (int64_t n = 0; n < a.rows; n += turned_rows(a.rows - n)) {
      for (int64_t row = begin; row < next; row += kGroupRows) {
        const int64_t count = next - row < kGroupRows ? next - row : kGroupRows, before = row - begin;
        const auto run = count > 8   ? multiply_group<T, Product, 12>
                         : count > 4 ? multiply_group<T, Product, 8>
                                     : multiply_group<T, Product, 4>;
        run(task, panel + before * row_bytes, plain + before * pieces, row, count, n, steps);
      }
    }
  }
  return true;
}

// The words of a Form for few rows, expanded.
template <typename T, typename Form>
struct Expanded {
  using X = typename Traits<T>::X;
  using Product = std::conditional_t<std::is_same_v<X, float>, FloatProduct, Bf16Product>;
  static constexpr int64_t kWordSteps = kWordBits * sizeof(X) / kStepBytes;

  static int64_t steps(const LinearArgs& a) { return bitmask_words(a.in_features) * kWordSteps; }
  template <int R, bool kWithin>
  static void expand(const LinearTask& task, int64_t row, int64_t stride, char* to, int32_t*) {
    typename Form::template Rows<R, kWithin> weights(task, row);
    const int64_t words = bitmask_words(task.args.in_features);
    for (int64_t w = 0; w < words; ++w, to += kWordSteps * stride) {
      weights.step(w);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) Traits<T>::save(to + r * kStepBytes, stride, weights.next(r, w));
    }
  }
};

// All rows of x against weight rows [begin, end), of which those from `guarded` on must not be read past
// their end. False where memory is short.
template <typename T, typename Form>
bool multiply_all(const LinearTask& task, int64_t begin, int64_t guarded, int64_t end) {
  if (has_turned_rows(task.args)) return multiply_tiles<T, Expanded<T, Form>>(task, begin, guarded, end);
  for_each_block(task.args.rows, [&](int64_t n, auto count) {
    multiply_rows<T, Form, decltype(count)::value, false>(task, begin, guarded, n);
    multiply_rows<T, Form, decltype(count)::value, true>(task, guarded, end, n);
  });
  return true;
}

}  // namespace
}  // namespace mosaic::MOSAIC_ISA
