// AMX: Sapphire Rapids and later. It multiplies bytes for more than a few tokens; all else runs as with AVX-512.
//
// A tile register is 16 rows of 64 bytes. `tdpbsud` takes A (token, 64 signed inputs), B (quad, 16 rows of W x 4 table
// bytes) and adds to C (token, row of W) in 32 bits. Units of decoded bytes are the rows of a B as they are. A tile of
// packed activations, [quad][token], is turned to [token][quad] when it is packed, 16 quads (a half of a run) at a
// time; of a run with an odd number of steps the last 8 quads stand alone.
//
// Never executed on a processor with AMX so far: only in emulation, see amx_emulated.h.
#define PAREDOWN_OWN_BUFFERED_INT8
#define PAREDOWN_OWN_MULTIPLY_BYTES
#define PAREDOWN_WIDEST_TILE 16
#include "simd_avx512.h"
#if defined(PAREDOWN_AMX_EMULATED)
#include "amx_emulated.h"
#endif
// After the vectors.
#include "kernel.inl"
// After the loops.
#include "conv.inl"

namespace paredown {
namespace {

constexpr int tile_tokens = PAREDOWN_WIDEST_TILE, half_quads = 16, row_bytes = 64;

// Tile registers. The intrinsics of GCC take literal numbers only: 0 to 3 are sums, 4 and 5 tokens and weights, 6 and 7
// those of 8 quads. Four sums hide the latency of a product: 52 cycles, where one can begin every 16 (Intel 64 and
// IA-32 Architectures Optimization Reference Manual, chapter on AMX).
constexpr int sums = 4;
template <int N>
struct Sum;
#define PAREDOWN_SUM(N)                                          \
  template <>                                                    \
  struct Sum<N> {                                                \
    static void clear() { _tile_zero(N); }                       \
    static void add() { _tile_dpbsud(N, 4, 5); }                 \
    static void add_odd() { _tile_dpbsud(N, 6, 7); }             \
    static void store(void *to) { _tile_stored(N, to, row_bytes); } \
  };
PAREDOWN_SUM(0)
PAREDOWN_SUM(1)
PAREDOWN_SUM(2)
PAREDOWN_SUM(3)
#undef PAREDOWN_SUM

/* The tile registers of this thread, for `tokens` rows, until the end of a scope. */
struct Registers {
  explicit Registers(int64_t tokens) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof config == 64, "LDTILECFG reads 64 bytes");
    const int64_t rows[8] = {tokens, tokens, tokens, tokens, tokens, half_quads, tokens, half_quads / 2};
    for (int i = 0; i < 8; ++i) {
      config.rows[i] = static_cast<uint8_t>(rows[i]);
      config.row_bytes[i] = i == 6 ? row_bytes / 2 : row_bytes;
    }
    /* GCC's intrinsic says that it reads the first 8 bytes only: all are written before it, and nothing over them. */
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
    __asm__ volatile("" : : "r"(&config) : "memory");
  }
  ~Registers() { _tile_release(); }
  Registers(const Registers &) = delete;
  Registers &operator=(const Registers &) = delete;
};

/* One tile of tokens by one block of rows, in one run. */
struct Product {
  const int8_t *x;   /* [half][token][quad] 4 inputs */
  const uint8_t *w;  /* [quad] units */
  const float *x_scale;
  const int32_t *correction;
  const F *scale; /* of the rows */
  float *totals;  /* of the block, [token] `totals_stride` apart */
  int64_t tokens;
};

/* Add up to four products of a run of `steps` steps. Weights that the next one shares stay in their register. */
inline void add_products(const Product *product, int count, int64_t steps, int64_t w_stride, int64_t totals_stride) {
  /* GCC's tile loads do not say that they read memory: what was decoded must be there, not in registers. Storing a tile
   * says it, which keeps the next run's bytes behind these loads. */
  __asm__ volatile("" ::: "memory");
  each<sums>([&](auto i) {
    if (i.value < count) Sum<decltype(i)::value>::clear();
  });
  for (int64_t half = 0; half * 2 < steps; ++half) {
    const bool odd = steps - half * 2 == 1;
    each<sums>([&](auto i) {
      if (i.value >= count) return;
      const Product &p = product[i.value];
      const bool load = i.value == 0 || p.w != product[i.value == 0 ? 0 : i.value - 1].w;
      const int8_t *x = p.x + half * p.tokens * row_bytes;
      const uint8_t *w = p.w + half * half_quads * w_stride;
      if (odd) {
        if (load) _tile_loadd(7, w, w_stride);
        _tile_loadd(6, x, row_bytes / 2);
        Sum<decltype(i)::value>::add_odd();
      } else {
        if (load) _tile_loadd(5, w, w_stride);
        _tile_loadd(4, x, row_bytes);
        Sum<decltype(i)::value>::add();
      }
    });
  }
  each<sums>([&](auto i) {
    if (i.value >= count) return;
    const Product &p = product[i.value];
    alignas(64) int32_t sum[tile_tokens][ROWS];
    Sum<decltype(i)::value>::store(sum);
    for (int64_t token = 0; token < p.tokens; ++token) {
      float *to = p.totals + token * totals_stride;
      const F all = Simd::to_float(Simd::add(Simd::load(sum[token]), Simd::set(p.correction[token])));
      Simd::fstore(to, Simd::fma(all, Simd::fmul(Simd::fset(p.x_scale[token]), *p.scale), Simd::fload(to)));
    }
  });
}

template <int BITS, int R>
void buffered_int8(const Weight &weight, const Packed &packed, int64_t block, const Span &span,
                   const paredown_linear *completed, float *totals) {
  constexpr int64_t run_bytes = RUN_STEPS * STEP * tile_tokens;
  alignas(64) uint8_t buffer[RUN_STEPS * QUADS * R * UNIT_BYTES];
  alignas(64) int8_t end[run_bytes] = {};
  const Tiles &tiles = span.tiles;
  const int64_t widest = tiles.width + (tiles.wide > 0 ? 1 : 0);
  const Registers registers(widest);
  const Simd::Bytes<BITS> table(byte_table(weight, block));
  Stream<R> stream(weight, block);
  int64_t run = 0, done = 0; /* done: steps */
  for (int64_t group = 0; group < weight.groups; ++group) {
    F scale[R];
    each<R>([&](auto r) { scale[r.value] = stream.scales(r.value, group); });
    for (int64_t left = ceil_div(group_inputs(weight, group), STEP); left > 0; left -= RUN_STEPS, ++run) {
      const int64_t steps = min_of(left, RUN_STEPS);
      decode_bytes<BITS, R>(table, stream, steps, buffer);
      Product product[sums];
      int count = 0;
      for (int r = 0; r < R; ++r) {
        float *to = totals + r * ROWS;
        for (int64_t tile = span.first; tile < span.last; ++tile) {
          const int64_t start = tile_start(tiles, tile), tokens = tile_start(tiles, tile + 1) - start;
          const int8_t *x = static_cast<const int8_t *>(packed.x) + (start * weight.steps + done * tokens) * STEP;
          if (tokens < widest && tile + 1 == tiles.count && run + 1 == weight.runs) {
            /* Registers have a row more than this tile, and nothing of x follows it. */
            __builtin_memcpy(end, x, static_cast<size_t>(steps * STEP * tokens));
            x = end;
          }
          const int64_t at = start * weight.runs + run * tokens;
          const uint8_t *w = buffer + r * UNIT_BYTES;
          product[count++] = {x, w, packed.scale + at, packed.correction + at, scale + r, to, tokens};
          to += tokens * R * ROWS;
          if (count == sums || (r + 1 == R && tile + 1 == span.last)) {
            add_products(product, count, steps, R * UNIT_BYTES, R * ROWS);
            count = 0;
          }
        }
      }
      done += steps;
    }
  }
  const int64_t first = tile_start(tiles, span.first), tokens = tile_start(tiles, span.last) - first;
  if (completed != nullptr) finish(*completed, block, R, first, tokens, totals);
}

/* Turn `quads` (16 or 8) x tokens words. */
inline void turn(int8_t *x, int64_t quads, int64_t tokens) {
  alignas(64) int32_t words[half_quads * tile_tokens];
  __builtin_memcpy(words, x, static_cast<size_t>(quads * tokens * 4));
  const I number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const I place = _mm512_mullo_epi32(number, Simd::set(static_cast<int32_t>(tokens)));
  const __mmask16 used = static_cast<__mmask16>((1u << quads) - 1u);
  for (int64_t token = 0; token < tokens; ++token) {
    const I turned = _mm512_mask_i32gather_epi32(Simd::set(0), used, place, words + token, 4);
    _mm512_mask_storeu_epi32(x + token * quads * 4, used, turned);
  }
}

void pack_tokens_first(const Linear &linear, int64_t first, int64_t last) {
  pack(linear, first, last);
  const Weight &weight = linear.weight;
  if (linear.call->mode != PAREDOWN_INT8 || is_direct<1>(PAREDOWN_INT8, bits_of(weight), linear.tiles)) return;
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t start = tile_start(linear.tiles, tile), tokens = tile_start(linear.tiles, tile + 1) - start;
    int8_t *x = static_cast<int8_t *>(linear.x.x) + start * weight.steps * STEP;
    for (int64_t group = 0; group < weight.groups; ++group) {
      /* A run is whole halves, but for the last of a group. */
      for (int64_t left = ceil_div(group_inputs(weight, group), STEP); left > 0; left -= 2) {
        const int64_t quads = min_of(left, 2) * QUADS;
        turn(x, quads, tokens);
        x += quads * tokens * 4;
      }
    }
  }
}

int64_t multiply_bytes(int64_t count) {
  alignas(64) int8_t bytes[tile_tokens * row_bytes] = {};
  const Registers registers(tile_tokens);
  each<sums>([&](auto i) { Sum<decltype(i)::value>::clear(); });
  __asm__ volatile("" ::: "memory");
  _tile_loadd(4, bytes, row_bytes);
  _tile_loadd(5, bytes, row_bytes);
  int64_t done = 0;
  for (; done < count; done += sums * tile_tokens * ROWS * row_bytes) {
    each<sums>([&](auto i) { Sum<decltype(i)::value>::add(); });
  }
  each<sums>([&](auto i) { Sum<decltype(i)::value>::store(bytes); });
  __asm__ volatile("" : : "r"(bytes) : "memory");
  return done;
}

}  // namespace

const Isa amx_isa = {"amx",    {Simd::tile, tile_tokens}, exact_tile, exact_tokens, tokens_at_once, pack_tokens_first,
                     multiply, &convolution,              multiply_bytes};

}  // namespace paredown
