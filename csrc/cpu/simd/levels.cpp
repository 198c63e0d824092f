// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/levels.h"

#include <atomic>

#if MIK_X86_LEVELS
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mik {
namespace {

#if MIK_X86_LEVELS
// AMX tile registers are 8 KB per thread, so Linux grants them per process on request
bool amx_granted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = d & (1u << 22), tile = d & (1u << 24);
  return bf16 && tile && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// integer dot products in 256 bits, without AVX-512 (Alder Lake) or beside it (Zen 5)
bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & (1u << 4);
}

Level detect() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("bmi2"))
    return Level::portable;
  // VNNI is what makes the 512-bit screen worth having; Skylake-X without it stays at avx2
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vnni"))
    return has_avxvnni() ? Level::avxvnni : Level::avx2;
  return amx_granted() ? Level::amx : Level::avx512;
}
#else
bool has_avxvnni() { return false; }

Level detect() { return Level::portable; }
#endif

std::atomic<Level>& level_slot() {
  static std::atomic<Level> level{best_level()};
  return level;
}

}  // namespace

Level best_level() {
  static const Level best = detect();
  return best;
}

bool is_supported(Level level) {
  return level <= best_level() && (level != Level::avxvnni || has_avxvnni());
}

Level active_level() { return level_slot().load(std::memory_order_relaxed); }

void set_level(Level level) { level_slot().store(level, std::memory_order_relaxed); }

const char* level_name(Level level) {
  constexpr const char* names[] = {"portable", "avx2", "avxvnni", "avx512", "amx"};
  return names[static_cast<int>(level)];
}

}  // namespace mik
