// SPDX-License-Identifier: Apache-2.0
// CPUID once, then a table. One binary runs everywhere.
#include <atomic>
#include <cstring>

#include "cpu/table.h"

#if defined(MOSAIC_X86)
#include <cpuid.h>
#endif
#if defined(MOSAIC_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mosaic {
namespace scalar {
extern const cpu::KernelTable kTable;
}
namespace avx2 {
extern const cpu::KernelTable kTable;
}
namespace avx512 {
extern const cpu::KernelTable kTable;
}

#if defined(MOSAIC_AMX)
namespace amx {
const cpu::KernelTable& kernel_table();
}
#endif

namespace cpu {
namespace {

enum Level { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

struct Cpu {
  Level best = kScalar;
  char features[160] = "";
};

#if defined(MOSAIC_X86)
bool bit(unsigned word, int position) { return (word >> position) & 1u; }

// Asks Linux for permission to use tiles, and returns true if it agrees. A process must ask because the first
// use of a tile adds 8 KB to the state that the system saves for a thread. The permission holds for all
// threads of the process. Linux refuses if it is older than 5.16 or if the signal stack of a thread is too
// small.
bool may_use_tiles() {
#if defined(MOSAIC_AMX)
  constexpr int kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

Cpu detect() {
  Cpu cpu;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
  const bool fma = bit(c, 12), popcnt = bit(c, 23), osxsave = bit(c, 27), f16c = bit(c, 29);
  unsigned xcr0 = 0;
  if (osxsave) {
    unsigned high;
    __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
  }
  const bool os_ymm = (xcr0 & 0x06) == 0x06;  // the system saves xmm and ymm
  const bool os_zmm = (xcr0 & 0xe6) == 0xe6;  // and the mask registers and zmm
  const bool os_tiles = (xcr0 & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
  const unsigned subleaves = a;
  const bool bmi = bit(b, 3) && bit(b, 8), has_avx2 = os_ymm && bit(b, 5);
  const bool base512 = os_zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
  const bool vbmi2 = os_zmm && bit(c, 1) && bit(c, 6),                                  // VBMI and VBMI2
      vnni = os_zmm && bit(c, 11);
  const bool fp16 = os_zmm && bit(d, 23), amx_bf16 = os_tiles && bit(d, 22) && bit(d, 24),
             amx_int8 = os_tiles && bit(d, 24) && bit(d, 25);
  bool bf16 = false, amx_fp16 = false;
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    bf16 = os_zmm && bit(a, 5);
    amx_fp16 = amx_bf16 && bit(a, 21);
  }
  const struct {
    bool present;
    const char* name;
  } names[] = {{has_avx2, "avx2"},     {fma, "fma"},           {f16c, "f16c"},
               {bmi, "bmi2"},          {base512, "avx512"},    {vbmi2, "avx512_vbmi2"},
               {bf16, "avx512_bf16"},  {vnni, "avx512_vnni"},  {fp16, "avx512_fp16"},
               {amx_bf16, "amx_bf16"}, {amx_int8, "amx_int8"}, {amx_fp16, "amx_fp16"}};
  for (const auto& feature : names) {
    if (!feature.present) continue;
    if (cpu.features[0]) std::strcat(cpu.features, " ");
    std::strcat(cpu.features, feature.name);
  }
  if (has_avx2 && fma && f16c && bmi && popcnt) cpu.best = kAvx2;
  if (cpu.best == kAvx2 && base512 && vbmi2 && bf16 && vnni) cpu.best = kAvx512;
  if (cpu.best == kAvx512 && amx_bf16 && amx_int8 && may_use_tiles()) cpu.best = kAmx;
  return cpu;
}

const KernelTable* table_of(Level level) {
#if defined(MOSAIC_AMX)
  if (level == kAmx) return &amx::kernel_table();
#endif
  return level == kAvx512 ? &avx512::kTable : level == kAvx2 ? &avx2::kTable : &scalar::kTable;
}
#else
Cpu detect() { return Cpu(); }
const KernelTable* table_of(Level) { return &scalar::kTable; }
#endif

const Cpu& processor() {
  static const Cpu cpu = detect();
  return cpu;
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table{table_of(processor().best)};
  return table;
}

}  // namespace

const KernelTable& kernels() { return *current().load(std::memory_order_relaxed); }

const char* isa() { return kernels().name; }

const char* features() { return processor().features; }

Status set_isa(const char* level) {
  const char* const names[] = {"scalar", "avx2", "avx512", "amx"};
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(level, names[i]) != 0) continue;
    if (i > processor().best) return invalid("set_isa: this processor lacks that instruction set");
    current().store(table_of(static_cast<Level>(i)));
    return {};
  }
  return invalid("set_isa: the levels are 'scalar', 'avx2', 'avx512' and 'amx'");
}

}  // namespace cpu
}  // namespace mosaic
