// SPDX-License-Identifier: Apache-2.0
// One pool for every kernel: workers sleep on a condition variable and never spin, because a spinning
// pool beside torch's OpenMP threads costs 6-8 ms outliers (2-core Zen 4, Nov 2026).
#pragma once

#include <cstdint>

namespace mosaic::cpu {

using ChunkBody = void (*)(const void* context, int64_t chunk);

// Calls body(context, c) once for every c in [0, chunks), on at most `threads` threads, the caller
// among them. The caller starts at once and takes whatever a sleeping worker has not reached, so a slow
// wake-up costs parallelism but never time. May be called from several threads and after a fork.
void run_chunks(int threads, int64_t chunks, ChunkBody body, const void* context);

template <typename Body>
void parallel_for(int threads, int64_t chunks, const Body& body) {
  run_chunks(
      threads, chunks,
      [](const void* context, int64_t chunk) { (*static_cast<const Body*>(context))(chunk); }, &body);
}

// A buffer of the calling thread that only grows; `slot` tells apart the buffers one call needs together.
// Returns nullptr where memory is short.
void* scratch(int slot, int64_t bytes);

}  // namespace mosaic::cpu
