// SPDX-License-Identifier: Apache-2.0
// A decoder block for one token in two calls, where Python and torch's operators take some 60. (22 blocks of
// TinyLlama's shapes: see test_outside_kernels of benchmarks/bench_generate.py.)
#include "cpu/table.h"
#include "cpu/thread_pool.h"

namespace mosaic::cpu {
namespace {

LinearArgs filled(const LinearArgs& layer, const BlockArgs& a, const void* x, void* out) {
  LinearArgs now = layer;
  now.x = x;
  now.out = out;
  now.rows = 1;
  now.dtype = a.dtype;
  now.threads = a.threads;
  return now;
}

// One buffer after the other of the caller's memory for blocks.
class Room {
 public:
  Room(const BlockArgs& a, int64_t elements)
      : item_(item_size(a.dtype)), next_(static_cast<char*>(scratch(4, elements * item_ + 16 * kAligned))) {}
  explicit operator bool() const { return next_ != nullptr; }
  void* take(int64_t elements) {
    char* found = next_;
    next_ += (elements * item_ + kAligned - 1) / kAligned * kAligned;
    return found;
  }

 private:
  static constexpr int64_t kAligned = 64;
  int64_t item_;
  char* next_;
};

const Status kShortOfMemory = {Code::kUnavailable, "decoder block: out of memory"};

void norm_heads(const BlockArgs& a, const void* weight, float epsilon, int64_t features, void* heads) {
  if (!weight) return;
  const auto norm = kernels().rms_norm[static_cast<int>(a.dtype)];
  const int64_t bytes = a.head_dim * item_size(a.dtype);
  auto* head = static_cast<char*>(heads);
  for (int64_t h = 0; h < features / a.head_dim; ++h, head += bytes)
    norm(head, weight, epsilon, a.head_dim, head);
}

}  // namespace

Status block_input(const BlockArgs& a, const BlockInput& io) {
  const int kind = static_cast<int>(a.dtype);
  const KernelTable& table = kernels();
  const int64_t hidden = a.query.in_features, queries = a.query.out_features, keys = a.key.out_features;
  Room room(a, hidden + queries + keys);
  if (!room) return kShortOfMemory;
  void *normed = room.take(hidden), *query = room.take(queries), *key = room.take(keys);
  table.rms_norm[kind](io.x, a.attention_norm, a.attention_epsilon, hidden, normed);
  const LinearArgs layers[] = {filled(a.query, a, normed, query), filled(a.key, a, normed, key),
                               filled(a.value, a, normed, io.value)};
  const Status status = sparse_linear_group(layers, 3);
  if (!status.ok()) return status;
  norm_heads(a, a.query_norm, a.query_epsilon, queries, query);
  norm_heads(a, a.key_norm, a.key_epsilon, keys, key);
  table.rotate[kind](query, io.cosine, io.sine, queries / a.head_dim, a.head_dim, io.query);
  table.rotate[kind](key, io.cosine, io.sine, keys / a.head_dim, a.head_dim, io.key);
  return {};
}

Status block_output(const BlockArgs& a, const BlockOutput& io) {
  const int kind = static_cast<int>(a.dtype);
  const KernelTable& table = kernels();
  const int64_t hidden = a.query.in_features, queries = a.query.out_features;
  const int64_t channels = a.gate.out_features;
  Room room(a, queries + 3 * hidden + 2 * channels);
  if (!room) return kShortOfMemory;
  void *attended = room.take(queries), *added = room.take(hidden), *middle = room.take(hidden);
  void *normed = room.take(hidden), *gate = room.take(channels), *up = room.take(channels);

  Status status =
      attend({io.query, io.keys, io.values, io.mask, attended, queries / a.head_dim,
              a.key.out_features / a.head_dim, a.head_dim, io.tokens, io.key_head_stride, io.key_stride,
              io.value_head_stride, io.value_stride, a.scaling, a.dtype, a.threads});
  if (!status.ok()) return status;
  status = sparse_linear(filled(a.output, a, attended, added));
  if (!status.ok()) return status;
  table.add[kind](io.x, added, hidden, middle);
  table.rms_norm[kind](middle, a.ffn_norm, a.ffn_epsilon, hidden, normed);
  const LinearArgs layers[] = {filled(a.gate, a, normed, gate), filled(a.up, a, normed, up)};
  status = sparse_linear_group(layers, 2);
  if (!status.ok()) return status;
  table.gated[kind](gate, up, channels, gate);
  status = sparse_linear(filled(a.down, a, gate, added));
  if (!status.ok()) return status;
  table.add[kind](middle, added, hidden, io.out);
  return {};
}

}  // namespace mosaic::cpu
