// SPDX-License-Identifier: Apache-2.0
// Shares the rows of a sparse weight out over threads, in chunks of equal nnz.
#include <algorithm>

#include "cpu/table.h"
#include "cpu/thread_pool.h"

namespace mosaic::cpu {
namespace {

// Less than this many multiply-adds run on the caller: waking a worker takes 5-50 us.
constexpr int64_t kInlineWork = 1 << 17;
// Chunks per thread: enough that a worker that woke late still evens out, few enough to stay streams.
constexpr int64_t kChunksPerThread = 8;
constexpr int64_t kMinChunkWork = 1 << 15;
// Several blocks of rows read a chunk of weights one after the other: it should stay in L2 meanwhile.
constexpr int64_t kCachedBytes = 1 << 18;
constexpr int64_t kRowMultiple = 12;
constexpr int64_t kLoadBytes = 64;
constexpr int64_t kInlinePacking = 1 << 16;  // elements of x that the caller interleaves alone

// The first row of chunk c when the nnz are cut into `chunks` equal parts, a multiple of the most rows
// that a kernel takes at once.
int64_t first_row(const LinearArgs& a, int64_t c, int64_t chunks) {
  if (c <= 0) return 0;
  if (c >= chunks) return a.out_features;
  // A row costs its words as well as its values, hence the second term.
  const int64_t words = bitmask_words(a.in_features);
  const int64_t total = a.nnz + a.out_features * words;
  const int64_t target = total / chunks * c;
  int64_t low = 0, high = a.out_features;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (a.offsets[middle] + middle * words < target) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low / kRowMultiple * kRowMultiple;
}

}  // namespace

Status sparse_linear(const LinearArgs& args) {
  if (args.offsets[args.out_features] != args.nnz) {
    return invalid("offsets end at another number of values than are stored");
  }
  if (args.rows == 0 || args.out_features == 0) return {};
  const KernelTable& table = kernels();
  const int kind = static_cast<int>(args.dtype);
  LinearTask task{args, args.x, std::max<int64_t>(0, args.nnz - kLoadBytes / item_size(args.dtype) + 1)};
  const int64_t padded = bitmask_words(args.in_features) * kWordBits;
  const int x_size = table.packed_x_size(args.dtype);
  if (args.rows > 1 || padded != args.in_features || x_size != item_size(args.dtype)) {
    auto* packed = static_cast<char*>(scratch(0, args.rows * padded * x_size));
    if (!packed) return {Code::kUnavailable, "sparse_linear: out of memory"};
    const int threads = args.rows * padded > kInlinePacking ? args.threads : 1;
    parallel_for(threads, (args.rows + kRowBlock - 1) / kRowBlock, [&](int64_t b) {
      const int64_t n = b * kRowBlock;
      table.pack_x[kind](static_cast<const char*>(args.x) + n * args.in_features * item_size(args.dtype),
                         std::min(kRowBlock, args.rows - n), args.in_features, packed + n * padded * x_size);
    });
    task.x = packed;
  }
  const int64_t weights = args.nnz + args.out_features * bitmask_words(args.in_features);
  int64_t chunks = 1;
  if (args.threads > 1 && weights * args.rows > kInlineWork) {
    chunks = std::min(args.threads * kChunksPerThread, weights * args.rows / kMinChunkWork);
  }
  if (args.rows > kRowBlock) {
    // Equal parts for every thread: 17 chunks would leave one of two threads idle for a ninth of the time.
    const int64_t rounds = weights * item_size(args.dtype) / kCachedBytes / args.threads + 1;
    chunks = std::max(chunks, rounds * args.threads);
  }
  parallel_for(args.threads, chunks, [&](int64_t c) {
    const int64_t begin = first_row(args, c, chunks), end = first_row(args, c + 1, chunks);
    if (begin < end) table.linear[kind](task, begin, end);
  });
  return {};
}

}  // namespace mosaic::cpu
