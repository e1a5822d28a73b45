// SPDX-License-Identifier: Apache-2.0
// Several rows of x and more with AMX: tiles of 16 weight rows times tiles of 16 rows of x.
//
//     16 weight rows ── expand 64 bytes of each ──> a tile of the panel, [16 weight rows][64 bytes]
//     x, turned by the driver ── 64 bytes of each of 16 rows ──> [16 items of 4 bytes][16 rows of x]
//     tdpbf16ps, tdpbssd: the product of both is added to a tile of sums, [16 weight rows][16 rows of x]
//
// Four tiles of sums, for 32 weight rows and 32 rows of x, need four loads for four products. One of the two
// operands has to come from L1: a short piece
// of a tile of x stays there for all weight rows of a panel in L2. (A product took 4.3 ns and a load 2.5 from
// L1, 5.6 from L2, where its lines are neighbours, and 10 where every other one is another tile's; Xeon,
// Sapphire Rapids class, Dec 2026)
//
// Numbers that AMX and AVX-512 add up in another order differ in their last bits, so the number of rows of x
// alone decides who computes: a row of x has the same bits in every batch of kLeastRows rows and more, on any
// number of threads. A chain of sums has one term for 32 columns. tdpbf16ps treats denormal numbers as zero,
// as vdpbf16ps does.
#include <immintrin.h>

#include "cpu/linear_tiles_avx512.h"

namespace mosaic::avx512 {
extern const cpu::KernelTable kTable;
}

namespace mosaic::MOSAIC_ISA {

using namespace mosaic::cpu;

namespace {

// From how many rows of x on: 8 of them took .83 times as long as with AVX-512 and bf16 weights, but 1.3
// times with int8, and 16 .37 and .55 times. (4096 x 4096, 50 % kept, one thread; Xeon, Sapphire Rapids
// class, Dec 2026)
constexpr int64_t kLeastRows = 8, kLeastRowsOfInt8 = 12;
constexpr int64_t kSide = 16;          // rows of a tile
constexpr int64_t kTileBytes = 1024;   // of a full tile
constexpr int64_t kBlock = 2 * kSide;  // rows of weights, and of x, that four tiles of sums are for
constexpr int64_t kBlockSums = kBlock * kTurnRows;
// Memory is asked for this far ahead. (As in linear.cpp)
constexpr int64_t kAheadBytes = 1 << 14;
// Rows of x for which a panel is expanded once.
constexpr int64_t kRowsAtOnce = 512;
// tdpbssd adds up to 127 x 127 x 2^16 in int32; wider weights are left to AVX-512.
constexpr int64_t kMostWholeColumns = 1 << 16;

// The tiles' shapes, as ldtilecfg reads them. Tiles 0 to 3 are sums, 4 and 5 weights, 6 and 7 x.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

constexpr TileShapes shapes_for(int x_rows) {
  TileShapes shapes;
  for (int t = 0; t < 8; ++t) {
    shapes.rows[t] = kSide;
    shapes.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? 64 : 4 * x_rows);
  }
  return shapes;
}

constexpr TileShapes kShapes = shapes_for(16), kNarrowShapes = shapes_for(8);

// gcc's intrinsics tell the compiler neither what they read nor that tiles change.
void use_shapes(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }
void release_tiles() { __asm__ volatile("tilerelease" ::: "memory"); }
template <int kTile>
MOSAIC_HD void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
MOSAIC_HD void store_tile(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
MOSAIC_HD void clear_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

struct Bf16Tiles {
  template <int kSum, int kWeights, int kX>
  MOSAIC_HD void add() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kWeights), "i"(kX));
  }
};

struct Int8Tiles {
  template <int kSum, int kWeights, int kX>
  MOSAIC_HD void add() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kWeights), "i"(kX));
  }
};

// What four weight rows will be read from soon, asked for into L2 while others are expanded.
struct Ahead {
  const char* values[4];
  const char* bits[4];
  int64_t value_bytes;  // of a step, on average
  int64_t bit_bytes;

  void step(int64_t s) const {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) fetch(values[r] + s * value_bytes);
    if (s % 16 != 0) return;
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) fetch(bits[r] + s * bit_bytes);
  }
};

// Where weights come from. expand() takes R of them a few steps of 64 bytes further: row r's next value is at
// value[r], and step s of it goes to `to` + s * kTileBytes + r * 64.
//
// Kept values of bf16.
struct Bf16Values {
  using Tiles = Bf16Tiles;
  static constexpr bool kWhole = false, kScaled = false;
  static constexpr int64_t kStepWords = 1, kValueBytes = 2;

  static const char* row(const LinearArgs& a, int64_t row) {
    return static_cast<const char*>(a.values) + a.offsets[row] * kValueBytes;
  }
  template <int R, bool kWithin>
  static void expand(const LinearArgs& a, int64_t row, int64_t first, int64_t steps, const Ahead& ahead,
                     const char** value, char* to) {
    const int64_t words = bitmask_words(a.in_features);
    const uint32_t* bits = a.words + row * words + first;
    const BFloat16* next[R];
    for (int r = 0; r < R; ++r) next[r] = reinterpret_cast<const BFloat16*>(value[r]);
    for (int64_t s = 0; s < steps; ++s, to += kTileBytes) {
      ahead.step(s);
      const uint32_t* word = as_is(bits + s);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const uint32_t kept = word[r * words];
        _mm512_store_si512(to + r * kStepBytes, kWithin ? Traits<BFloat16>::expand_within(kept, next[r])
                                                        : Traits<BFloat16>::expand(kept, next[r]));
        next[r] += popcount(kept);
      }
    }
    for (int r = 0; r < R; ++r) value[r] = reinterpret_cast<const char*>(next[r]);
  }
};

// Dense rows of bf16. They are copied, because tiles of rows that are a multiple of 4 KB apart evict each
// other.
struct DenseBf16 {
  using Tiles = Bf16Tiles;
  static constexpr bool kWhole = false, kScaled = false;
  static constexpr int64_t kStepWords = 1, kValueBytes = 2;

  static const char* row(const LinearArgs& a, int64_t row) {
    return static_cast<const char*>(a.values) + row * a.in_features * kValueBytes;
  }
  template <int R, bool kWithin>
  static void expand(const LinearArgs& a, int64_t, int64_t first, int64_t steps, const Ahead& ahead,
                     const char** value, char* to) {
    for (int64_t s = 0; s < steps; ++s, to += kTileBytes) {
      ahead.step(s);
      const int64_t left = a.in_features - (first + s) * kWordBits;
      const __mmask32 present = left < kWordBits ? bits_below(static_cast<uint32_t>(left)) : ~0u;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        _mm512_store_si512(to + r * kStepBytes, _mm512_maskz_loadu_epi16(present, value[r] + s * kStepBytes));
      }
    }
    for (int r = 0; r < R; ++r) value[r] += steps * kStepBytes;
  }
};

// Kept values of int8, as bf16, which holds them exactly. With a scale for every 64 columns the weight is
// rounded to bf16, by at most 1/6 of what rounding it to int8 cost.
template <bool kGrouped>
struct WidenedInt8 {
  using Tiles = Bf16Tiles;
  static constexpr bool kWhole = false, kScaled = false;
  static constexpr int64_t kStepWords = 1, kValueBytes = 1;

  static const char* row(const LinearArgs& a, int64_t row) {
    return static_cast<const char*>(a.values) + a.offsets[row];
  }
  template <int R, bool kWithin>
  static void expand(const LinearArgs& a, int64_t row, int64_t first, int64_t steps, const Ahead& ahead,
                     const char** value, char* to) {
    const int64_t words = bitmask_words(a.in_features);
    const uint32_t* bits = a.words + row * words + first;
    const float* scales = a.scales + row * a.scale_groups;
    const char* next[R];
    for (int r = 0; r < R; ++r) next[r] = value[r];
    for (int64_t s = 0; s < steps; ++s, to += kTileBytes) {
      ahead.step(s);
      const uint32_t* word = as_is(bits + s);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const uint32_t kept = word[r * words];
        const __m256i values =
            kWithin ? _mm256_maskz_loadu_epi8(bits_below(popcount(kept)), next[r])
                    : in_register(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(next[r])));
        next[r] += popcount(kept);
        const __m256i bytes = _mm256_maskz_expand_epi8(kept, values);
        __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
        __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
        if (kGrouped) {
          const __m512 scale = _mm512_set1_ps(scales[r * a.scale_groups + (first + s) / 2]);
          low = _mm512_mul_ps(low, scale);
          high = _mm512_mul_ps(high, scale);
        }
        _mm512_store_si512(to + r * kStepBytes, Traits<BFloat16>::round(low, high));
      }
    }
    for (int r = 0; r < R; ++r) value[r] = next[r];
  }
};

// Kept values of int8 as they are, for x rounded to int8.
template <bool kGrouped>
struct Int8Values {
  using Tiles = Int8Tiles;
  static constexpr bool kWhole = !kGrouped;  // sums are whole numbers, in int32
  static constexpr bool kScaled = kGrouped;  // a step's sums are scaled before they are added up
  static constexpr int64_t kStepWords = 2, kValueBytes = 1;

  static const char* row(const LinearArgs& a, int64_t row) {
    return static_cast<const char*>(a.values) + a.offsets[row];
  }
  template <int R, bool kWithin>
  static void expand(const LinearArgs& a, int64_t row, int64_t first, int64_t steps, const Ahead& ahead,
                     const char** value, char* to) {
    const int64_t words = bitmask_words(a.in_features);
    const uint32_t* bits = a.words + row * words + 2 * first;
    const char* next[R];
    for (int r = 0; r < R; ++r) next[r] = value[r];
    for (int64_t s = 0; s < steps; ++s, to += kTileBytes) {
      ahead.step(s);
      const uint32_t* word = as_is(bits + 2 * s);
      const bool whole = 2 * (first + s) + 1 < words;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        uint64_t kept = word[r * words];
        if (whole) std::memcpy(&kept, word + r * words, sizeof kept);
        const int count = __builtin_popcountll(kept);
        const __m512i values =
            kWithin ? _mm512_maskz_loadu_epi8(count < 64 ? (1ull << count) - 1 : ~0ull, next[r])
                    : in_register(_mm512_loadu_si512(next[r]));
        next[r] += count;
        _mm512_store_si512(to + r * kStepBytes, _mm512_maskz_expand_epi8(kept, values));
      }
    }
    for (int r = 0; r < R; ++r) value[r] = next[r];
  }
};

// Up to 32 weight rows times up to 32 rows of x.
struct Block {
  const char* weights;   // of the first 16 rows, in the panel
  int64_t next_weights;  // bytes from there to the next 16
  const char* x;
  int64_t x_items;  // rows of the tile of x
  int64_t steps;
  bool fresh;           // the sums are still zero
  const float* scales;  // with scales for 64 columns: of the first step and row
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

// With a scale for every 64 columns each step's whole numbers are scaled before they are added up. The vector
// unit does that while the tiles' unit computes the next step.
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

// Sums of 16 weight rows and 16 rows of x to bf16, turned: 16 stores of 32 bytes.
void store_tile_of_bf16(const LinearTask& task, const float* sums, int64_t row, int64_t count, int64_t first,
                        int64_t rows) {
  const int64_t out_features = task.args.out_features;
  // Pairs of weight rows, [16 rows of x][2].
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
  // Lane i of each[h][j]: weight rows 8 h to 8 h + 7 of x's row 4 i + j.
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

// Sums of `count` weight rows from `row` on and `rows` rows of x from `first` on to the result.
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

// How many weight rows a panel has, and how many steps of them are expanded at a time.
struct Panel {
  int64_t rows, steps;
};

// With a small x, which stays in L2, few weight rows and long pieces: the weights are read as one stream.
// With a large one many weight rows and short pieces: all of x is read from memory for every panel. Of
// torch's F.linear 64 rows came to 1.6x and 1.2x, 256 rows to .97x and 1.13x. (4096 x 4096, 50 % kept, one
// thread; Xeon, Sapphire Rapids class, Dec 2026)
Panel panel_for(int64_t x_bytes) {
  constexpr int64_t kSmall = 1 << 20;  // half of L2
  return x_bytes <= kSmall ? Panel{32, 128} : Panel{256, 16};
}

// The memory of a call.
struct Room {
  char* panel;
  float* sums;
  const char** value;
};

template <typename Values>
int64_t steps_of(const LinearArgs& a) {
  return (bitmask_words(a.in_features) + Values::kStepWords - 1) / Values::kStepWords;
}

// Weight rows [begin, end) of a panel, a piece of `steps` from `first` on. The rows that follow are asked
// for: those of the panel for this piece, then the first ones for the next piece, and after the last one the
// next panel's.
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

// Weight rows [begin, end), which a panel holds, times rows of x from `from` to `to`.
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

// All rows of x against weight rows [begin, end), of which those from `guarded` on must not be read past
// their end. False where memory is short.
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

bool takes(WeightKind kind, const LinearArgs& a) {
  if (a.rows < (a.scales ? kLeastRowsOfInt8 : kLeastRows) || a.in_features == 0) return false;
  if (kind == kPackedInt8TimesInt8) return a.in_features <= kMostWholeColumns;
  return a.dtype == DType::kBFloat16 && kind != kPackedInt8TimesInt16;
}

using Run = bool (*)(const LinearTask&, int64_t, int64_t);

// A kernel that takes what AMX multiplies, and leaves the rest to AVX-512.
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

Turned turned(WeightKind kind, const LinearArgs& a) {
  return takes(kind, a) ? Turned{kBlock, 1 << 21, false} : avx512::kTable.turned(kind, a);
}

// As AVX-512 does, but for int8 weights with many rows of x, which AMX multiplies as they are, and for x
// rounded to int8, which it takes with a sign.
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
  if (form == XForm::kSignedInt8) {  // takes away the 128 that vpdpbusd wants added
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
  table.turned = turned;
  return table;
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable table = with_amx();
  return table;
}

}  // namespace mosaic::MOSAIC_ISA
