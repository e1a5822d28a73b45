// SPDX-License-Identifier: Apache-2.0
// Stores rows of x in the order in which the linear kernels read them. A block of rows is then one stream, so
// rows that are 4 KB apart do not evict each other from L1.
#include "cpu/lanes.h"
#include "cpu/rows.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace mosaic::MOSAIC_ISA {
namespace {

// What the linear kernels of this level multiply by.
template <typename T>
struct Packed {
  using Type = float;
};
#if defined(__AVX512BF16__)
template <>
struct Packed<BFloat16> {
  using Type = BFloat16;
};
#endif

MOSAIC_HD void convert(float from, float* to) { *to = from; }
MOSAIC_HD void convert(BFloat16 from, BFloat16* to) { *to = from; }
MOSAIC_HD void convert(BFloat16 from, float* to) { *to = to_float(from); }
MOSAIC_HD void convert(Half from, float* to) { *to = to_float(from); }

MOSAIC_HD void convert_word(const BFloat16* from, BFloat16* to) {
  std::memcpy(to, from, kWordBits * sizeof *to);
}
// Converts vector by vector, because gcc 12 compiles a plain loop over fp16 to one conversion at a time: 16
// rows of 8192 columns took 62 us in fp16, and 30 us in bf16. (Xeon, Sapphire Rapids class, Dec 2026)
template <typename T>
MOSAIC_HD void convert_word(const T* from, float* to) {
  for (int i = 0; i < kWordBits; i += kLanes) store_lanes(to + i, load_lanes(from + i));
}

}  // namespace

int packed_x_size(DType dtype) {
  return dtype == DType::kBFloat16 ? static_cast<int>(sizeof(Packed<BFloat16>::Type)) : 4;
}

template <typename T>
void pack_x(const void* from, int64_t rows, int64_t in_features, void* packed) {
  using X = typename Packed<T>::Type;
  const int64_t words = bitmask_words(in_features), whole = in_features / kWordBits;
  for (int64_t n = 0; n < rows; ++n) {
    const T* x = static_cast<const T*>(from) + n * in_features;
    X* to = static_cast<X*>(packed) + n * kWordBits;
    for (int64_t w = 0; w < whole; ++w, x += kWordBits, to += rows * kWordBits) {
      convert_word(x, to);
    }
    if (whole == words) continue;
    const int64_t left = in_features - whole * kWordBits;
    std::memset(to, 0, kWordBits * sizeof(X));
    for (int64_t i = 0; i < left; ++i) convert(x[i], to + i);
  }
}

namespace {

// How x rounded to integers is stored. With AVX-512: [group of 64][row of the block][64]; integers of 8 bits
// are unsigned bytes with 128 added, as vpdpbusd needs them. With AVX2: in 16 bits or fp32, in the layout of
// pack_x. Otherwise: in fp32, in the layout of pack_x.
#if defined(__AVX512VNNI__)
constexpr int64_t kColumns = kScaleColumns;
using Int8 = uint8_t;
constexpr int kInt8Offset = 128;
#else
constexpr int64_t kColumns = kWordBits;
using Int8 = int16_t;
constexpr int kInt8Offset = 0;
#endif

// An element smaller than this many steps is less exact than in bf16.
constexpr float kCoarse = 128;

MOSAIC_HD void save(Flags whole, float* to) { store_lanes(to, __builtin_convertvector(whole, Lanes)); }
MOSAIC_HD void save(Flags whole, uint8_t* to) {
  const Bytes bytes = __builtin_convertvector(whole, Bytes);
  std::memcpy(to, &bytes, sizeof bytes);
}
MOSAIC_HD void save(Flags whole, int16_t* to) {
  const auto shorts = __builtin_convertvector(whole, int16_t __attribute__((vector_size(kLanes * 2))));
  std::memcpy(to, &shorts, sizeof shorts);
}

// Rounds rows to integers of at most `limit`, and adds `offset` to each. With kWatched it returns false if
// most elements of a row are less exact than in bf16.
template <typename T, typename Q, bool kWatched>
bool round_rows(const void* from, int limit, int offset, int64_t rows, int64_t in_features, void* packed,
                float* scales) {
  bool even = true;
  const Lanes most = broadcast(static_cast<float>(limit));
  for (int64_t n = 0; n < rows; ++n) {
    const T* x = static_cast<const T*>(from) + n * in_features;
    Lanes largest_each = {}, strange_each = {};
    for (int64_t i = 0; i < in_features; i += kLanes) {
      const Lanes v = absolute(load_first(x + i, in_features - i));
      strange_each += v - v;  // NaN where x holds one, or Inf: then so does the result
      largest_each = v > largest_each ? v : largest_each;
    }
    float largest = 0, strange = 0;
    for (int i = 0; i < kLanes; ++i) {
      strange += strange_each[i];
      largest = largest_each[i] > largest ? largest_each[i] : largest;
    }
    scales[n] = strange == 0 ? largest / static_cast<float>(limit) : strange;
    const bool usable = scales[n] > 0;  // neither zero, nor so small that it became zero, nor NaN
    const Lanes scale = broadcast(usable ? scales[n] : 1);
    Flags some = {}, coarse = {};  // elements that are not zero, counted down
    auto* to = static_cast<Q*>(packed) + n * kColumns;
    for (int64_t first = 0; first < in_features; first += kColumns, to += rows * kColumns) {
      for (int64_t i = first; i < first + kColumns; i += kLanes) {
        const Lanes v = i < in_features && usable ? load_first(x + i, in_features - i) : Lanes{};
        Lanes whole = v / scale;
        whole = whole > most ? most : whole < -most ? -most : whole;  // a denormal scale is a coarse one
        whole = nearest(whole);
        if constexpr (kWatched) {
          some += v != Lanes{};
          coarse += (v != Lanes{}) & (absolute(whole) < kCoarse);
        }
        save(__builtin_convertvector(whole, Flags) + offset, to + (i - first));
      }
    }
    int64_t some_all = 0, coarse_all = 0;
    for (int i = 0; i < kLanes; ++i) {
      some_all -= some[i];
      coarse_all -= coarse[i];
    }
    even &= strange != 0 || 2 * coarse_all <= some_all;
  }
  return even;
}

}  // namespace

XForm x_form(WeightKind kind, const LinearArgs& a) {
#if defined(__AVX512VNNI__)
  const bool whole = true;
#elif defined(__AVX2__)
  const bool whole = a.rows <= kWholeRows;
#else
  const bool whole = false;
#endif
  if (kind == kPackedInt8TimesInt8) return whole ? XForm::kInt8 : XForm::kInt8Float;
  return whole && kind == kPackedInt8 && a.dtype == DType::kBFloat16 ? XForm::kInt16 : XForm::kPlain;
}

int64_t rounded_row_bytes(XForm form, int64_t in_features) {
  const int64_t item = form == XForm::kInt8Float ? 4 : form == XForm::kInt8 ? sizeof(Int8) : 2;
  return (in_features + kColumns - 1) / kColumns * kColumns * item;
}

template <typename T>
bool round_x(const void* from, XForm form, int64_t rows, int64_t in_features, void* packed, float* scales) {
  if (form == XForm::kInt8Float)
    return round_rows<T, float, false>(from, 127, 0, rows, in_features, packed, scales);
  if (form == XForm::kInt8)
    return round_rows<T, Int8, false>(from, 127, kInt8Offset, rows, in_features, packed, scales);
  return round_rows<T, int16_t, true>(from, 32767, 0, rows, in_features, packed, scales);
}

#if defined(__AVX2__)
namespace {

#if defined(__AVX512F__)
constexpr int64_t kTurnSide = 16;

// Transposes up to 16 rows, whose length is a multiple of 64 bytes, in squares of 16 x 16 items of 4 bytes:
// first pairs of rows are interleaved, then pairs of pairs.
void turn_few(const char* from, int64_t row_bytes, int64_t rows, int64_t room, char* to) {
  constexpr int kSide = kTurnSide;
  for (int64_t byte = 0; byte < row_bytes; byte += kSide * 4) {
    __m512i in[kSide], half[kSide];
#pragma GCC unroll 16
    for (int n = 0; n < kSide; ++n) {
      in[n] = n < rows ? _mm512_loadu_si512(from + n * row_bytes + byte) : _mm512_setzero_si512();
    }
#pragma GCC unroll 4
    for (int q = 0; q < 16; q += 4) {
      const __m512i low01 = _mm512_unpacklo_epi32(in[q], in[q + 1]),
                    high01 = _mm512_unpackhi_epi32(in[q], in[q + 1]),
                    low23 = _mm512_unpacklo_epi32(in[q + 2], in[q + 3]),
                    high23 = _mm512_unpackhi_epi32(in[q + 2], in[q + 3]);
      half[q] = _mm512_unpacklo_epi64(low01, low23);
      half[q + 1] = _mm512_unpackhi_epi64(low01, low23);
      half[q + 2] = _mm512_unpacklo_epi64(high01, high23);
      half[q + 3] = _mm512_unpackhi_epi64(high01, high23);
    }
    // half[q + i] holds items i, 4 + i, 8 + i and 12 + i of rows q to q + 3, 4 numbers each.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i a = _mm512_shuffle_i32x4(half[i], half[4 + i], 0x44),
                    b = _mm512_shuffle_i32x4(half[8 + i], half[12 + i], 0x44),
                    c = _mm512_shuffle_i32x4(half[i], half[4 + i], 0xee),
                    d = _mm512_shuffle_i32x4(half[8 + i], half[12 + i], 0xee);
      const auto save = [&](int item, __m512i v) {
        char* at = to + (byte / 4 + item) * room * 4;
        if (room == kSide / 2) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_castsi512_si256(v));
        } else {
          _mm512_storeu_si512(at, v);
        }
      };
      save(i, _mm512_shuffle_i32x4(a, b, 0x88));
      save(4 + i, _mm512_shuffle_i32x4(a, b, 0xdd));
      save(8 + i, _mm512_shuffle_i32x4(c, d, 0x88));
      save(12 + i, _mm512_shuffle_i32x4(c, d, 0xdd));
    }
  }
}
#else
constexpr int64_t kTurnSide = 8;

// Transposes up to 8 rows, whose length is a multiple of 32 bytes, in squares of 8 x 8 items of 4 bytes:
// first pairs of rows are interleaved, then pairs of pairs.
void turn_few(const char* from, int64_t row_bytes, int64_t rows, int64_t room, char* to) {
  constexpr int kSide = kTurnSide;
  for (int64_t byte = 0; byte < row_bytes; byte += kSide * 4) {
    __m256 in[kSide], half[kSide];
#pragma GCC unroll 8
    for (int n = 0; n < kSide; ++n) {
      const auto* row = reinterpret_cast<const float*>(from + n * row_bytes + byte);
      in[n] = n < rows ? _mm256_loadu_ps(row) : _mm256_setzero_ps();
    }
#pragma GCC unroll 2
    for (int q = 0; q < kSide; q += 4) {
      const __m256 low01 = _mm256_unpacklo_ps(in[q], in[q + 1]),
                   high01 = _mm256_unpackhi_ps(in[q], in[q + 1]),
                   low23 = _mm256_unpacklo_ps(in[q + 2], in[q + 3]),
                   high23 = _mm256_unpackhi_ps(in[q + 2], in[q + 3]);
      half[q] = _mm256_shuffle_ps(low01, low23, 0x44);
      half[q + 1] = _mm256_shuffle_ps(low01, low23, 0xee);
      half[q + 2] = _mm256_shuffle_ps(high01, high23, 0x44);
      half[q + 3] = _mm256_shuffle_ps(high01, high23, 0xee);
    }
    // half[q + i] holds items i (lower half) and 4 + i (upper half) of rows q to q + 3.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      auto* at = reinterpret_cast<float*>(to + (byte / 4 + i) * room * 4);
      _mm256_storeu_ps(at, _mm256_permute2f128_ps(half[i], half[4 + i], 0x20));
      _mm256_storeu_ps(at + 4 * room, _mm256_permute2f128_ps(half[i], half[4 + i], 0x31));
    }
  }
}
#endif

}  // namespace

void turn_x(const void* from, int64_t row_bytes, int64_t rows, void* to) {
  for (int64_t tile = 0, room; tile < rows; tile += room) {
    room = turned_rows(rows - tile);
    for (int64_t n = tile; n < tile + room && n < rows; n += kTurnSide) {
      turn_few(static_cast<const char*>(from) + n * row_bytes, row_bytes, rows - n, room,
               static_cast<char*>(to) + tile * row_bytes + (n - tile) * 4);
    }
  }
}
#endif

template bool round_x<float>(const void*, XForm, int64_t, int64_t, void*, float*);
template bool round_x<BFloat16>(const void*, XForm, int64_t, int64_t, void*, float*);
template bool round_x<Half>(const void*, XForm, int64_t, int64_t, void*, float*);

template void pack_x<float>(const void*, int64_t, int64_t, void*);
template void pack_x<BFloat16>(const void*, int64_t, int64_t, void*);
template void pack_x<Half>(const void*, int64_t, int64_t, void*);

}  // namespace mosaic::MOSAIC_ISA
