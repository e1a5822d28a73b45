// SPDX-License-Identifier: Apache-2.0
// Where the chunks of a kernel run: on the OpenMP threads that torch has, where there are any. These spin
// for milliseconds after each of torch's parallel operators, and workers of our own would have to share
// their cores with them: 2048x2048 at half density took 276 us for one row on a pool of our own and takes
// 192 us on torch's threads, 64 rows 7.1 and 5.1 ms (8960x1536; 2-core Zen 4, calls to F.linear in
// between, Nov 2026). Without OpenMP, after a fork and for another number of threads than torch's there is
// a pool whose workers sleep on a condition variable and never spin.
#pragma once

#include <cstdint>

namespace mosaic::cpu {

using ChunkBody = void (*)(const void* context, int64_t chunk);

// Calls body(context, c) once for every c in [0, chunks), on at most `threads` threads, the caller
// among them, which takes whatever the others have not reached. May be called from several threads and
// after a fork.
void run_chunks(int threads, int64_t chunks, ChunkBody body, const void* context);

template <typename Body>
void parallel_for(int threads, int64_t chunks, const Body& body) {
  run_chunks(
      threads, chunks,
      [](const void* context, int64_t chunk) { (*static_cast<const Body*>(context))(chunk); }, &body);
}

// A buffer of the calling thread, kept for its next call; `slot` tells apart the buffers one call needs
// together. Returns nullptr where memory is short.
void* scratch(int slot, int64_t bytes);

}  // namespace mosaic::cpu
