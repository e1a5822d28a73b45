// SPDX-License-Identifier: Apache-2.0
// Attention of one token. Its work are pieces of so many tokens of one key head: as many whatever the number
// of threads, so that results do not depend on it, and small enough that few key heads keep many threads
// busy.
#include "cpu/table.h"
#include "cpu/thread_pool.h"

namespace mosaic::cpu {
namespace {

constexpr int64_t kInline = 1 << 15;  // elements of keys, some 10 us of work, that the caller reads alone

}  // namespace

Status attend(const AttentionArgs& a) {
  if (a.key_heads <= 0 || a.query_heads <= 0 || a.query_heads % a.key_heads != 0)
    return invalid("attention: query heads must be a multiple of key heads");
  if (a.dim <= 0 || a.dim % 2 != 0) return invalid("attention: the size of a head must be even");
  if (a.tokens <= 0) return invalid("attention: there must be a token to attend to");
  const int kind = static_cast<int>(a.dtype);
  const KernelTable& table = kernels();
  int64_t tokens = a.tokens;
  while (a.mask && tokens > 1 && !a.mask[tokens - 1])
    --tokens;  // a static cache is longer than what it holds
  const int64_t share = a.query_heads / a.key_heads, pieces = (tokens + kAttendTokens - 1) / kAttendTokens;
  const int64_t item = item_size(a.dtype), row = attend_floats(a.dim), stride = a.query_heads * row;
  const int64_t bytes = pieces * stride * sizeof(float), left_bytes = a.key_heads * sizeof(int64_t);
  auto* found = static_cast<float*>(scratch(0, bytes + left_bytes));
  if (!found) return {Code::kUnavailable, "attention: out of memory"};
  auto* left = reinterpret_cast<int64_t*>(reinterpret_cast<char*>(found) + bytes);  // pieces of each key head
  for (int64_t head = 0; head < a.key_heads; ++head) left[head] = pieces;

  const auto at = [item](const void* from, int64_t i) { return static_cast<const char*>(from) + i * item; };
  const auto keys_of = [&](int64_t chunk) {
    return at(a.keys, chunk / pieces * a.key_head_stride + chunk % pieces * kAttendTokens * a.key_stride);
  };
  const int64_t chunks = a.key_heads * pieces;
  int enough = 1;
  const int threads = tokens * a.key_heads * a.dim > kInline ? a.threads : 1;
  parallel_for(threads, chunks, [&](int64_t chunk) {
    const int64_t head = chunk / pieces, piece = chunk % pieces, first = piece * kAttendTokens;
    const int64_t count = tokens - first < kAttendTokens ? tokens - first : kAttendTokens;
    auto* room = static_cast<float*>(scratch(1, attend_room(a.dim) * sizeof(float)));
    if (!room) {
      __atomic_store_n(&enough, 0, __ATOMIC_RELAXED);
      return;
    }
    table.attend[kind]({at(a.query, head * share * a.dim), keys_of(chunk),
                        at(a.values, head * a.value_head_stride + first * a.value_stride),
                        keys_of(chunk + threads < chunks ? chunk + threads : chunk),
                        a.mask ? a.mask + first : nullptr, share, a.dim, count, a.key_stride, a.value_stride,
                        a.scaling, room, found + piece * stride + head * share * row});
    if (__atomic_sub_fetch(&left[head], 1, __ATOMIC_ACQ_REL) > 0) return;
    table.attend_join[kind](found + head * share * row, pieces, stride, share, a.dim,
                            static_cast<char*>(a.out) + head * share * a.dim * item);
  });
  return enough ? Status{} : Status{Code::kUnavailable, "attention: out of memory"};
}

}  // namespace mosaic::cpu
