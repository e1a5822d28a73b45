// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>

#include "cpu/table.h"
#include "cpu/thread_pool.h"

namespace mosaic::cpu {

Status obs_block(const ObsArgs& args) {
  constexpr int64_t kRowsPerChunk = 4 * kObsLanes;
  const KernelTable& table = kernels();
  std::atomic<bool> finite{true}, memory{true};
  parallel_for(args.threads, (args.rows + kRowsPerChunk - 1) / kRowsPerChunk, [&](int64_t c) {
    auto* tile = static_cast<float*>(scratch(0, obs_tile_floats(args.block) * 4));
    const int64_t begin = c * kRowsPerChunk;
    if (!tile) {
      memory = false;
    } else if (!table.obs_rows(args, begin, std::min(args.rows, begin + kRowsPerChunk), tile)) {
      finite = false;
    }
  });
  if (!memory) return {Code::kUnavailable, "obs_block: out of memory"};
  return finite ? Status{} : Status{Code::kNonFinite, ""};
}

}  // namespace mosaic::cpu
