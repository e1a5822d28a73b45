// SPDX-License-Identifier: Apache-2.0
// Weights times several or many rows of x with AMX: tiles of 16 weight rows times tiles of 16 rows of x.
//
//     16 weight rows ── expand 64 bytes of each ──> a tile of the panel, [16 weight rows][64 bytes]
//     x, transposed by the driver ── 64 bytes of each of 16 rows ──> [16 items of 4 bytes][16 rows of x]
//     tdpbf16ps, tdpbssd: the product of both is added to a tile of sums, [16 weight rows][16 rows of x]
//
// Four tiles of sums (32 weight rows x 32 rows of x) need four loads for four products, so loads must be
// fast. One product took 4.3 ns. One load took 2.5 ns from L1, 5.6 ns from L2 if the tile's cache lines are
// neighbours, and 10 ns if every other line belongs to another tile. Therefore the panel of weights is in L2,
// and a short piece of a tile of x stays in L1 while it is multiplied by all weight rows of the panel. (Xeon,
// Sapphire Rapids class, Dec 2026)
//
// AMX and AVX-512 add in different orders, so their sums differ in the last bits. Which of them computes
// depends on the number of rows of x alone. A row of x therefore gives the same bits in every batch of at
// least kLeastRows rows (with int8 weights: kLeastRowsOfInt8), on any number of threads. Every 32 columns add
// one term to a sum, so a sum over 11008 columns is a chain of 344 additions. tdpbf16ps treats denormal
// numbers as zero, as vdpbf16ps does.
#include "cpu/linear_amx.h"

namespace mosaic::avx512 {
extern const cpu::KernelTable kTable;
}

namespace mosaic::MOSAIC_ISA {

using namespace mosaic::cpu;

namespace {

// The fewest rows of x that AMX multiplies, by weights of bf16 and of int8. Compared with AVX-512, 8 rows
// took 0.83 times as long with bf16 weights and 1.3 times as long with int8 weights; 16 rows took 0.37 and
// 0.55 times as long. (4096 x 4096, 50 % kept, one thread; Xeon, Sapphire Rapids class, Dec 2026)
constexpr int64_t kLeastRows = 8, kLeastRowsOfInt8 = 12;
// A thread gets about this many weight rows at once: two of the larger panels.
constexpr int64_t kChunkRows = 512;
// How far ahead weights are prefetched; linear.cpp has the measurement.
constexpr int64_t kAheadBytes = 1 << 14;
// A panel is expanded once for this many rows of x.
constexpr int64_t kRowsAtOnce = 512;
// Most columns that tdpbssd can add up in int32, which holds 127 x 127 x 2^16. AVX-512 multiplies wider
// weights.
constexpr int64_t kMostWholeColumns = 1 << 16;

// The operands of one call of multiply_block: up to 32 weight rows times up to 32 rows of x.
struct Block {
  const char* weights;   // the first 16 rows in the panel
  int64_t next_weights;  // bytes from these to the next 16 rows
  const char* x;
  int64_t x_items;  // rows of the tile of x
  int64_t steps;
  bool fresh;           // true for the first piece: sums start at zero
  const float* scales;  // with a scale for every 64 columns: that of the first step and row
  int64_t scale_groups, rows;
  float* sums;  // [32][kTurnRows], int32 where Values::kWhole
};

constexpr int64_t kSumsRow = kTurnRows * sizeof(float), kDown = kSide * kSumsRow,
                  kRight = kSide * sizeof(float);

template <int M, int N>
MOSAIC_HD void load_sums(const char* from) {
  load_tile<0>(from, kSumsRow);
  if constexpr (N > 1) load_tile<1>(from + kRight, kSumsRow);
  if constexpr (M > 1) load_tile<2>(from + kDown, kSumsRow);
  if constexpr (M > 1 && N > 1) load_tile<3>(from + kDown + kRight, kSumsRow);
}

template <int M, int N>
MOSAIC_HD void store_sums_to(char* to) {
  store_tile<0>(to, kSumsRow);
  if constexpr (N > 1) store_tile<1>(to + kRight, kSumsRow);
  if constexpr (M > 1) store_tile<2>(to + kDown, kSumsRow);
  if constexpr (M > 1 && N > 1) store_tile<3>(to + kDown + kRight, kSumsRow);
}

MOSAIC_HD void clear_sums() { clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>(); }

template <typename Tiles, int M, int N>
MOSAIC_HD void add_step(const Block& block, int64_t s) {
  const int64_t stride = block.x_items * 4;
  const char* weights = block.weights + s * kTileBytes;
  const char* x = block.x + s * kSide * stride;
  load_tile<6>(x, stride);
  load_tile<4>(weights, kStepBytes);
  Tiles::template add<0, 4, 6>();
  if constexpr (N > 1) {
    load_tile<7>(x + kRight, stride);
    Tiles::template add<1, 4, 7>();
  }
  if constexpr (M > 1) {
    load_tile<5>(weights + block.next_weights, kStepBytes);
    Tiles::template add<2, 5, 6>();
    if constexpr (N > 1) Tiles::template add<3, 5, 7>();
  }
}

template <typename Values, int M, int N>
void add_products(const Block& block) {
  char* sums = reinterpret_cast<char*>(block.sums);
  if (block.fresh) {
    clear_sums();
  } else {
    load_sums<M, N>(sums);
  }
  for (int64_t s = 0; s < block.steps; ++s) add_step<typename Values::Tiles, M, N>(block, s);
  store_sums_to<M, N>(sums);
}

// Like add_products, with a scale for every 64 columns: the integer sums of each step are scaled, then added
// to the sums in fp32. The vector unit does that while the tile unit computes the next step.
template <typename Values, int M, int N>
void add_scaled_products(const Block& block) {
  alignas(64) int32_t found[2][kBlockSums];
  const int64_t rows = block.rows < M * kSide ? block.rows : M * kSide;
  if (block.fresh) std::memset(block.sums, 0, kBlockSums * sizeof(float));
  for (int64_t s = 0; s < block.steps; ++s) {
    clear_sums();
    add_step<typename Values::Tiles, M, N>(block, s);
    const int32_t* from = found[s % 2];
    store_sums_to<M, N>(reinterpret_cast<char*>(found[s % 2]));
    for (int64_t m = 0; m < rows; ++m) {
      const __m512 scale = _mm512_set1_ps(block.scales[m * block.scale_groups + s]);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        const int64_t at = m * kTurnRows + n * kSide;
        const __m512 products = _mm512_cvtepi32_ps(_mm512_load_si512(from + at));
        _mm512_store_ps(block.sums + at, _mm512_fmadd_ps(products, scale, _mm512_load_ps(block.sums + at)));
      }
    }
  }
}

template <typename Values, int M, int N>
void multiply_block(const Block& block) {
  (Values::kScaled ? add_scaled_products<Values, M, N> : add_products<Values, M, N>)(block);
}

// Rounds the sums of 16 weight rows and 16 rows of x to bf16, transposes them and stores them: 16 stores of
// 32 bytes.
void store_tile_of_bf16(const LinearTask& task, const float* sums, int64_t row, int64_t count, int64_t first,
                        int64_t rows) {
  const int64_t out_features = task.args.out_features;
  // Each holds the sums of two weight rows, [16 rows of x][2].
  __m512i pair[8];
  alignas(64) static constexpr uint16_t kPairs[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kPairs);
#pragma GCC unroll 8
  for (int p = 0; p < 8; ++p) {
    const int64_t even = 2 * p < count ? 2 * p : 0, odd = 2 * p + 1 < count ? 2 * p + 1 : 0;
    const __m512 low = finished<BFloat16>(task, sums + even * kTurnRows, row + even, first, rows);
    const __m512 high = finished<BFloat16>(task, sums + odd * kTurnRows, row + odd, first, rows);
    pair[p] = _mm512_permutexvar_epi16(order, Traits<BFloat16>::round(low, high));
  }
  // The i-th 128 bits of each[h][j] hold the sums of weight rows 8 h to 8 h + 7 for row 4 i + j of x.
  __m512i each[2][4];
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const __m512i* p = pair + 4 * h;
    const __m512i low01 = _mm512_unpacklo_epi32(p[0], p[1]), high01 = _mm512_unpackhi_epi32(p[0], p[1]),
                  low23 = _mm512_unpacklo_epi32(p[2], p[3]), high23 = _mm512_unpackhi_epi32(p[2], p[3]);
    each[h][0] = _mm512_unpacklo_epi64(low01, low23);
    each[h][1] = _mm512_unpackhi_epi64(low01, low23);
    each[h][2] = _mm512_unpacklo_epi64(high01, high23);
    each[h][3] = _mm512_unpackhi_epi64(high01, high23);
  }
  const __mmask16 present =
      static_cast<__mmask16>(bits_below(count < 16 ? static_cast<uint32_t>(count) : 16));
  const __m512i first_two = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                last_two = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  auto* to = static_cast<BFloat16*>(task.args.out) + first * out_features + row;
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i two[2] = {_mm512_permutex2var_epi64(each[0][j], first_two, each[1][j]),
                            _mm512_permutex2var_epi64(each[0][j], last_two, each[1][j])};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int64_t n = 4 * i + j;
      if (n >= rows) break;
      const __m256i v = i % 2 ? _mm512_extracti64x4_epi64(two[i / 2], 1) : _mm512_castsi512_si256(two[i / 2]);
      _mm256_mask_storeu_epi16(to + n * out_features, present, v);
    }
  }
}

// Stores the sums of `count` weight rows, from `row` on, and `rows` rows of x, from `first` on, in the
// result.
template <typename T, bool kWhole>
void store_block(const LinearTask& task, float* sums, int64_t row, int64_t count, int64_t first,
                 int64_t rows) {
  for (int64_t n = 0; n < rows && n < kBlock; n += kSide) {
    for (int64_t m = 0; m < count; m += kSide) {
      float* tile = sums + m * kTurnRows + n;
      if constexpr (kWhole) {
        for (int64_t r = 0; r < kSide; ++r) {
          float* at = tile + r * kTurnRows;
          _mm512_store_ps(at, _mm512_cvtepi32_ps(_mm512_load_si512(at)));
        }
      }
      if constexpr (std::is_same_v<T, BFloat16>) {
        store_tile_of_bf16(task, tile, row + m, count - m, first + n, rows - n);
      } else {
        for (int64_t r = 0; r < kSide && m + r < count; r += 4) {
          store_turned<T>(task, tile + r * kTurnRows, row + m + r, count - m - r, first + n, rows - n);
        }
      }
    }
  }
}

// The size of a panel: its weight rows, and the steps (64 bytes of each row) that are expanded at a time.
struct Panel {
  int64_t rows, steps;
};

// The first shape is for a small x, which stays in L2. Its panels have few weight rows and long pieces, so
// that the weights are read as one stream. The second shape is for a large x, which is read from memory again
// for every panel. Its panels have many weight rows and short pieces. Speed relative to torch's F.linear with
// the first shape and the second: 1.6x and 1.2x for 64 rows of x, 0.97x and 1.13x for 256. (4096 x 4096, 50 %
// kept, one thread; Xeon, Sapphire Rapids class, Dec 2026)
Panel panel_for(int64_t x_bytes) {
  constexpr int64_t kSmall = 1 << 20;  // half of L2
  return x_bytes <= kSmall ? Panel{32, 128} : Panel{256, 16};
}

// Scratch memory of one call.
struct Room {
  char* panel;
  float* sums;
  const char** value;
};

template <typename Values>
int64_t steps_of(const LinearArgs& a) {
  return (bitmask_words(a.in_features) + Values::kStepWords - 1) / Values::kStepWords;
}

// Expands a piece of a panel: `steps` steps, from `first` on, of weight rows [begin, end). Meanwhile it
// prefetches the rows that will be expanded `distance` rows later: rows of the same piece, near its end the
// panel's first rows for the next piece, and near the end of the last piece the rows of the next panel.
template <typename Values>
void expand_piece(const LinearArgs& a, int64_t begin, int64_t guarded, int64_t end, int64_t first,
                  int64_t steps, const Panel& panel, const Room& room) {
  const int64_t words = bitmask_words(a.in_features), all = steps_of<Values>(a);
  const int64_t stored = a.offsets ? a.nnz * Values::kValueBytes : a.out_features * a.in_features * 2;
  Ahead ahead = {{}, {}, stored / (a.out_features * all) + 1, Values::kStepWords * 4};
  int64_t distance = kAheadBytes / (ahead.value_bytes * steps) / 4 * 4;
  distance = distance < 4 ? 4 : distance;
  for (int64_t row = begin, some; row < end; row += some) {
    const int64_t r = row - begin;
    for (int64_t i = 0; i < 4; ++i) {
      int64_t later = row + distance + i, from = first;
      if (later >= end && first + steps < all) later -= end - begin, from += steps;
      later = later < a.out_features ? later : row;
      const bool known = later >= begin && later < end;
      ahead.values[i] = known ? room.value[later - begin] : Values::row(a, later);
      ahead.bits[i] = a.words
                          ? reinterpret_cast<const char*>(a.words + later * words + from * Values::kStepWords)
                          : ahead.values[i];
    }
    char* to = room.panel + r / kSide * panel.steps * kTileBytes + r % kSide * kStepBytes;
    some = row + 4 <= guarded && row + 4 <= end ? 4 : 1;
    const auto run = some == 4       ? Values::template expand<4, false>
                     : row < guarded ? Values::template expand<1, false>
                                     : Values::template expand<1, true>;
    run(a, row, first, steps, ahead, room.value + r, to);
  }
}

// Multiplies weight rows [begin, end), all in one panel, by rows [from, to) of x.
template <typename T, typename Values>
void multiply_panel(const LinearTask& task, int64_t begin, int64_t guarded, int64_t end, int64_t from,
                    int64_t to, const Panel& panel, const Room& room) {
  const LinearArgs& a = task.args;
  const int64_t steps = steps_of<Values>(a);
  const int64_t next_tile = panel.steps * kTileBytes;
  for (int64_t row = begin; row < end; ++row) room.value[row - begin] = Values::row(a, row);
  for (int64_t first = 0; first < steps; first += panel.steps) {
    const int64_t some = first + panel.steps < steps ? panel.steps : steps - first;
    expand_piece<Values>(a, begin, guarded, end, first, some, panel, room);
    float* sums = room.sums;
    for (int64_t n = from, items; n < to; n += items) {
      items = turned_rows(a.rows - n);
      if (items < kSide) use_shapes(kNarrowShapes);
      const char* x = static_cast<const char*>(task.x) + (n * steps + first * items) * kStepBytes;
      const char* weights = room.panel;
      for (int64_t row = begin; row < end; row += kBlock, sums += kBlockSums, weights += 2 * next_tile) {
        const int64_t rows = end - row < kBlock ? end - row : kBlock;
        const float* scales = Values::kScaled ? a.scales + row * a.scale_groups + first : nullptr;
        const bool two = rows > kSide;
        (items > kSide ? (two ? multiply_block<Values, 2, 2> : multiply_block<Values, 1, 2>)
                       : (two ? multiply_block<Values, 2, 1> : multiply_block<Values, 1, 1>))(
            {weights, next_tile, x, items, some, first == 0, scales, a.scale_groups, rows, sums});
        if (first + some == steps) store_block<T, Values::kWhole>(task, sums, row, rows, n, a.rows - n);
      }
      if (items < kSide) use_shapes(kShapes);
    }
  }
}

// Multiplies weight rows [begin, end) by all rows of x. Loads must not pass the end of weight rows from
// `guarded` on. Returns false if memory is short.
template <typename T, typename Values>
bool multiply_all_tiles(const LinearTask& task, int64_t begin, int64_t guarded, int64_t end) {
  const LinearArgs& a = task.args;
  Panel panel = panel_for(a.rows * steps_of<Values>(a) * kStepBytes);
  if (panel.steps > steps_of<Values>(a)) panel.steps = steps_of<Values>(a);
  const int64_t at_once = a.rows < kRowsAtOnce ? a.rows : kRowsAtOnce;
  const int64_t panel_bytes = panel.rows * panel.steps * kStepBytes;
  const int64_t sums_bytes =
      (at_once / kTurnRows + 2) * ((panel.rows + kBlock - 1) / kBlock) * kBlockSums * sizeof(float);
  const int64_t value_bytes = panel.rows * sizeof(char*);
  char* memory = static_cast<char*>(scratch(1, panel_bytes + sums_bytes + value_bytes));
  if (!memory) return false;
  const Room room = {memory, reinterpret_cast<float*>(memory + panel_bytes),
                     reinterpret_cast<const char**>(memory + panel_bytes + sums_bytes)};
  use_shapes(kShapes);
  for (int64_t n = 0; n < a.rows; n += at_once) {
    const int64_t to = n + at_once < a.rows ? n + at_once : a.rows;
    for (int64_t row = begin; row < end; row += panel.rows) {
      const int64_t last = row + panel.rows < end ? row + panel.rows : end;
      multiply_panel<T, Values>(task, row, guarded, last, n, to, panel, room);
    }
  }
  release_tiles();
  return true;
}

// True if AMX multiplies these operands, false if AVX-512 does.
bool takes(WeightKind kind, const LinearArgs& a) {
  if (a.rows < (a.scales ? kLeastRowsOfInt8 : kLeastRows) || a.in_features == 0) return false;
  if (kind == kPackedInt8TimesInt8) return a.in_features <= kMostWholeColumns;
  return a.dtype == DType::kBFloat16 && kind != kPackedInt8TimesInt16;
}

// Multiplies with AMX if takes() says so, else with the kernel for AVX-512.
template <WeightKind kind, typename T, typename Values>
bool linear_amx(const LinearTask& task, int64_t begin, int64_t end) {
  if (!takes(kind, task.args))
    return avx512::kTable.linear[kind][static_cast<int>(task.args.dtype)](task, begin, end);
  const int64_t guarded = kind == kDense ? end : first_guarded_row(task, begin, end);
  return multiply_all_tiles<T, Values>(task, begin, guarded, end);
}

template <WeightKind kind, typename T, template <bool> typename Values>
bool linear_int8_amx(const LinearTask& task, int64_t begin, int64_t end) {
  return (task.args.scale_groups > 1 ? linear_amx<kind, T, Values<true>>
                                     : linear_amx<kind, T, Values<false>>)(task, begin, end);
}

bool takes_turned_rows(const LinearArgs& a) {
  return takes(kind_of(a), a) || avx512::kTable.has_turned_rows(a);
}

// The same as with AVX-512, except where AMX multiplies int8 weights: x is not rounded to 16 bits, and x
// rounded to 8 bits is stored as signed bytes.
XForm x_form(WeightKind kind, const LinearArgs& a) {
  if (!takes(kind, a)) return avx512::kTable.x_form(kind, a);
  return kind == kPackedInt8TimesInt8 ? XForm::kSignedInt8 : XForm::kPlain;
}

XForm unsigned_form(XForm form) { return form == XForm::kSignedInt8 ? XForm::kInt8 : form; }

int64_t rounded_row_bytes(XForm form, int64_t in_features) {
  return avx512::kTable.rounded_row_bytes(unsigned_form(form), in_features);
}

template <DType dtype>
bool round_x(const void* x, XForm form, int64_t rows, int64_t in_features, void* packed, float* scales) {
  const auto run = avx512::kTable.round_x[static_cast<int>(dtype)];
  const bool even = run(x, unsigned_form(form), rows, in_features, packed, scales);
  if (form == XForm::kSignedInt8) {  // subtracts the 128 that round_x adds for vpdpbusd
    auto* bytes = static_cast<__m512i*>(packed);
    const int64_t count = rows * rounded_row_bytes(form, in_features) / kStepBytes;
    for (int64_t i = 0; i < count; ++i) {
      _mm512_storeu_si512(bytes + i, _mm512_xor_si512(_mm512_loadu_si512(bytes + i), _mm512_set1_epi8(-128)));
    }
  }
  return even;
}

KernelTable with_amx() {
  KernelTable table = avx512::kTable;
  constexpr int kBf16 = static_cast<int>(DType::kBFloat16);
  table.name = "amx";
  table.linear[kPacked][kBf16] = linear_amx<kPacked, BFloat16, Bf16Values>;
  table.linear[kDense][kBf16] = linear_amx<kDense, BFloat16, DenseBf16>;
  table.linear[kPackedInt8][kBf16] = linear_int8_amx<kPackedInt8, BFloat16, WidenedInt8>;
  table.linear[kPackedInt8TimesInt8][0] = linear_int8_amx<kPackedInt8TimesInt8, float, Int8Values>;
  table.linear[kPackedInt8TimesInt8][1] = linear_int8_amx<kPackedInt8TimesInt8, BFloat16, Int8Values>;
  table.linear[kPackedInt8TimesInt8][2] = linear_int8_amx<kPackedInt8TimesInt8, Half, Int8Values>;
  table.x_form = x_form;
  table.round_x[0] = round_x<DType::kFloat32>;
  table.round_x[1] = round_x<DType::kBFloat16>;
  table.round_x[2] = round_x<DType::kFloat16>;
  table.rounded_row_bytes = rounded_row_bytes;
  table.has_turned_rows = takes_turned_rows;
  table.turn_multiple = kBlock;
  table.turn_chunk = kChunkRows;
  return table;
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable table = with_amx();
  return table;
}

}  // namespace mosaic::MOSAIC_ISA
