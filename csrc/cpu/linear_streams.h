// SPDX-License-Identifier: Apache-2.0
// Prefetching into L2, for the kernels with AVX2 and more.
#pragma once

#include <immintrin.h>

#include "cpu/rows.h"

namespace mosaic::MOSAIC_ISA {
namespace {

inline void fetch(const void* line) { _mm_prefetch(static_cast<const char*>(line), _MM_HINT_T1); }

// Prefetches a range of memory into L2 as eight streams side by side. Several streams are faster than one
// because the processor then translates the addresses of several pages of 4 KB at once: two threads read 38
// GB/s with one stream each, 52 with four, 53 with eight. Each line is prefetched once, evenly spread over
// `steps` calls of step(). A prefetch for every word, which is sixteen for a line of bits, took a fifth of
// the time where memory was not the limit. (Zen 4, Nov 2026)
class Streams {
 public:
  Streams(const void* begin, const void* end, int64_t steps = 1)
      : next_(static_cast<const char*>(begin)), length_((static_cast<const char*>(end) - next_) / kStreams) {
    const int64_t lines = (length_ + kLine / 2) / kLine;
    period_ = lines > 0 && lines < steps ? static_cast<int>(steps / lines) : 1;
  }
  void step() {
    if (--wait_ != 0) return;
    wait_ = period_;
    fetch_lines();
  }
  void fetch_all() {
    for (int64_t done = 0; done < length_; done += kLine) fetch_lines();
  }

 private:
  static constexpr int kStreams = 8;
  static constexpr int64_t kLine = 64;

  void fetch_lines() {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) fetch(next_ + s * length_);
    next_ += kLine;
  }

  const char* next_;  // in the first stream
  int64_t length_;
  int period_, wait_ = 1;
};

// Streams for the values of weight rows [begin, end). Rows past the last one count as empty.
inline Streams values_of(const LinearArgs& a, int64_t begin, int64_t end, int64_t value_bytes,
                         int64_t steps = 1) {
  const auto at = [&](int64_t row) {
    return static_cast<const char*>(a.values) +
           a.offsets[row < a.out_features ? row : a.out_features] * value_bytes;
  };
  return {at(begin), at(end), steps};
}

constexpr int64_t kWordsPerLine = 16;

// Prefetches the first rows of a chunk. All later rows are prefetched while earlier ones are computed.
inline void fetch_first_rows(const LinearTask& task, int64_t begin, int64_t end, int64_t value_bytes) {
  const LinearArgs& a = task.args;
  if (begin + task.rows_ahead < end) end = begin + task.rows_ahead;
  const int64_t words = bitmask_words(a.in_features);
  Streams(a.words + begin * words, a.words + end * words).fetch_all();
  values_of(a, begin, end, value_bytes).fetch_all();
}

}  // namespace
}  // namespace mosaic::MOSAIC_ISA
