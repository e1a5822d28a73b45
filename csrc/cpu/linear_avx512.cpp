// SPDX-License-Identifier: Apache-2.0
// Row bitmap times activations with AVX-512 (VBMI2 and BF16).
//
// Up to four rows of x are bound by reading the weight, more by the dot products: one cycle per 32
// weights and row of x. A word of 32 columns goes
//
//     bits ── popcount ──> where the next word's values begin
//     64 bytes of values ── vpexpandw with the bits ──> 32 weights, zeros in place
//                        ── vdpbf16ps with 32 of x ──> 16 fp32 sums
//
// A block of R weight rows and N rows of x keeps R * N sums in registers and reads x, interleaved as
// [word][N][32] by the driver, in one stream. Every sum is built the same way whatever R and N are, so
// a row of x gives the same bits alone and in a batch, on one thread and on many.
#include "cpu/linear_avx512.h"

namespace mosaic::MOSAIC_ISA {
namespace {

// Kept values and bits. Near the end of the values a word is read without passing its last one.
template <typename T>
struct Packed {
  template <int R, bool kWithin>
  struct Rows {
    // The values and bits R rows on are asked for at the pace of this block, into L2: 20 GB/s on one core,
    // where a fixed 3 KB ahead into L1 reached 13 to 17; without the bits a tenth less (4096x11008 and
    // 11008x4096, Zen 4, Nov 2026).
    Rows(const LinearArgs& a, int64_t row)
        : words(bitmask_words(a.in_features)), bits(a.words + row * words) {
      for (int r = 0; r < R; ++r) {
        const int64_t next_block = row + R + r < a.out_features ? row + R + r : a.out_features;
        value[r] = static_cast<const T*>(a.values) + a.offsets[row + r];
        ahead[r] = a.offsets[next_block] - a.offsets[row + r];
      }
    }
    typename Traits<T>::Word next(int r, int64_t w) {
      const uint32_t word = bits[r * words + w];
      const T* from = value[r];
      value[r] += popcount(word);
      if (kWithin) return Traits<T>::expand_within(word, from);
      _mm_prefetch(reinterpret_cast<const char*>(from + ahead[r]), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(bits + (R + r) * words + w), _MM_HINT_T1);
      return Traits<T>::expand(word, from);
    }

    int64_t words;
    const uint32_t* bits;
    const T* value[R];
    int64_t ahead[R];
  };
};

// A dense row: torch's F.linear reads one at half the speed of memory.
template <typename T>
struct Dense {
  template <int R, bool kWithin>
  struct Rows {
    Rows(const LinearArgs& a, int64_t row)
        : columns(a.in_features), weight(static_cast<const T*>(a.values) + row * columns) {}
    typename Traits<T>::Word next(int r, int64_t w) const {
      const T* from = weight + r * columns + w * kWordBits;
      const int64_t left = columns - w * kWordBits;
      if (left < kWordBits) return Traits<T>::load_some(from, bits_below(static_cast<uint32_t>(left)));
      _mm_prefetch(reinterpret_cast<const char*>(from + R * columns), _MM_HINT_T1);
      return Traits<T>::load_some(from, ~0u);
    }

    int64_t columns;
    const T* weight;
  };
};

}  // namespace

template <typename T>
void linear(const LinearTask& task, int64_t begin, int64_t end) {
  multiply_all<T, Packed<T>>(task, begin, first_guarded_row(task, begin, end), end);
}

template <typename T>
void linear_dense(const LinearTask& task, int64_t begin, int64_t end) {
  multiply_all<T, Dense<T>>(task, begin, end, end);
}

#define MOSAIC_INSTANTIATE(T)                                   \
  template void linear<T>(const LinearTask&, int64_t, int64_t); \
  template void linear_dense<T>(const LinearTask&, int64_t, int64_t);
MOSAIC_INSTANTIATE(float)
MOSAIC_INSTANTIATE(BFloat16)
MOSAIC_INSTANTIATE(Half)
#undef MOSAIC_INSTANTIATE

}  // namespace mosaic::MOSAIC_ISA
