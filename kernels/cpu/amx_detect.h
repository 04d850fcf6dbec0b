// Whether this process may use AMX: the processor has it, and Linux has granted the state of the tiles.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdint.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace paredown {

// Linux (5.16 or newer) saves 8 KB of tiles for processes that have asked only; without, the first tile instruction is
// an illegal one. Asking is for all threads of the process and is kept; from then on, Linux refuses alternate signal
// stacks with too little room for the tiles, as it refuses this request while there is one. Call it after checking that
// XGETBV may be executed (OSXSAVE) and that what AVX-512 needs is there too.
inline bool amx_granted() {
#if defined(PAREDOWN_AMX_EMULATED)
  return true;
#elif defined(__linux__)
  uint32_t a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr uint32_t kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
  if ((d & kAmxTile) == 0 || (d & kAmxInt8) == 0) return false;
  uint32_t enabled, high;
  __asm__("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
  constexpr uint32_t kTileConfig = 1u << 17, kTileData = 1u << 18;
  if ((enabled & kTileConfig) == 0 || (enabled & kTileData) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileDataFeature = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileDataFeature) == 0;
#else
  return false;
#endif
}

}  // namespace paredown
#endif
