// SPDX-License-Identifier: Apache-2.0
// What tests set and ask of the emulator, by ctypes: the modules that hold it are otherwise python/cuda.cpp.
#include "simt/cuda.h"
#include "simt/probes.h"

#define MOSAIC_SIMT_EXPORT extern "C" __attribute__((visibility("default")))

namespace simt = mosaic::simt;

MOSAIC_SIMT_EXPORT void mosaic_simt_seed(uint64_t seed) { simt::set_seed(seed); }

MOSAIC_SIMT_EXPORT void mosaic_simt_resident_blocks(int blocks) { simt::set_resident_blocks(blocks); }

MOSAIC_SIMT_EXPORT void mosaic_simt_device(int device, int multiprocessors, int shared_bytes, int major) {
  simt::set_device(device, {multiprocessors, shared_bytes, major});
}

// What went wrong; empty: nothing.
MOSAIC_SIMT_EXPORT const char* mosaic_simt_probe(const char* name, int variant, const void* in, void* out) {
  return simt::probe(name, variant, in, out).message;
}
