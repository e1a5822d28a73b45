// SPDX-License-Identifier: Apache-2.0
// Attention of one token: query heads that share a key head, over a piece of its tokens. Keys and values are
// read once for up to kMostHeads of them.
//
//   turn      keys of kBlock tokens to lanes that are tokens: no score is a sum over lanes
//   score     one element of kBlock keys, in two registers, times that element of each head's query
//   weigh     e^(score - the greatest), and their sum
//   add       a token's value, in two registers, times its weight for each head; sums stay in registers
//
// Where heads share much it is bound by the products (32 heads of 64 over 4: 22 ns for a token of a key head
// from L2, 34 from memory), where they share nothing by memory (15 GB/s of some 20; bf16, one thread, Zen 4,
// Nov 2026).
#include <type_traits>
#include <utility>

#include "cpu/lanes.h"
#include "cpu/rows.h"

namespace mosaic::MOSAIC_ISA {
namespace {

constexpr int kBlock = 2 * kLanes;  // tokens of one register tile of scores
#if defined(__AVX512F__)
constexpr int kMostHeads = 8;  // two registers of sums for each: half of what there is
#else
constexpr int kMostHeads = 4;
#endif
constexpr int64_t kValueTokens = 64;  // whose values stay in L1 until all columns are added
static_assert(attend_room(1) >= kBlock + kMostHeads);
static_assert(kAttendTokens % kBlock == 0 && kAttendTokens % kValueTokens == 0);

// What a query and a key are multiplied by: numbers as fp32, one a lane.
template <typename T>
struct Element {
  static constexpr int kNumbers = 1;
  static Lanes load(const T* from) { return load_lanes(from); }
  static Lanes load_few(const T* from, int64_t count) { return load_first(from, count); }
  static Lanes add_product(Lanes sum, Lanes key, const float* query) { return sum + key * broadcast(*query); }
};

#if defined(__AVX512BF16__)
// Two a lane, as they are (subnormal ones count as zero).
template <>
struct Element<BFloat16> {
  static constexpr int kNumbers = 2;
  static Lanes load(const BFloat16* from) { return load_lanes(reinterpret_cast<const float*>(from)); }
  static Lanes load_few(const BFloat16* from, int64_t count) {
    return load_first(reinterpret_cast<const float*>(from), count);
  }
  static Lanes add_product(Lanes sum, Lanes key, const float* query) {
    int32_t pair;
    std::memcpy(&pair, query, 4);
    return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)key, (__m512bh)_mm512_set1_epi32(pair));
  }
};
#endif

// To L2: keys a block ahead; values while keys are scored, and the next piece's keys while values are added.
// The processor's own prefetching alone, which starts anew with every page, took 1.5 times as long, with a
// distance in one stream alone 1.2 times (2048 tokens of 32 heads over 4, Zen 4, Nov 2026).
MOSAIC_HD void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

// Calls body with the constant `count`, one of 1 to kMost.
template <int kMost, typename Body>
MOSAIC_HD void with_constant(int64_t count, const Body& body) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_constant<kMost - 1>(count, body);
  }
  body(std::integral_constant<int, kMost>());
}

// Exchanges two halves of each 2 kSpan lanes with those of the row kSpan further on.
template <int kSpan, int... kLane>
MOSAIC_HD void exchange(Lanes& a, Lanes& b, std::integer_sequence<int, kLane...>) {
  const Lanes low = __builtin_shuffle(a, b, Flags{(kLane & kSpan ? kLanes + kLane - kSpan : kLane)...});
  b = __builtin_shuffle(a, b, Flags{(kLane & kSpan ? kLanes + kLane : kLane + kSpan)...});
  a = low;
}

// Lane i of row j to lane j of row i.
template <int kSpan = kLanes / 2>
MOSAIC_HD void turn(Lanes* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & kSpan)) exchange<kSpan>(rows[i], rows[i + kSpan], std::make_integer_sequence<int, kLanes>());
  }
  if constexpr (kSpan > 1) turn<kSpan / 2>(rows);
}

// Where the lanes begin that hold element i: the last ones hold some of those before once more.
int64_t lanes_at(int64_t i, int64_t elements) {
  return i + kLanes <= elements || elements < kLanes ? i : elements - kLanes;
}

// kBlock keys to [elements][kBlock] floats. Unless kWhole they may be fewer, the last of which stands for
// those that are missing, and elements fewer than lanes.
template <typename T, bool kWhole>
void turn_keys(const T* keys, int64_t stride, int64_t tokens, int64_t elements, const T* next,
               int64_t next_stride, float* turned) {
  using E = Element<T>;
  for (int64_t first = 0; first < elements; first += kLanes) {
    const int64_t at = lanes_at(first, elements);
    const T* from = keys + at * E::kNumbers;
    for (int64_t half = 0; half < kBlock && (kWhole || half < tokens); half += kLanes) {
      Lanes rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        prefetch(from + kBlock * stride);
        prefetch(next + (half + i) * next_stride + at * E::kNumbers);
        rows[i] = kWhole || elements >= kLanes ? E::load(from) : E::load_few(from, elements);
        if (kWhole || half + i + 1 < tokens) from += stride;
      }
      turn(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (kWhole || at + i < elements) store_lanes(turned + (at + i) * kBlock + half, rows[i]);
      }
    }
  }
}

template <typename T, int kHeads>
void score(const float* turned, const float* queries, int64_t elements, float scaling, float* scores) {
  Lanes sums[kHeads][2] = {};
  for (int64_t e = 0; e < elements; ++e) {
    const Lanes low = load_lanes(turned + e * kBlock), high = load_lanes(turned + e * kBlock + kLanes);
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
      const float* query = queries + h * elements + e;
      sums[h][0] = Element<T>::add_product(sums[h][0], low, query);
      sums[h][1] = Element<T>::add_product(sums[h][1], high, query);
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    store_lanes(scores + h * kAttendTokens, sums[h][0] * scaling);
    store_lanes(scores + h * kAttendTokens + kLanes, sums[h][1] * scaling);
  }
}

// Scores of one head to weights; those of tokens that are not seen to zero. What is no number becomes a
// weight that is none.
void weigh(float* scores, const int32_t* seen, int64_t tokens, float* most, float* total) {
  Lanes greatest = Lanes{} - __builtin_inff();
  for (int64_t t = 0; t < tokens; t += kLanes) {
    Flags here;
    std::memcpy(&here, seen + t, sizeof here);
    const Lanes score = here ? load_lanes(scores + t) : Lanes{} - __builtin_inff();
    store_lanes(scores + t, score);
    greatest = score > greatest ? score : greatest;
  }
  *most = greatest[0];
  for (int i = 1; i < kLanes; ++i) *most = greatest[i] > *most ? greatest[i] : *most;
  const float base = *most == -__builtin_inff() ? 0 : *most;  // nothing is attended to: all weights are zero
  Lanes sum = {};
  for (int64_t t = 0; t < tokens; t += kLanes) {
    const Lanes score = load_lanes(scores + t) - base;
    const Lanes weight = score < -87.0f ? Lanes{} : exponential(score);
    store_lanes(scores + t, weight);
    sum += weight;
  }
  *total = sum_of_lanes(sum);
}

// sums [kHeads, sum_stride] += weights . values, of kParts registers of columns.
template <typename T, int kHeads, int kParts>
void add_values(const T* values, int64_t stride, int64_t tokens, int64_t columns, const T* next,
                int64_t next_stride, const float* weights, float* sums, int64_t sum_stride) {
  Lanes held[kHeads][kParts];
  for (int h = 0; h < kHeads; ++h) {
    for (int p = 0; p < kParts; ++p) held[h][p] = load_lanes(sums + h * sum_stride + p * kLanes);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    Lanes value[kParts];
    for (int p = 0; p < kParts; ++p) {
      const T* from = values + t * stride + p * kLanes;
      prefetch(next + t * next_stride + p * kLanes);
      value[p] = columns < kLanes ? load_first(from, columns) : load_lanes(from);
    }
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
      const Lanes weight = broadcast(weights[h * kAttendTokens + t]);
      for (int p = 0; p < kParts; ++p) held[h][p] += weight * value[p];
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int p = 0; p < kParts; ++p) store_lanes(sums + h * sum_stride + p * kLanes, held[h][p]);
  }
}

template <typename T, int kHeads>
void attend_heads(const AttendArgs& a, const int32_t* seen, int64_t head) {
  using E = Element<T>;
  const int64_t elements = a.dim / E::kNumbers, row = attend_floats(a.dim);
  float *turned = a.room, *queries = turned + elements * kBlock, *found = a.found + head * row;
  alignas(64) float weights[kHeads * kAttendTokens];
  const T *query = static_cast<const T*>(a.query) + head * a.dim, *values = static_cast<const T*>(a.values);
  if constexpr (E::kNumbers == 1) {
    for (int64_t i = 0; i < kHeads * a.dim; ++i) queries[i] = to_float(query[i]);
  } else {
    std::memcpy(queries, query, kHeads * elements * sizeof(float));
  }
  for (int64_t t = 0; t < a.tokens; t += kBlock) {
    const auto turn_block =
        a.tokens - t >= kBlock && elements >= kLanes ? turn_keys<T, true> : turn_keys<T, false>;
    turn_block(static_cast<const T*>(a.keys) + t * a.key_stride, a.key_stride, a.tokens - t, elements,
               values + t * a.value_stride, a.value_stride, turned);
    score<T, kHeads>(turned, queries, elements, a.scaling, weights + t);
  }
  for (int h = 0; h < kHeads; ++h) {
    weigh(weights + h * kAttendTokens, seen, a.tokens, found + h * row, found + h * row + 1);
  }
  float* sums = found + kAttendHeader;
  for (int h = 0; h < kHeads; ++h) std::memset(sums + h * row, 0, (row - kAttendHeader) * sizeof(float));
  for (int64_t t = 0; t < a.tokens; t += kValueTokens) {
    const int64_t count = a.tokens - t < kValueTokens ? a.tokens - t : kValueTokens;
    const auto add = [&](auto function, int64_t i) {
      const int64_t at = lanes_at(i, a.dim);
      function(values + t * a.value_stride + at, a.value_stride, count, a.dim,
               static_cast<const T*>(a.next_keys) + t * a.key_stride + at, a.key_stride, weights + t,
               sums + i, row);
    };
    int64_t i = 0;
    for (; i + 2 * kLanes <= a.dim; i += 2 * kLanes) add(add_values<T, kHeads, 2>, i);
    for (; i < a.dim; i += kLanes) add(add_values<T, kHeads, 1>, i);
  }
}

}  // namespace

template <typename T>
void attend(const AttendArgs& a) {
  int32_t seen[kAttendTokens], any = 0;
  for (int64_t t = 0; t < kAttendTokens; ++t) seen[t] = 0;
  for (int64_t t = 0; t < a.tokens; ++t) any |= seen[t] = a.mask && !a.mask[t] ? 0 : -1;
  if (!any) {
    const int64_t row = attend_floats(a.dim);
    std::memset(a.found, 0, a.heads * row * sizeof(float));
    for (int64_t h = 0; h < a.heads; ++h) a.found[h * row] = -__builtin_inff();
    return;
  }
  for (int64_t head = 0; head < a.heads; head += kMostHeads) {
    with_constant<kMostHeads>(a.heads - head, [&](auto count) { attend_heads<T, count()>(a, seen, head); });
  }
}

template <typename T>
void attend_join(float* found, int64_t pieces, int64_t stride, int64_t heads, int64_t dim, void* out) {
  for (int64_t h = 0; h < heads; ++h, found += attend_floats(dim)) {
    float most = -__builtin_inff(), total = 0;
    for (int64_t p = 0; p < pieces; ++p) most = found[p * stride] > most ? found[p * stride] : most;
    for (int64_t p = 0; p < pieces; ++p) {
      float& share = found[p * stride];  // the greatest of a piece, and now what its sums are multiplied by
      share = share == -__builtin_inff() ? 0 : __builtin_expf(share - most);
      total += share * found[p * stride + 1];
    }
    const float scale = total == 0 ? 0 : 1 / total;
    for (int64_t i = 0; i < dim; i += kLanes) {
      Lanes sum = {};
      for (int64_t p = 0; p < pieces; ++p) {
        sum += load_lanes(found + p * stride + kAttendHeader + i) * found[p * stride];
      }
      const int64_t at = lanes_at(i, dim);
      store_first(static_cast<T*>(out) + h * dim + at, sum * scale, dim - at);
    }
  }
}

#define MOSAIC_INSTANTIATE(T)                 \
  template void attend<T>(const AttendArgs&); \
  template void attend_join<T>(float*, int64_t, int64_t, int64_t, int64_t, void*);
MOSAIC_INSTANTIATE(float)
MOSAIC_INSTANTIATE(BFloat16)
MOSAIC_INSTANTIATE(Half)
#undef MOSAIC_INSTANTIATE

}  // namespace mosaic::MOSAIC_ISA
