// SPDX-License-Identifier: Apache-2.0
// Shares the rows of one or several weights out over threads, in chunks of equal nnz.
#include <algorithm>
#include <atomic>

#include "cpu/table.h"
#include "cpu/thread_pool.h"

namespace mosaic::cpu {
namespace {

// Less than this many multiply-adds run on the caller: waking a worker takes 5-50 us.
constexpr int64_t kInlineWork = 1 << 17;
// Chunks per thread: enough that a worker that woke late still evens out, few enough to stay streams.
constexpr int64_t kChunksPerThread = 8;
constexpr int64_t kMinChunkWork = 1 << 15;
// Several blocks of rows of x read the same chunk of weights one after another, so a chunk should fit in L2.
constexpr int64_t kCachedBytes = 1 << 18;
// The number of weight rows in a chunk is a multiple of what a kernel takes at once: 4 for up to 6 rows of x,
// and 3, 4 or 12 for more. Kernels that take 12 take fewer at the end of a chunk. Multiples of 12 for any
// number of rows of x would give two threads 120 and 136 of 256 weight rows.
constexpr int64_t kFewRows = 6, kFewMultiple = 4, kRowMultiple = 12;
// Weights are prefetched this far ahead, and at least one block of rows ahead. On a loaded machine one thread
// gets no more than this in the time that memory takes to answer. With a distance of one block, rows of 2048
// and 1536 columns, 30 % kept, took 1.04 to 1.12 times as long; rows of 4096 columns took the same time. (Zen
// 4, Nov 2026)
constexpr int64_t kAheadBytes = 1 << 14;
constexpr int64_t kMostRowsAhead = 64, kBlockRows = 4;
constexpr int64_t kLoadBytes = 64;
constexpr int64_t kInlinePacking = 1 << 16;  // elements of x that the caller interleaves alone

constexpr int64_t kMaxParts = 8;

// Threads share the rows of x instead of the weights if there are at most kOutputsPerRow outputs for each row
// of x, and if the tiles of x divide evenly enough. 256 outputs, 2048 columns and 256 rows of x took 0.76 ms
// in every process when threads shared rows. When they shared weights it took 0.77 ms, or 1.11 ms if the two
// cores were far apart (torch: 0.76 ms). With 4096 outputs both ways took the same time. (Zen 4, Nov 2026)
constexpr int64_t kOutputsPerRow = 4, kEvenTiles = 8;

const Status kShortOfMemory = {Code::kUnavailable, "sparse_linear: out of memory"};

// What a weight costs to read: its words as well as its values.
int64_t weights_of(const LinearArgs& a) {
  return a.offsets ? a.nnz + a.out_features * bitmask_words(a.in_features) : a.out_features * a.in_features;
}

// The first row of chunk c when a weight is cut into `chunks` equal parts, a multiple of the most rows
// that a kernel takes at once.
int64_t first_row(const LinearArgs& a, int64_t c, int64_t chunks) {
  if (c <= 0) return 0;
  if (c >= chunks) return a.out_features;
  const int64_t target = weights_of(a) / chunks * c;
  const int64_t words = bitmask_words(a.in_features);
  int64_t low = 0, high = a.out_features;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const int64_t before = a.offsets ? a.offsets[middle] + middle * words : middle * a.in_features;
    if (before < target) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const KernelTable& table = kernels();
  const int64_t multiple = table.has_turned_rows(a) ? table.turn_multiple
                           : a.rows <= kFewRows     ? kFewMultiple
                                                    : kRowMultiple;
  return low / multiple * multiple;
}

struct Part {
  LinearTask task;
  bool (*run)(const LinearTask&, int64_t begin, int64_t end);
  int64_t chunks;
};

int64_t value_bytes(const LinearArgs& a) { return a.scales ? 1 : item_size(a.dtype); }

int64_t rows_ahead(const LinearArgs& a) {
  const int64_t bytes = a.offsets ? a.nnz * value_bytes(a) + a.out_features * bitmask_words(a.in_features) * 4
                                  : a.out_features * a.in_features * value_bytes(a);
  const int64_t row = bytes / a.out_features + 1;
  return std::clamp((kAheadBytes + row / 2) / row, kBlockRows, kMostRowsAhead);
}

int64_t chunks_of(const LinearArgs& a) {
  const int64_t work = weights_of(a) * a.rows, threads = work <= kInlineWork ? 1 : std::max(a.threads, 1);
  const KernelTable& table = kernels();
  const int64_t turn_chunk = table.has_turned_rows(a) ? table.turn_chunk : 0;
  if (a.rows <= kRowBlock && turn_chunk == 0) {
    return threads == 1 ? 1 : std::min(threads * kChunksPerThread, work / kMinChunkWork);
  }
  const int64_t least =
      turn_chunk ? (a.out_features - 1) / turn_chunk : weights_of(a) * value_bytes(a) / kCachedBytes;
  // As few chunks as possible, because every chunk reads all of x, and a multiple of the number of threads:
  // with 17 chunks one of two threads would be idle for a ninth of the time.
  return (least / threads + 1) * threads;
}

const char* contradiction(const LinearArgs& a, const LinearArgs& first) {
  if (a.scales && a.scale_groups != 1 && a.scale_groups != scale_groups_of(a.in_features))
    return "int8 values have one scale per row, or one per row and 64 columns";
  if (a.x != first.x || a.rows != first.rows || a.in_features != first.in_features ||
      a.dtype != first.dtype || kernels().x_form(kind_of(a), a) != kernels().x_form(kind_of(first), first) ||
      kernels().has_turned_rows(a) != kernels().has_turned_rows(first))
    return "weights of one dispatch must take the same x, rounded alike";
  return nullptr;
}

// Brings x into the layout that the kernels read: interleaved, rounded to integers, transposed. `form`
// becomes the form that x has in the end. Returns false if memory is short.
bool prepare_x(const KernelTable& table, const LinearArgs& a, XForm* form, LinearTask* task) {
  const int kind = static_cast<int>(a.dtype);
  const int64_t padded = bitmask_words(a.in_features) * kWordBits;
  const bool whole = *form != XForm::kPlain, turned = table.has_turned_rows(a);
  const int x_size = table.packed_x_size(a.dtype);
  task->x = a.x;
  task->x_scales = nullptr;
  const bool as_it_is = !whole && padded == a.in_features && x_size == item_size(a.dtype);
  if (as_it_is && a.rows == 1) return true;
  const int64_t row_bytes = whole ? table.rounded_row_bytes(*form, a.in_features) : padded * x_size;
  const int64_t room = turned ? (a.rows + kTurnRows - 1) / kTurnRows * kTurnRows : a.rows;
  auto* packed = static_cast<char*>(scratch(0, room * row_bytes));
  float* scales = whole ? static_cast<float*>(scratch(2, a.rows * sizeof(float))) : nullptr;
  if (!packed || (whole && !scales)) return false;
  std::atomic<bool> even{true}, enough{true};
  const auto convert = [&](int64_t n, int64_t count, char* to) {
    const char* from = static_cast<const char*>(a.x) + n * a.in_features * item_size(a.dtype);
    if (!whole) {
      table.pack_x[kind](from, count, a.in_features, to);
    } else if (!table.round_x[kind](from, *form, count, a.in_features, to, scales + n)) {
      even = false;
    }
  };
  const int64_t block = turned ? kTurnRows : kRowBlock;
  const int threads = a.rows * padded > kInlinePacking ? a.threads : 1;
  parallel_for(threads, (a.rows + block - 1) / block, [&](int64_t b) {
    const int64_t n = b * block, count = std::min(block, a.rows - n);
    if (!turned) return convert(n, count, packed + n * row_bytes);
    const char* rows = static_cast<const char*>(a.x) + n * row_bytes;
    if (!as_it_is) {
      auto* each = static_cast<char*>(scratch(3, kTurnRows * row_bytes));
      if (!each) {
        enough = false;
        return;
      }
      for (int64_t i = 0; i < count; ++i) convert(n + i, 1, each + i * row_bytes);
      rows = each;
    }
    table.turn_x(rows, row_bytes, count, packed + n * row_bytes);
  });
  if (!enough) return false;
  if (*form == XForm::kInt16 && !even) {
    *form = XForm::kPlain;
    return prepare_x(table, a, form, task);
  }
  task->x = packed;
  task->x_scales = scales;
  return true;
}

// Threads share the weights: each multiplies some weight rows by all rows of x.
Status by_weights(const LinearArgs* args, int64_t count) {
  const KernelTable& table = kernels();
  Part parts[kMaxParts];
  LinearTask shared{};
  XForm form = XForm::kPlain;
  int64_t used = 0, chunks = 0, work = 0;
  for (int64_t i = 0; i < count; ++i) {
    const LinearArgs& a = args[i];
    if (a.offsets && a.offsets[a.out_features] != a.nnz) {
      return invalid("offsets end at another number of values than are stored");
    }
    if (a.rows == 0 || a.out_features == 0) continue;  // empty: null scales would make int8 look float
    if (const char* problem = contradiction(a, used ? parts[0].task.args : a)) return invalid(problem);
    if (used == 0) {
      form = table.x_form(kind_of(a), a);
      if (!prepare_x(table, a, &form, &shared)) return kShortOfMemory;
    }
    const WeightKind kind = form == XForm::kInt16       ? kPackedInt8TimesInt16
                            : form == XForm::kInt8Float ? kPackedInt8
                                                        : kind_of(a);
    const auto run = table.linear[kind][static_cast<int>(a.dtype)];
    if (!run) return {Code::kUnavailable, "this processor has no kernel for dense weights"};
    const int64_t fast_values = std::max<int64_t>(0, a.nnz - kLoadBytes / value_bytes(a) + 1);
    parts[used] = {{a, shared.x, fast_values, rows_ahead(a), shared.x_scales}, run, chunks_of(a)};
    chunks += parts[used++].chunks;
    work += weights_of(a) * a.rows;
  }
  if (used == 0) return {};
  std::atomic<bool> enough{true};
  parallel_for(work > kInlineWork ? args[0].threads : 1, chunks, [&](int64_t c) {
    const Part* part = parts;
    for (; c >= part->chunks; ++part) c -= part->chunks;
    const LinearArgs& a = part->task.args;
    const int64_t begin = first_row(a, c, part->chunks), end = first_row(a, c + 1, part->chunks);
    if (begin < end && !part->run(part->task, begin, end)) enough = false;
  });
  return enough ? Status{} : kShortOfMemory;
}

// The first row of x of thread t, where threads share the rows of x.
int64_t rows_before(const LinearArgs& a, int64_t t) {
  const int64_t tiles = (a.rows + kTurnRows - 1) / kTurnRows;
  return std::min(a.rows, tiles * t / a.threads * kTurnRows);
}

// True if threads should share the rows of x rather than the weights. Then no thread reads rows that another
// has just transposed, but each thread expands all weights.
bool shares_rows(const LinearArgs* args, int64_t count) {
  const LinearArgs& first = args[0];
  const int64_t tiles = (first.rows + kTurnRows - 1) / kTurnRows;
  if (first.threads < 2 || tiles < first.threads) return false;
  if (tiles % first.threads != 0 && tiles < kEvenTiles * first.threads) return false;
  int64_t outputs = 0, work = 0;
  for (int64_t i = 0; i < count; ++i) {
    // All rows of x together decide whether x is rounded to 16 bits, so the rows of one thread must not.
    if (kernels().x_form(kind_of(args[i]), args[i]) == XForm::kInt16) return false;
    LinearArgs last = args[i];
    last.rows -= rows_before(first, first.threads - 1);
    // The last thread has too few rows for tiles, so its sums would be built in another order than those of
    // the others; or the weights do not belong together, which by_weights reports.
    if (!kernels().has_turned_rows(last) || args[i].rows != first.rows) return false;
    outputs += args[i].out_features;
    work += weights_of(args[i]) * first.rows;
  }
  return work > kInlineWork && outputs <= kOutputsPerRow * first.rows;
}

// Threads share the rows of x: each multiplies all weights by some rows.
Status by_rows(const LinearArgs* args, int64_t count) {
  std::atomic<bool> failed{false};
  Status failure;
  parallel_for(args[0].threads, args[0].threads, [&](int64_t t) {
    const int64_t begin = rows_before(args[0], t), end = rows_before(args[0], t + 1);
    LinearArgs some[kMaxParts];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t item = item_size(args[i].dtype);
      some[i] = args[i];
      some[i].x = static_cast<const char*>(args[i].x) + begin * args[i].in_features * item;
      some[i].out = static_cast<char*>(args[i].out) + begin * args[i].out_features * item;
      some[i].rows = end - begin;
      some[i].threads = 1;
    }
    const Status status = by_weights(some, count);
    if (!status.ok() && !failed.exchange(true)) failure = status;
  });
  return failure;
}

}  // namespace

Status sparse_linear_group(const LinearArgs* args, int64_t count) {
  if (count > kMaxParts) return invalid("at most 8 weights in one dispatch");
  return count > 0 && shares_rows(args, count) ? by_rows(args, count) : by_weights(args, count);
}

Status sparse_linear(const LinearArgs& args) { return sparse_linear_group(&args, 1); }

}  // namespace mosaic::cpu
