// Which instruction sets this library has and this processor runs, and which of them is in use.
#include <atomic>
#include <cstring>

#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(PAREDOWN_HAVE_AMX)
#include "amx_detect.h"
#endif
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace paredown {
namespace {

bool always() { return true; }

#if defined(__x86_64__)

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers leaf(unsigned number, unsigned part) {
  Registers found;
  if (__get_cpuid_count(number, part, &found.a, &found.b, &found.c, &found.d) == 0) return Registers();
  return found;
}

bool bit(unsigned word, int place) { return ((word >> place) & 1u) != 0; }

/* Register state that the system saves, as XCR0 says: 6 for AVX, 0xE6 for AVX-512. */
bool system_saves(unsigned state) {
  if (!bit(leaf(1, 0).c, 27)) return false;  // OSXSAVE
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & state) == state;
}

bool has_avx2() {
  const Registers one = leaf(1, 0), seven = leaf(7, 0);
  const bool fma = bit(one.c, 12), f16c = bit(one.c, 29), avx = bit(one.c, 28), avx2 = bit(seven.b, 5);
  return system_saves(0x6) && avx && fma && f16c && avx2;
}

bool has_avxvnni() { return has_avx2() && bit(leaf(7, 1).a, 4); }

bool has_avx512vnni() {
  const Registers seven = leaf(7, 0);
  const bool f = bit(seven.b, 16), dq = bit(seven.b, 17), bw = bit(seven.b, 30), vl = bit(seven.b, 31);
  const bool vbmi = bit(seven.c, 1), vnni = bit(seven.c, 11);
  return has_avx2() && system_saves(0xE6) && f && dq && bw && vl && vbmi && vnni;
}

#elif defined(__aarch64__)

bool has_dotprod() { return (getauxval(AT_HWCAP) & (1UL << 20)) != 0; }  // HWCAP_ASIMDDP
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) & (1UL << 13)) != 0; }  // HWCAP2_I8MM

#endif

struct Choice {
  const Isa *isa;
  bool (*runs_here)();
};

/* Best first. */
constexpr Choice choices[] = {
#if defined(__x86_64__)
#if defined(PAREDOWN_HAVE_AMX)
    {&amx_isa, [] { return has_avx512vnni() && amx_granted(); }},
#endif
#if defined(PAREDOWN_HAVE_AVX512VNNI)
    {&avx512vnni_isa, has_avx512vnni},
#endif
#if defined(PAREDOWN_HAVE_AVXVNNI)
    {&avxvnni_isa, has_avxvnni},
#endif
#if defined(PAREDOWN_HAVE_AVX2)
    {&avx2_isa, has_avx2},
#endif
#elif defined(__aarch64__)
#if defined(PAREDOWN_HAVE_I8MM)
    {&i8mm_isa, has_i8mm},
#endif
#if defined(PAREDOWN_HAVE_DOTPROD)
    {&dotprod_isa, has_dotprod},
#endif
#if defined(PAREDOWN_HAVE_NEON)
    {&neon_isa, always},
#endif
#endif
    {&portable_isa, always},
};

/* What this processor runs: asked once. */
struct Available {
  Available() {
    for (const Choice &choice : choices) {
      if (!choice.runs_here()) continue;
      isa[count++] = choice.isa;
      if (names[0] != '\0') std::strcat(names, ",");
      std::strcat(names, choice.isa->name);
    }
  }
  const Isa *isa[sizeof choices / sizeof choices[0]] = {};
  int count = 0;
  char names[128] = {};
};

const Available &available() {
  static const Available once;
  return once;
}

std::atomic<const Isa *> in_use{nullptr};

}  // namespace

const Isa &isa_in_use() {
  const Isa *chosen = in_use.load(std::memory_order_acquire);
  return chosen != nullptr ? *chosen : *available().isa[0];
}

}  // namespace paredown

extern "C" {

const char *paredown_isas(void) { return paredown::available().names; }
const char *paredown_isa(void) { return paredown::isa_in_use().name; }

int32_t paredown_use_isa(const char *name) {
  const paredown::Available &found = paredown::available();
  for (int i = 0; name != nullptr && i < found.count; ++i) {
    if (std::strcmp(found.isa[i]->name, name) != 0) continue;
    paredown::in_use.store(found.isa[i], std::memory_order_release);
    return PAREDOWN_OK;
  }
  return PAREDOWN_NO_ISA;
}

}  // extern "C"
