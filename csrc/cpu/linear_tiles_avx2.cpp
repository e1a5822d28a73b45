// SPDX-License-Identifier: Apache-2.0
// Weights times many rows of x with AVX2. Weights are expanded to fp32 once for all rows of x, and the lanes
// of a register are rows of x.
//
//     some weight rows x 256 columns ── expand ──> panel, groups of 12 rows, [16 columns of each row] in turn
//     panel: one weight, broadcast ─────────────┐
//     x: the same column of 16 rows, transposed ┴─ 12 multiply-adds ──> 6 x 16 sums in registers
//
// The sum for one output stays in one lane, so nothing is added across lanes, and 12 multiply-adds need 8
// loads. A tile of 16 rows of x is multiplied by half a group at a time (6 weight rows), a tile of 8 rows by
// a whole group (12 weight rows). Either way 12 registers of sums are in use, and none waits for another. 256
// columns of a tile (16 KB) and of half a group (6 KB) stay in L1.
//
// Weights of any dtype are multiplied in fp32, because processors of this level have no products of bf16 or
// fp16. Each piece of 256 columns has its own sum, which is then added to the sums of the pieces before it.
// That is more exact than one long sum, and integers are added up without any error: 256 products of up to
// 127 x 127 stay below 2^24.
#include "cpu/linear_avx2.h"
#include "cpu/thread_pool.h"

namespace mosaic::MOSAIC_ISA {
namespace {

constexpr int kGroupRows = 12;
constexpr int64_t kStep = 16;  // columns of a weight row that lie side by side in the panel
constexpr int64_t kPieceColumns = 256;
constexpr int64_t kGroupFloats = kGroupRows * kPieceColumns;
constexpr int64_t kPanelRows = 96;  // a panel of 96 KB, in L2: the smallest are 256 KB
constexpr int64_t kTileRows = 16;   // of x, at most

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Where column c of a panel's row is stored; c is a multiple of kStep.
float* at_column(float* row, int64_t c) { return row + c * kGroupRows; }

// Prefetches memory that the next piece reads, while this one is multiplied.
inline void fetch_lines(const void* begin, const void* end) {
  constexpr uintptr_t kLine = 64;
  const auto first = reinterpret_cast<uintptr_t>(begin) / kLine * kLine;
  for (uintptr_t line = first; line < reinterpret_cast<uintptr_t>(end); line += kLine) {
    fetch(reinterpret_cast<const void*>(line));
  }
}

// Reads a packed weight row from left to right. kGrouped: values have a scale for every 64 columns.
template <typename V, bool kGrouped>
class PackedRow {
 public:
  PackedRow() = default;
  PackedRow(const LinearTask& task, int64_t row)
      : bits_(task.args.words + row * bitmask_words(task.args.in_features)),
        value_(static_cast<const V*>(task.args.values) + task.args.offsets[row]),
        scales_(kGrouped ? task.args.scales + row * task.args.scale_groups : nullptr),
        within_(task.args.offsets[row + 1] >= task.fast_values) {}

  // Expands the next `columns` columns of the row, rounded up to a multiple of 32.
  void expand_to(float* panel, int64_t columns) {
    const V* before = value_;
    within_ ? expand_words<true>(panel, columns) : expand_words<false>(panel, columns);
    last_ = value_ - before;
  }

  void fetch_next() const {
    fetch_lines(value_, value_ + last_);
    fetch_lines(bits_, bits_ + kPieceColumns / kWordBits);
  }

 private:
  template <bool kWithin>  // never load past the end of the values
  void expand_words(float* panel, int64_t columns) {
    for (int64_t c = 0; c < columns; c += kWordBits) {
      const uint32_t word = *bits_++;
      V copy[kWithin ? kWordBits + kLanes : 1];
      const V* from = value_;
      if (kWithin) {
        std::memcpy(copy, from, popcount(word) * sizeof(V));
        from = copy;
      }
      float* to = at_column(panel, c);
      const __m256 scale = _mm256_set1_ps(kGrouped ? scales_[c / kScaleColumns] : 1);
#pragma GCC unroll 4
      for (int q = 0; q < kWordBits; q += kLanes) {
        const __m256 weights = expand(word, q / kLanes, from + values_before(word, q / kLanes));
        _mm256_store_ps(to + q / kStep * kStep * kGroupRows + q % kStep,
                        kGrouped ? _mm256_mul_ps(weights, scale) : weights);
      }
      value_ += popcount(word);
    }
    if (kGrouped) scales_ += columns / kScaleColumns;
  }

  const uint32_t* bits_;
  const V* value_;
  const float* scales_;
  int64_t last_;  // how many values the last piece had
  bool within_;
};

// Reads a dense weight row from left to right.
template <typename T>
class DenseRow {
 public:
  DenseRow() = default;
  DenseRow(const LinearTask& task, int64_t row)
      : next_(static_cast<const T*>(task.args.values) + row * task.args.in_features),
        left_(task.args.in_features) {}

  void expand_to(float* panel, int64_t columns) {
    int64_t c = 0;
    for (; c < columns && left_ >= kStep; c += kStep, next_ += kStep, left_ -= kStep) {
      float* to = at_column(panel, c);
      store_lanes(to, load_lanes(next_));
      store_lanes(to + kLanes, load_lanes(next_ + kLanes));
    }
    for (; c < columns; c += kStep) {
      T last[kStep] = {};
      std::memcpy(last, next_, left_ * sizeof(T));
      left_ = 0;
      store_lanes(at_column(panel, c), load_lanes(last));
      store_lanes(at_column(panel, c) + kLanes, load_lanes(last + kLanes));
    }
  }

  void fetch_next() const { fetch_lines(next_, next_ + least(left_, kPieceColumns)); }

 private:
  const T* next_;
  int64_t left_;
};

// Multiplies `columns` columns of M weight rows of the panel by those of V vectors of rows of x. Stores the
// products in sums[M][V] if kFirst (the first piece), else adds them to the sums of the pieces before.
template <int M, int V, bool kFirst>
void multiply_tile(const float* weights, const float* x, int64_t columns, float* sums) {
  static_assert(M * V + V + 1 <= 16, "the sums, those of x and a weight must fit 16 registers");
  __m256 sum[M][V];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[m][v] = _mm256_setzero_ps();
  for (int64_t c = 0; c < columns; c += kStep, weights += (kGroupRows - 1) * kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < kStep; ++i, ++weights, x += V * kLanes) {
      __m256 rows[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) rows[v] = _mm256_load_ps(x + v * kLanes);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const __m256 weight = _mm256_broadcast_ss(weights + m * kStep);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[m][v] = _mm256_fmadd_ps(rows[v], weight, sum[m][v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* to = sums + (m * V + v) * kLanes;
      _mm256_store_ps(to, kFirst ? sum[m][v] : _mm256_add_ps(_mm256_load_ps(to), sum[m][v]));
    }
}

// Multiplies a group, of which `count` weight rows are used, by a tile of x.
template <bool kFirst>
void multiply_group(const float* group, int64_t count, const float* x, int64_t tile, int64_t columns,
                    float* sums) {
  constexpr int kHalf = kGroupRows / 2;
  if (tile == kLanes) {
    (count > kHalf ? multiply_tile<kGroupRows, 1, kFirst> : multiply_tile<kHalf, 1, kFirst>)(group, x,
                                                                                             columns, sums);
    return;
  }
  for (int64_t r = 0; r < count; r += kHalf) {
    multiply_tile<kHalf, 2, kFirst>(group + r * kStep, x, columns, sums + r * tile);
  }
}

// Applies scales and bias to the sums of weight row `row` and eight rows of x, from `first` on, of which the
// first `rows` exist.
template <typename T>
__m256 finished(const LinearTask& task, const float* sums, int64_t row, int64_t first, int64_t rows) {
  const LinearArgs& a = task.args;
  __m256 sum = _mm256_load_ps(sums);
  if (task.x_scales) sum = _mm256_mul_ps(sum, load_first(task.x_scales + first, rows));
  if (a.scales && a.scale_groups == 1) sum = _mm256_mul_ps(sum, _mm256_set1_ps(a.scales[row]));
  if (a.bias) sum = _mm256_add_ps(sum, _mm256_set1_ps(to_float(static_cast<const T*>(a.bias)[row])));
  return sum;
}

// Finishes the sums of weight rows [row, row + count), at most four, and of eight rows of x, from `first` on,
// of which the first `rows` exist; transposes them and stores them in the result. `tile` is the distance
// between the sums of two weight rows.
template <typename T>
void store_turned(const LinearTask& task, const float* sums, int64_t tile, int64_t row, int64_t count,
                  int64_t first, int64_t rows) {
  __m256 four[4];
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m) {
    four[m] = m < count ? finished<T>(task, sums + m * tile, row + m, first, rows) : _mm256_setzero_ps();
  }
  const __m256 low01 = _mm256_unpacklo_ps(four[0], four[1]), high01 = _mm256_unpackhi_ps(four[0], four[1]);
  const __m256 low23 = _mm256_unpacklo_ps(four[2], four[3]), high23 = _mm256_unpackhi_ps(four[2], four[3]);
  alignas(32) T turned[4][2][4];  // [j][i] holds row 4 i + j of x
  store_lanes(turned[0][0], _mm256_shuffle_ps(low01, low23, 0x44));
  store_lanes(turned[1][0], _mm256_shuffle_ps(low01, low23, 0xee));
  store_lanes(turned[2][0], _mm256_shuffle_ps(high01, high23, 0x44));
  store_lanes(turned[3][0], _mm256_shuffle_ps(high01, high23, 0xee));
  T* to = static_cast<T*>(task.args.out) + first * task.args.out_features + row;
  for (int64_t n = 0; n < kLanes && n < rows; ++n, to += task.args.out_features) {
    const T* from = turned[n % 4][n / 4];
    if (count >= 4) {
      std::memcpy(to, from, 4 * sizeof(T));
    } else {
      for (int64_t m = 0; m < count; ++m) to[m] = from[m];
    }
  }
}

// Multiplies weight rows [begin, end), at most kPanelRows, by all rows of x. `panel` and `all_sums` are
// scratch memory; all_sums holds the sums between two pieces, [tile of x][weight row][row of the tile].
template <typename T, typename Row>
void multiply_panel(const LinearTask& task, int64_t begin, int64_t end, float* panel, float* all_sums) {
  const LinearArgs& a = task.args;
  const int64_t columns = bitmask_words(a.in_features) * kWordBits;
  const int64_t groups = (end - begin + kGroupRows - 1) / kGroupRows, panel_rows = groups * kGroupRows;
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows;
  Row rows[kPanelRows];
  for (int64_t row = begin; row < end; ++row) rows[row - begin] = Row(task, row);
  for (int64_t c = 0; c == 0 || c < columns; c += kPieceColumns) {  // runs once if there are no columns
    const int64_t here = least(kPieceColumns, columns - c);
    for (int64_t r = 0; r < end - begin; ++r) {
      rows[r].expand_to(panel + r / kGroupRows * kGroupFloats + r % kGroupRows * kStep, here);
    }
    int64_t fetched = 0, done = 0;
    for (int64_t n = 0, tile; n < a.rows; n += tile) {
      tile = turned_rows(a.rows - n);
      const float* x = static_cast<const float*>(task.x) + n * columns + c * tile;
      for (int64_t row = begin; row < end; row += kGroupRows) {
        const int64_t count = least(kGroupRows, end - row);
        ++done;
        for (; fetched * tiles * groups < done * (end - begin); ++fetched) rows[fetched].fetch_next();
        const float* group = panel + (row - begin) * kPieceColumns;
        float* sums = all_sums + n * panel_rows + (row - begin) * tile;
        (c == 0 ? multiply_group<true> : multiply_group<false>)(group, count, x, tile, here, sums);
        if (c + kPieceColumns < columns) continue;
        for (int64_t i = n; i < n + tile && i < a.rows; i += kLanes) {
          for (int64_t m = 0; m < count; m += 4) {
            store_turned<T>(task, sums + m * tile + (i - n), tile, row + m, count - m, i, a.rows - i);
          }
        }
      }
    }
  }
}

// Multiplies weight rows [begin, end) by all rows of x, panel by panel. Returns false if memory is short.
template <typename T, typename Row>
bool multiply_tiles(const LinearTask& task, int64_t begin, int64_t end) {
  const int64_t panel_rows = least(kPanelRows, (end - begin + kGroupRows - 1) / kGroupRows * kGroupRows);
  const int64_t panel = panel_rows * kPieceColumns,
                x_rows = (task.args.rows + kTileRows - 1) / kTileRows * kTileRows;
  auto* room = static_cast<float*>(scratch(1, (panel + panel_rows * x_rows) * sizeof(float)));
  if (!room) return false;
  // If a panel is not full, its last rows are multiplied like the others and not stored.
  std::memset(room, 0, panel * sizeof(float));
  for (int64_t row = begin; row < end; row += kPanelRows) {
    multiply_panel<T, Row>(task, row, least(end, row + kPanelRows), room, room + panel);
  }
  return true;
}

}  // namespace

template <typename T>
bool linear_tiles(const LinearTask& task, int64_t begin, int64_t end) {
  return multiply_tiles<T, PackedRow<T, false>>(task, begin, end);
}

template <typename T>
bool linear_int8_tiles(const LinearTask& task, int64_t begin, int64_t end) {
  return (task.args.scale_groups > 1 ? multiply_tiles<T, PackedRow<int8_t, true>>
                                     : multiply_tiles<T, PackedRow<int8_t, false>>)(task, begin, end);
}

template <typename T>
bool linear_dense_tiles(const LinearTask& task, int64_t begin, int64_t end) {
  return multiply_tiles<T, DenseRow<T>>(task, begin, end);
}

#define MOSAIC_INSTANTIATE(T)                                              \
  template bool linear_tiles<T>(const LinearTask&, int64_t, int64_t);      \
  template bool linear_int8_tiles<T>(const LinearTask&, int64_t, int64_t); \
  template bool linear_dense_tiles<T>(const LinearTask&, int64_t, int64_t);
MOSAIC_INSTANTIATE(float)
MOSAIC_INSTANTIATE(BFloat16)
MOSAIC_INSTANTIATE(Half)
#undef MOSAIC_INSTANTIATE

}  // namespace mosaic::MOSAIC_ISA
