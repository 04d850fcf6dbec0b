// The tile instructions that isa_amx.cpp uses, in plain C++, for tests on processors without them.
//
// -DPAREDOWN_AMX_EMULATED builds the kernel on this instead of <immintrin.h>'s intrinsics. Sizes that the processor
// would refuse end the program, as its fault would. Source: Intel 64 and IA-32 Architectures Software Developer's
// Manual, volume 2, LDTILECFG, TILELOADD, TILESTORED and TDPBSUD.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace {
namespace amx_emulated {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "LDTILECFG reads 64 bytes");

struct Tiles {
  Config config;  // palette 0: no tile may be used
  uint8_t data[8][16][64];

  void need(bool fits) const {
    if (config.palette != 1 || !fits) abort();
  }
};

inline Tiles &tiles() {
  static thread_local Tiles state;
  return state;
}

inline void configure(const void *from) {
  Tiles &t = tiles();
  memset(&t, 0, sizeof t);
  memcpy(&t.config, from, sizeof t.config);
  for (int i = 0; i < 8; ++i) t.need(t.config.rows[i] <= 16 && t.config.row_bytes[i] <= 64);
}

inline void release() { memset(&tiles(), 0, sizeof(Tiles)); }

inline void clear(int tile) {
  tiles().need(tile < 8);
  memset(tiles().data[tile], 0, sizeof tiles().data[tile]);
}

inline void load(int tile, const void *base, long stride) {
  Tiles &t = tiles();
  clear(tile);
  for (int r = 0; r < t.config.rows[tile]; ++r)
    memcpy(t.data[tile][r], static_cast<const char *>(base) + r * stride, t.config.row_bytes[tile]);
}

inline void store(int tile, void *base, long stride) {
  Tiles &t = tiles();
  t.need(tile < 8);
  for (int r = 0; r < t.config.rows[tile]; ++r)
    memcpy(static_cast<char *>(base) + r * stride, t.data[tile][r], t.config.row_bytes[tile]);
}

// c[m][n] += sum over k and i of a[m][4 k + i] (signed) * b[k][4 n + i] (unsigned)
inline void dot_signed_unsigned(int c, int a, int b) {
  Tiles &t = tiles();
  const Config &config = t.config;
  t.need(c != a && c != b && a != b && config.rows[c] == config.rows[a] &&
         config.row_bytes[c] == config.row_bytes[b] && config.row_bytes[a] == 4 * config.rows[b]);
  for (int m = 0; m < config.rows[c]; ++m)
    for (int n = 0; n < config.row_bytes[c] / 4; ++n) {
      int32_t sum;
      memcpy(&sum, &t.data[c][m][4 * n], sizeof sum);
      for (int k = 0; k < config.rows[b]; ++k)
        for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(t.data[a][m][4 * k + i]) * t.data[b][k][4 * n + i];
      memcpy(&t.data[c][m][4 * n], &sum, sizeof sum);
    }
}

}  // namespace amx_emulated
}  // namespace

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#define _tile_loadconfig(from) amx_emulated::configure(from)
#define _tile_release() amx_emulated::release()
#define _tile_zero(tile) amx_emulated::clear(tile)
#define _tile_loadd(tile, base, stride) amx_emulated::load(tile, base, stride)
#define _tile_stored(tile, base, stride) amx_emulated::store(tile, base, stride)
#define _tile_dpbsud(c, a, b) amx_emulated::dot_signed_unsigned(c, a, b)
