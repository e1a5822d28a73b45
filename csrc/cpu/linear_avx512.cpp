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
// a row of x gives the same bits alone and in a batch, on one thread and on many. From 24 rows on
// it is built another way, linear_tiles_avx512.h, and again the same for every row.
#include "cpu/linear_tiles_avx512.h"

namespace mosaic::MOSAIC_ISA {
namespace {

// Kept values and bits. Near the end of the values a word is read without passing its last one.
template <typename T>
struct Packed {
  template <int R, bool kWithin>
  struct Rows {
    // Asking into L1 instead of L2 lost 4096x11008 and 11008x4096 a third. (Zen 4, Nov 2026)
    Rows(const LinearTask& task, int64_t row)
        : words(bitmask_words(task.args.in_features)),
          distance(task.rows_ahead * words),
          bits(task.args.words + row * words),
          ahead(values_of(task.args, row + task.rows_ahead, row + task.rows_ahead + R, sizeof(T), words)) {
      const LinearArgs& a = task.args;
      for (int r = 0; r < R; ++r) value[r] = static_cast<const T*>(a.values) + a.offsets[row + r];
    }
    void step(int64_t w) {
      word = as_is(bits + w);
      if (kWithin) return;
      ahead.step();
      if (w % kWordsPerLine == 0) {
        for (int r = 0; r < R; ++r) fetch(word + distance + r * words);
      }
    }
    typename Traits<T>::Word next(int r, int64_t) {
      const uint32_t kept = word[r * words];
      const T* from = value[r];
      value[r] += popcount(kept);
      if (kWithin) return Traits<T>::expand_within(kept, from);
      return Traits<T>::expand(kept, from);
    }

    int64_t words, distance;
    const uint32_t* bits;
    const uint32_t* word;
    const T* value[R];
    Streams ahead;
  };
};

// A dense row: torch's F.linear reads one at half the speed of memory.
template <typename T>
struct Dense {
  template <int R, bool kWithin>
  struct Rows {
    Rows(const LinearTask& task, int64_t row)
        : columns(task.args.in_features), weight(static_cast<const T*>(task.args.values) + row * columns) {}
    void step(int64_t) const {}
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
bool linear(const LinearTask& task, int64_t begin, int64_t end) {
  fetch_first_rows(task, begin, end, sizeof(T));
  return multiply_all<T, Packed<T>>(task, begin, first_guarded_row(task, begin, end), end);
}

template <typename T>
bool linear_dense(const LinearTask& task, int64_t begin, int64_t end) {
  return multiply_all<T, Dense<T>>(task, begin, end, end);
}

#define MOSAIC_INSTANTIATE(T)                                   \
  template bool linear<T>(const LinearTask&, int64_t, int64_t); \
  template bool linear_dense<T>(const LinearTask&, int64_t, int64_t);
MOSAIC_INSTANTIATE(float)
MOSAIC_INSTANTIATE(BFloat16)
MOSAIC_INSTANTIATE(Half)
#undef MOSAIC_INSTANTIATE

}  // namespace mosaic::MOSAIC_ISA
