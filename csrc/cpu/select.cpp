// SPDX-License-Identifier: Apache-2.0
// Exact top-k of a matrix, of each row, or of every m neighbours. The k-th largest score is found by
// bisection over the floats' order: a count of 4096 scores in L1 takes about 0.1 us, and some 20 counts
// decide. A matrix is first cut down to a few percent of its scores, between two that a sample suggests.
// 4096x4096 on one thread: matrix 10 ms, rows 18.5 ms; by counting the digits of keys (radix) 40 and 48 (Zen
// 4, Nov 2026).
#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "cpu/table.h"
#include "cpu/thread_pool.h"

namespace mosaic::cpu {
namespace {

constexpr int64_t kChunkScores = 1 << 17;
constexpr int64_t kMaxSlices = 64;
constexpr int64_t kRankGroup = 64;  // larger groups are selected as rows are

// Each of 4 lanes or more counts a slice, or a row, in 32 bits. (A weight of 2^32 has 8 GB in bf16.)
constexpr int64_t kMostScores = int64_t{1} << 32;

constexpr int64_t kPiece = 1024;  // scores that are worked out together: 4 KB, they stay in L1

// A matrix of more scores is sampled: 1024 runs of 32 neighbours, and 1/64 of them to each side of the rank.
// Runs whose scores were all alike would still have the rank within one standard deviation (1/64).
constexpr int64_t kSampled = 1 << 16;
constexpr int64_t kRuns = 1024, kRun = 32;
constexpr int64_t kMargin = kRuns * kRun / 64;
constexpr int64_t kRoomShare = 8;  // room for that part of a slice between the two, 4 times what is expected

constexpr Status kNonFinite = {Code::kNonFinite, ""};  // the border adds the op's message

const Status kNoMemory = {Code::kUnavailable, "select: out of memory"};

// Where scores come from: memory, or a product that is worked out in each of the two passes. For 4096x4096 on
// one thread that adds 5 ms; storing the products takes 40 and more, most of them for fresh pages (Nov 2026).
class Scores {
 public:
  Scores(const SelectArgs& a, const KernelTable& table)
      : args_(a), score_row_(table.score_row[static_cast<int>(a.dtype)]) {}

  bool stored() const { return args_.scores != nullptr; }

  // Scores [begin, begin + count) of one row, in memory or in `buffer`.
  const float* read(int64_t begin, int64_t count, float* buffer) const {
    if (stored()) return args_.scores + begin;
    const auto* weight = static_cast<const char*>(args_.weight) + begin * item_size(args_.dtype);
    score_row_(weight, args_.column_norms + begin % args_.columns, count, buffer);
    return buffer;
  }

  // Calls body(begin, scores, count) for pieces of [begin, end), as long as it returns true. A count is a
  // multiple of `unit` where rows and the range are.
  template <typename Body>
  bool in_pieces(int64_t begin, int64_t end, const Body& body, int64_t unit = 1) const {
    alignas(64) float buffer[kPiece];
    while (begin < end) {
      int64_t count = end - begin;
      if (!stored()) count = std::min({count, kPiece / unit * unit, args_.columns - begin % args_.columns});
      if (!body(begin, read(begin, count, buffer), count)) return false;
      begin += count;
    }
    return true;
  }

 private:
  const SelectArgs& args_;
  void (*score_row_)(const void*, const float*, int64_t, float*);
};

// Where bits are wanted, the marks of a row are bytes only as long as they are in L1: of those that are of
// zeros the bits stay clear, as in pack_bits.
class Bits {
 public:
  Bits(const SelectArgs& a, const KernelTable& table) : args_(a), table_(table) {
    if (wanted()) std::fill(a.offsets, a.offsets + a.rows + 1, 0);
  }

  bool wanted() const { return args_.offsets != nullptr; }  // of an empty mask the address is null, too

  // Room of the calling thread for the marks of a row; nullptr where memory is short.
  uint8_t* row() const { return static_cast<uint8_t*>(scratch(2, args_.columns)); }

  void pack(int64_t r, const uint8_t* marks) const {
    const int item = item_size(args_.dtype);
    args_.offsets[r + 1] =
        table_.pack_bits(item, static_cast<const char*>(args_.weight) + r * args_.columns * item, marks,
                         args_.bitmask + r * bitmask_bytes(args_.columns), args_.columns);
  }

  void add_up() const {
    if (wanted()) std::partial_sum(args_.offsets, args_.offsets + args_.rows + 1, args_.offsets);
  }

 private:
  const SelectArgs& args_;
  const KernelTable& table_;
};

// Keys are in the order of the floats: bits of negative ones are flipped.
uint32_t key_of(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

float score_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float score;
  std::memcpy(&score, &bits, 4);
  return score;
}

// count(score) tells how many scores are at least that one: `keep` or more at `low`, `at_high` < keep at
// `high`.
template <typename Count>
Cut bisect(float low, float high, int64_t at_high, int64_t keep, const Count& count) {
  uint32_t below = key_of(low), above = key_of(high);
  while (above - below > 1) {
    const uint32_t middle = below + (above - below) / 2;
    const int64_t found = count(score_of(middle));
    if (found == keep) return {score_of(middle), 0, 0};
    if (found > keep) {
      below = middle;
    } else {
      above = middle;
      at_high = found;
    }
  }
  return {score_of(above), score_of(below), keep - at_high};
}

constexpr float kInfinity = __builtin_inff();

// One contiguous run of finite scores between two. 0 < keep <= count.
Cut cut_of(const KernelTable& table, const float* scores, int64_t count, int64_t keep, float least,
           float greatest) {
  const float beyond = score_of(key_of(greatest + 0.0f) + 1);
  return bisect(least + 0.0f, beyond, 0, keep,
                [&](float from) { return table.count_from(scores, count, from); });
}

int64_t rows_per_chunk(const SelectArgs& a) {
  return std::max<int64_t>(1, kChunkScores / std::max<int64_t>(1, a.columns));
}

// Every `width` neighbours of a row, a divisor of its columns; one_count: all keep[0], or else keep[row].
Status select_runs(const SelectArgs& a, const Bits& bits, int64_t width, bool one_count) {
  if (width == 0) return {};
  const KernelTable& table = kernels();
  const Scores source(a, table);
  const int64_t step = rows_per_chunk(a);
  std::atomic<bool> finite{true}, memory{true};
  parallel_for(a.threads, (a.rows + step - 1) / step, [&](int64_t c) {
    auto* buffer = source.stored() ? nullptr : static_cast<float*>(scratch(0, width * 4));
    uint8_t* row = bits.wanted() ? bits.row() : nullptr;
    if ((!buffer && !source.stored()) || (!row && bits.wanted())) {
      memory = false;
      return;
    }
    for (int64_t r = c * step; r < std::min(a.rows, (c + 1) * step); ++r) {
      const int64_t keep = a.keep[one_count ? 0 : r];
      for (int64_t first = 0; first < a.columns; first += width) {
        uint8_t* marks = (row ? row : a.mask + r * a.columns) + first;
        const float* scores = source.read(r * a.columns + first, width, buffer);
        float least, greatest;
        if (!table.bounds(scores, width, &least, &greatest)) {
          finite = false;
        } else if (keep == 0) {
          std::memset(marks, 0, width);
        } else {
          table.mark_top(scores, width, cut_of(table, scores, width, keep, least, greatest), marks);
        }
      }
      if (row) bits.pack(r, row);
    }
  });
  if (!memory) return kNoMemory;
  return finite ? Status{} : kNonFinite;
}

// Two scores between which the keep-th largest should be, from a sample that is in no order.
void suggest(const SelectArgs& a, const KernelTable& table, const Scores& source, float* low, float* high) {
  const int64_t count = a.rows * a.columns, stride = count / kRuns;
  *low = -kInfinity;
  *high = kInfinity;
  auto* sample = static_cast<float*>(scratch(1, kRuns * kRun * 4));
  if (!sample) return;
  int64_t taken = 0;
  uint32_t state = 1;
  for (int64_t run = 0; run < kRuns; ++run) {
    state = state * 1664525u + 1013904223u;  // Knuth's: weights have patterns, a fixed stride could meet one
    const int64_t begin = run * stride + (state >> 8) % stride;
    const int64_t n = std::min({kRun, a.columns - begin % a.columns, count - begin});
    float buffer[kRun];
    std::copy_n(source.read(begin, n, buffer), n, sample + taken);
    taken += n;
  }
  float least, greatest;
  if (!table.bounds(sample, taken, &least, &greatest)) return;
  const auto rank = static_cast<int64_t>(static_cast<double>(a.keep[0]) / static_cast<double>(count) * taken);
  const auto at = [&](int64_t keep) { return cut_of(table, sample, taken, keep, least, greatest); };
  if (rank + kMargin < taken) {
    const Cut cut = at(rank + kMargin);
    *low = cut.ties ? cut.tie : cut.from;
  }
  if (rank - kMargin > 0) *high = at(rank - kMargin).from;
}

Status select_matrix(const SelectArgs& a, const Bits& bits) {
  const KernelTable& table = kernels();
  const Scores source(a, table);
  const int64_t count = a.rows * a.columns, keep = std::max<int64_t>(a.keep[0], 1);
  if (count == 0) return {};
  // Slices of bits are of whole rows, so that no two threads write to one byte.
  const int64_t unit = bits.wanted() ? a.columns : 1, units = count / unit;
  const int64_t slices = std::min({kMaxSlices, (count + kChunkScores - 1) / kChunkScores, units});
  const auto first = [&](int64_t s) { return (units / slices * s + std::min(s, units % slices)) * unit; };
  float low = -kInfinity, high = kInfinity;
  if (count > kSampled) suggest(a, table, source, &low, &high);
  const int64_t longest = (units / slices + 1) * unit;
  const int64_t room = ((count > kSampled ? longest / kRoomShare : longest) + 15) / 16 * 16;
  const int64_t spacing = room + kSplitSlack;
  auto* between = static_cast<float*>(scratch(0, slices * spacing * 4));
  if (!between) return kNoMemory;

  Split split[kMaxSlices];
  parallel_for(a.threads, slices, [&](int64_t s) {
    split[s] = {low, high, between + s * spacing, room};
    source.in_pieces(first(s), first(s + 1), [&](int64_t, const float* scores, int64_t n) {
      table.split(scores, n, &split[s]);
      return split[s].finite;
    });
  });
  bool finite = true, complete = true;
  int64_t above = 0, found = 0;
  for (int64_t s = 0; s < slices; ++s) {
    finite &= split[s].finite;
    complete &= split[s].found <= room;
    above += split[s].above;
    found += split[s].found;
  }
  if (!finite) return kNonFinite;
  if (a.keep[0] == 0) {
    if (bits.wanted()) {
      std::memset(a.bitmask, 0, a.rows * bitmask_bytes(a.columns));
    } else {
      std::memset(a.mask, 0, count);
    }
    return {};
  }

  // Scores of a slice that are at least `from`, which lies between low and high; or all over again where the
  // sample misled.
  const bool hit = complete && above < keep && keep <= above + found;
  const auto count_slice = [&](int64_t s, float from) {
    if (hit) return split[s].above + table.count_from(split[s].between, split[s].found, from);
    int64_t sum = 0;
    source.in_pieces(first(s), first(s + 1), [&](int64_t, const float* scores, int64_t n) {
      sum += table.count_from(scores, n, from);
      return true;
    });
    return sum;
  };
  int64_t counts[kMaxSlices];
  const auto count_all = [&](float from) {
    // What lies between is counted in less time than threads need to meet.
    parallel_for(hit ? 1 : a.threads, slices, [&](int64_t s) { counts[s] = count_slice(s, from); });
    return std::accumulate(counts, counts + slices, int64_t{0});
  };
  const Cut cut =
      hit ? bisect(low, high, above, keep, count_all) : bisect(-kInfinity, kInfinity, 0, keep, count_all);

  // A slice's share of the ties follows from how many the slices before it hold.
  int64_t ties[kMaxSlices] = {}, left = cut.ties;
  for (int64_t s = 0; s < slices && left > 0; ++s) {
    ties[s] = std::min(left, count_slice(s, cut.tie) - count_slice(s, cut.from));
    left -= ties[s];
  }
  std::atomic<bool> memory{true};
  parallel_for(a.threads, slices, [&](int64_t s) {
    Cut own = {cut.from, cut.tie, ties[s]};
    const auto mark = [&](int64_t begin, int64_t end, uint8_t* marks) {
      source.in_pieces(begin, end, [&](int64_t at, const float* scores, int64_t n) {
        own.ties = table.mark_top(scores, n, own, marks + (at - begin));
        return true;
      });
    };
    if (!bits.wanted()) return mark(first(s), first(s + 1), a.mask + first(s));
    uint8_t* row = bits.row();
    if (!row) memory = false;
    for (int64_t begin = first(s); row && begin < first(s + 1); begin += a.columns) {
      mark(begin, begin + a.columns, row);
      bits.pack(begin / a.columns, row);
    }
  });
  return memory ? Status{} : kNoMemory;
}

Status select_groups(const SelectArgs& a, const Bits& bits) {
  const int64_t n = a.keep[0], m = a.keep[1];
  if (m > kRankGroup) return select_runs(a, bits, m, true);
  const KernelTable& table = kernels();
  const Scores source(a, table);
  const int64_t step = rows_per_chunk(a);
  std::atomic<bool> finite{true}, memory{true};
  parallel_for(a.threads, (a.rows + step - 1) / step, [&](int64_t c) {
    const auto mark = [&](int64_t begin, int64_t end, uint8_t* marks) {
      const auto marked = [&](int64_t at, const float* scores, int64_t count) {
        return table.mark_groups(scores, count / m, n, m, marks + (at - begin));
      };
      if (!source.in_pieces(begin, end, marked, m)) finite = false;
    };
    const int64_t first = c * step, last = std::min(a.rows, first + step);
    if (!bits.wanted()) return mark(first * a.columns, last * a.columns, a.mask + first * a.columns);
    uint8_t* row = bits.row();
    if (!row) memory = false;
    for (int64_t r = first; row && r < last; ++r) {
      mark(r * a.columns, (r + 1) * a.columns, row);
      bits.pack(r, row);
    }
  });
  if (!memory) return kNoMemory;
  return finite ? Status{} : kNonFinite;
}

Status select_scope(const SelectArgs& a, const Bits& bits) {
  switch (a.scope) {
    case Scope::kMatrix:
      return select_matrix(a, bits);
    case Scope::kRow:
      return select_runs(a, bits, a.columns, false);
    case Scope::kGroup:
      return select_groups(a, bits);
  }
  return invalid("select: unknown scope");
}

}  // namespace

Status select(const SelectArgs& args) {
  if (args.columns > kMostScores || (args.columns > 0 && args.rows > kMostScores / args.columns))
    return invalid("select: more than 2^32 scores; select from parts of the weight");
  const Bits bits(args, kernels());
  const Status status = select_scope(args, bits);
  bits.add_up();
  return status;
}

}  // namespace mosaic::cpu
