/* The matrix product, once for all instruction sets: include after a header that defines `Simd`.
 *
 * Up to `Simd::direct` tokens, words of R blocks of 16 rows are decoded in registers right before they are multiplied.
 * More tokens share the decode: a run (exact mode: a chunk) of R blocks goes to a buffer in the first cache, and every
 * tile of tokens is multiplied by it. With PAREDOWN_EXACT_TILE exact mode decodes words of up to 4 bits in registers for
 * every tile of so many tokens anew, one block at once: products wait for FMA units, and the decode uses the others
 * (with PAREDOWN_EXACT_TOKENS: calls of so many at most).
 *
 *   BITS  width of the codes, 0 for 8 bits without a table
 *   T     tokens of a tile          R  blocks of 16 rows
 *
 * Sums of a token with the rows of a block stand in `totals`, [token][block][16] floats.
 */
#include <utility>

#include "activation.inl"
#include "isa.h"

namespace paredown {
namespace {

constexpr int chunk_steps = 8; /* of the exact buffer: 2 blocks x 256 inputs are 32 KiB */
/* Totals of 2 blocks are 33 KiB, on the stack too. With 192, 256 tokens took 4 % longer (4096 x 4096, Zen 5). */
constexpr int tokens_at_once = 264;

template <int N>
struct Constant {
  static constexpr int value = N;
};
template <int FIRST, int N, class Body>
inline __attribute__((always_inline)) void each_from(Body &&body) {
  if constexpr (FIRST < N) {
    body(Constant<FIRST>{});
    each_from<FIRST + 1, N>(body);
  }
}
/* Call `body` with 0 to N - 1 as constants. */
template <int N, class Body>
inline __attribute__((always_inline)) void each(Body &&body) {
  each_from<0, N>(body);
}

using I = Simd::I;
using F = Simd::F;
using Operand = Simd::Operand;

constexpr int units_of(int bits) { return bits == 0 ? 8 : bits; }

inline int64_t scale_bytes(int32_t type) { return type == PAREDOWN_F32 ? 4 : 2; }

/* The R blocks from `block` on, at the first step of their first group. */
template <int R>
struct Stream {
  Stream(const Weight &weight, int64_t block)
      : type(weight.given.scale_type), group_stride(ROWS * scale_bytes(type)) {
    for (int r = 0; r < R; ++r) {
      codes[r] = static_cast<const uint8_t *>(weight.given.codes) + (block + r) * weight.block_bytes;
      scale[r] = static_cast<const char *>(weight.given.scale) + (block + r) * weight.groups * group_stride;
    }
  }
  F scales(int r, int64_t group) const {
    return Simd::load_as_float(scale[r] + group * group_stride, type, ROWS);
  }
  const uint8_t *codes[R];
  const char *scale[R];
  int32_t type;
  int64_t group_stride;
};

inline int64_t table_of(const Weight &weight, int64_t block) {
  return weight.given.table_rows == 0 ? 0 : block * ROWS / weight.given.table_rows;
}
inline const uint8_t *byte_table(const Weight &weight, int64_t block) {
  return static_cast<const uint8_t *>(weight.given.table) + (table_of(weight, block) << weight.given.bits);
}

inline void float_table(const Weight &weight, int64_t block, FloatTable &out) {
  out.zero = weight.given.zero;
  out.unit = weight.given.unit;
  const int64_t first = table_of(weight, block) << weight.given.bits;
  const int size = 1 << weight.given.bits;
  if (weight.given.table_type == PAREDOWN_U8) {
    const uint8_t *table = static_cast<const uint8_t *>(weight.given.table) + first;
    for (int i = 0; i < size; ++i) out.entry[i] = (static_cast<float>(table[i]) - out.zero) * out.unit;
    return;
  }
  const uint16_t *table = static_cast<const uint16_t *>(weight.given.table) + first;
  const F zero = Simd::fset(out.zero), unit = Simd::fset(out.unit);
  for (int i = 0; i < size; i += ROWS) {
    const F entries = Simd::load_as_float(table + i, PAREDOWN_F16, min_of(ROWS, size - i));
    Simd::fstore(out.entry + i, Simd::fmul(Simd::fsub(entries, zero), unit));
  }
}

/* Load the units of a step, and go on to the next. */
template <int UNITS, int R>
inline void load_step(Stream<R> &stream, I (&unit)[R][UNITS]) {
  each<R>([&](auto r) {
    each<UNITS>([&](auto u) { unit[r.value][u.value] = Simd::load(stream.codes[r.value] + u.value * UNIT_BYTES); });
    stream.codes[r.value] += UNITS * UNIT_BYTES;
  });
}

#ifdef PAREDOWN_OWN_DECODE /* the file that includes this defines them behind it */
template <int BITS, int T, int R>
void direct_int8(const Weight &weight, const Packed &packed, int64_t block, float *totals);
template <int BITS, int T, int R>
void direct_exact(const Weight &weight, const Packed &packed, int64_t block, float *totals);
template <int BITS, int R>
void decode_bytes(const Simd::Bytes<BITS> &table, Stream<R> &stream, int64_t steps, uint8_t *out);
template <int BITS, int R>
void decode_floats(const Simd::Floats<BITS> &table, Stream<R> &stream, const F (&scale)[R], float *out);
#else
/* --- decoded in registers: R blocks, and all T tokens are one tile --- */

/* Sums of each token, so that products need not wait for one another: as many as there are registers for. */
constexpr int chains_of(int tokens) { return tokens <= Simd::chained ? 4 : 2 * tokens <= Simd::tile ? 2 : 1; }

template <int BITS, int T, int R>
void direct_int8(const Weight &weight, const Packed &packed, int64_t block, float *totals) {
  constexpr int units = units_of(BITS), chains = chains_of(T * R);
  const Simd::Bytes<BITS> table(byte_table(weight, block));
  Stream<R> stream(weight, block);
  const int8_t *x = static_cast<const int8_t *>(packed.x);
  const float *x_scale = packed.scale;
  const int32_t *correction = packed.correction;
  F total[T][R];
  each<T>([&](auto t) { each<R>([&](auto r) { total[t.value][r.value] = Simd::fset(0.0f); }); });
  for (int64_t group = 0; group < weight.groups; ++group) {
    F scale[R];
    each<R>([&](auto r) { scale[r.value] = stream.scales(r.value, group); });
    for (int64_t left = ceil_div(group_inputs(weight, group), STEP); left > 0; left -= RUN_STEPS) {
      I sum[T][R][chains];
      each<T>([&](auto t) {
        each<R>([&](auto r) {
          sum[t.value][r.value][0] = Simd::set(correction[t.value]);
          each_from<1, chains>([&](auto c) { sum[t.value][r.value][c.value] = Simd::set(0); });
        });
      });
      for (int64_t step = min_of(left, RUN_STEPS); step > 0; --step) {
        I unit[R][units];
        load_step(stream, unit);
        each<QUADS>([&](auto q) {
          constexpr int Q = decltype(q)::value;
          Operand w[R];
          each<R>([&](auto r) { w[r.value] = Simd::operand(table.template quad<Q>(unit[r.value])); });
          each<T>([&](auto t) {
            each<R>([&](auto r) {
              I &s = sum[t.value][r.value][Q % chains];
              const int8_t *four = x + (Q * T + t.value) * 4;
#ifdef PAREDOWN_DOT_ONCE
              s = R == 1 ? Simd::dot_once(s, w[r.value], four) : Simd::dot(s, w[r.value], four);
#else
              s = Simd::dot(s, w[r.value], four);
#endif
            });
          });
        });
        x += QUADS * T * 4;
      }
      each<T>([&](auto t) {
        const F of_x = Simd::fset(x_scale[t.value]);
        each<R>([&](auto r) {
          I all = sum[t.value][r.value][0];
          each_from<1, chains>([&](auto c) { all = Simd::add(all, sum[t.value][r.value][c.value]); });
          F &to = total[t.value][r.value];
          to = Simd::fma(Simd::to_float(all), Simd::fmul(of_x, scale[r.value]), to);
        });
      });
      x_scale += T;
      correction += T;
    }
  }
  each<T>([&](auto t) {
    each<R>([&](auto r) { Simd::fstore(totals + (t.value * R + r.value) * ROWS, total[t.value][r.value]); });
  });
}

template <int BITS, int T, int R>
void direct_exact(const Weight &weight, const Packed &packed, int64_t block, float *totals) {
  constexpr int units = units_of(BITS), chains = chains_of(T * R);
  FloatTable entries;
  float_table(weight, block, entries);
  const Simd::Floats<BITS> table(entries);
  Stream<R> stream(weight, block);
  const float *x = static_cast<const float *>(packed.x);
  for (int64_t group = 0; group < weight.groups; ++group) {
    F scale[R];
    each<R>([&](auto r) { scale[r.value] = stream.scales(r.value, group); });
    for (int64_t left = ceil_div(group_inputs(weight, group), STEP); left > 0; left -= RUN_STEPS) {
      F sum[T][R][chains];
      each<T * R * chains>([&](auto i) {
        sum[i.value / chains / R][i.value / chains % R][i.value % chains] = Simd::fset(0.0f);
      });
      for (int64_t step = min_of(left, RUN_STEPS); step > 0; --step) {
        I unit[R][units];
        load_step(stream, unit);
        each<QUADS * 4>([&](auto i) {
          constexpr int Q = decltype(i)::value / 4, B = decltype(i)::value % 4;
          F w[R];
          each<R>([&](auto r) { w[r.value] = table.template input<Q, B>(unit[r.value]); });
          each<T>([&](auto t) {
            const F of_x = Simd::fset(x[(Q * T + t.value) * 4 + B]);
            each<R>([&](auto r) {
              F &s = sum[t.value][r.value][B % chains];
              s = Simd::fma(w[r.value], of_x, s);
            });
          });
        });
        x += QUADS * T * 4;
      }
      each<T>([&](auto t) {
        each<R>([&](auto r) {
          F all = sum[t.value][r.value][0];
          each_from<1, chains>([&](auto c) { all = Simd::fadd(all, sum[t.value][r.value][c.value]); });
          float *to = totals + (t.value * R + r.value) * ROWS;
          Simd::fstore(to, Simd::fma(all, scale[r.value], Simd::fload(to)));
        });
      });
    }
  }
}

#ifdef PAREDOWN_EXACT_HALVES /* the file that includes this defines them behind it */
template <int BITS, int T>
void halves_exact(const Weight &weight, const Packed &packed, int64_t block, float *totals);
#endif

/* --- decoded to a buffer --- */

/* Decode `steps` steps: [quad][block] units of table bytes. */
template <int BITS, int R>
void decode_bytes(const Simd::Bytes<BITS> &table, Stream<R> &stream, int64_t steps, uint8_t *out) {
  for (; steps > 0; --steps) {
    I unit[R][units_of(BITS)];
    load_step(stream, unit);
    each<QUADS>([&](auto q) {
      each<R>([&](auto r) {
        Simd::store(out + (q.value * R + r.value) * UNIT_BYTES,
                    table.template quad<decltype(q)::value>(unit[r.value]));
      });
    });
    out += QUADS * R * UNIT_BYTES;
  }
}

/* Decode one step: [input][block] 16 floats each, times `scale`. */
template <int BITS, int R>
void decode_floats(const Simd::Floats<BITS> &table, Stream<R> &stream, const F (&scale)[R], float *out) {
  I unit[R][units_of(BITS)];
  load_step(stream, unit);
  each<QUADS * 4>([&](auto i) {
    constexpr int Q = decltype(i)::value / 4, B = decltype(i)::value % 4;
    each<R>([&](auto r) {
      const F value = Simd::fmul(table.template input<Q, B>(unit[r.value]), scale[r.value]);
      Simd::fstore(out + (decltype(i)::value * R + r.value) * ROWS, value);
    });
  });
}
#endif

#ifdef PAREDOWN_OWN_TILE_INT8 /* likewise, for a buffer of another order */
template <int T, int R>
void tile_int8(const uint8_t *w, int64_t quads, const int8_t *x, const float *x_scale, const int32_t *correction,
               const F *scale, float *totals);
#else
/* Multiply decoded bytes by one tile of a run. */
template <int T, int R>
void tile_int8(const uint8_t *w, int64_t quads, const int8_t *x, const float *x_scale, const int32_t *correction,
               const F *scale, float *totals) {
  I sum[T][R];
  each<T>([&](auto t) { each<R>([&](auto r) { sum[t.value][r.value] = Simd::set(correction[t.value]); }); });
  for (; quads > 0; --quads) {
    Operand bytes[R];
    each<R>([&](auto r) { bytes[r.value] = Simd::operand(Simd::load(w + r.value * UNIT_BYTES)); });
    each<T>([&](auto t) {
      each<R>([&](auto r) {
        sum[t.value][r.value] = Simd::dot(sum[t.value][r.value], bytes[r.value], x + t.value * 4);
      });
    });
    w += R * UNIT_BYTES;
    x += T * 4;
  }
  each<T>([&](auto t) {
    const F of_x = Simd::fset(x_scale[t.value]);
    each<R>([&](auto r) {
      float *to = totals + (t.value * R + r.value) * ROWS;
      const F all = Simd::to_float(sum[t.value][r.value]);
      Simd::fstore(to, Simd::fma(all, Simd::fmul(of_x, scale[r.value]), Simd::fload(to)));
    });
  });
}
#endif

/* Multiply decoded floats by one tile of a chunk. */
template <int T, int R>
void tile_exact(const float *w, int64_t quads, const float *x, float *totals) {
  F sum[T][R];
  each<T>([&](auto t) {
    each<R>([&](auto r) { sum[t.value][r.value] = Simd::fload(totals + (t.value * R + r.value) * ROWS); });
  });
  for (; quads > 0; --quads) {
    each<4>([&](auto b) {
      F value[R];
      each<R>([&](auto r) { value[r.value] = Simd::fload(w + (b.value * R + r.value) * ROWS); });
      each<T>([&](auto t) {
        const F of_x = Simd::fset(x[t.value * 4 + b.value]);
        each<R>([&](auto r) { sum[t.value][r.value] = Simd::fma(value[r.value], of_x, sum[t.value][r.value]); });
      });
    });
    w += 4 * R * ROWS;
    x += T * 4;
  }
  each<T>([&](auto t) {
    each<R>([&](auto r) { Simd::fstore(totals + (t.value * R + r.value) * ROWS, sum[t.value][r.value]); });
  });
}

template <int R>
using TileInt8 = decltype(&tile_int8<1, R>);
template <int R>
using TileExact = decltype(&tile_exact<1, R>);

#ifdef PAREDOWN_WIDEST_TILE /* where int8 tiles may be wider than Simd::tile: the low-rank term has the same tiles */
constexpr int widest_tile = PAREDOWN_WIDEST_TILE;
#else
constexpr int widest_tile = Simd::tile;
#endif

template <int R, class Widths = std::make_integer_sequence<int, widest_tile>>
struct TileTable;
template <int R, int... T>
struct TileTable<R, std::integer_sequence<int, T...>> {
  static constexpr TileInt8<R> int8[] = {&tile_int8<T + 1, R>...};
  static constexpr TileExact<R> exact[] = {&tile_exact<T + 1, R>...};
};

/* The tiles that a call works on; `x` of Packed begins with tile 0. */
struct Span {
  const Tiles &tiles;
  int64_t first, last;
};

/* The x of a tile from a step on. */
template <class T>
inline const T *tile_x(const Weight &weight, const Packed &packed, const Tiles &tiles, int64_t tile, int64_t step) {
  const int64_t start = tile_start(tiles, tile), width = tile_start(tiles, tile + 1) - start;
  return static_cast<const T *>(packed.x) + (start * weight.steps + step * width) * STEP;
}

#ifdef PAREDOWN_OWN_BUFFERED_INT8
template <int BITS, int R>
void buffered_int8(const Weight &weight, const Packed &packed, int64_t block, const Span &span,
                   const paredown_linear *completed, float *totals);
#else
template <int BITS, int R>
void buffered_int8(const Weight &weight, const Packed &packed, int64_t block, const Span &span,
                   const paredown_linear *completed, float *totals) {
  alignas(64) uint8_t buffer[RUN_STEPS * QUADS * R * UNIT_BYTES];
  const Simd::Bytes<BITS> table(byte_table(weight, block));
  Stream<R> stream(weight, block);
  int64_t run = 0, done = 0; /* done: steps */
  for (int64_t group = 0; group < weight.groups; ++group) {
    F scale[R];
    each<R>([&](auto r) { scale[r.value] = stream.scales(r.value, group); });
    for (int64_t left = ceil_div(group_inputs(weight, group), STEP); left > 0; left -= RUN_STEPS, ++run) {
      const int64_t steps = min_of(left, RUN_STEPS);
      decode_bytes<BITS, R>(table, stream, steps, buffer);
      float *to = totals;
      for (int64_t tile = span.first; tile < span.last; ++tile) {
        const int64_t start = tile_start(span.tiles, tile), width = tile_start(span.tiles, tile + 1) - start;
        const int8_t *x = tile_x<int8_t>(weight, packed, span.tiles, tile, done);
        const int64_t at = start * weight.runs + run * width;
        const bool last = completed != nullptr && run + 1 == weight.runs;
        TileTable<R>::int8[width - 1](buffer, steps * QUADS, x, packed.scale + at, packed.correction + at, scale, to);
        if (last) finish(*completed, block, R, start, width, to);
        to += width * R * ROWS;
      }
      done += steps;
    }
  }
}
#endif

template <int BITS, int R>
void buffered_exact(const Weight &weight, const Packed &packed, int64_t block, const Span &span,
                    const paredown_linear *completed, float *totals) {
  alignas(64) float buffer[chunk_steps * STEP * R * ROWS];
  FloatTable entries;
  float_table(weight, block, entries);
  const Simd::Floats<BITS> table(entries);
  Stream<R> stream(weight, block);
  F scale[R];
  for (int64_t done = 0, group = -1, left = 0; done < weight.steps;) {
    const int64_t steps = min_of(chunk_steps, weight.steps - done);
    for (int64_t step = 0; step < steps; ++step, --left) {
      if (left == 0) {
        ++group;
        left = ceil_div(group_inputs(weight, group), STEP);
        each<R>([&](auto r) { scale[r.value] = stream.scales(r.value, group); });
      }
      decode_floats<BITS, R>(table, stream, scale, buffer + step * STEP * R * ROWS);
    }
    float *to = totals;
    for (int64_t tile = span.first; tile < span.last; ++tile) {
      const int64_t start = tile_start(span.tiles, tile), width = tile_start(span.tiles, tile + 1) - start;
      const float *x = tile_x<float>(weight, packed, span.tiles, tile, done);
      const bool last = completed != nullptr && done + steps == weight.steps;
      TileTable<R>::exact[width - 1](buffer, steps * QUADS, x, to);
      if (last) finish(*completed, block, R, start, width, to);
      to += width * R * ROWS;
    }
    done += steps;
  }
}

/* --- which of them --- */

#ifdef PAREDOWN_EXACT_TILE
/* 1024 x 1024, 4 bits, 8 and 16 tokens: 148 and 297 us, from a buffer 190 and 340; pairs of blocks spill (Zen 4). */
constexpr int exact_tile = PAREDOWN_EXACT_TILE;
#ifdef PAREDOWN_EXACT_TOKENS
constexpr int exact_tokens = PAREDOWN_EXACT_TOKENS;
#else
constexpr int exact_tokens = INT32_MAX;
#endif
inline bool exact_by_tile(int mode, int bits) { return may_decode_by_tile(mode, bits); }
#else
constexpr int exact_tile = Simd::direct, exact_tokens = Simd::direct;
inline bool exact_by_tile(int, int) { return false; }
#endif

/* `bits` 0 to 8, as BITS. */
template <int R>
inline bool is_direct(int mode, int bits, const Tiles &tiles) {
  if (R == 1 && exact_by_tile(mode, bits) && tile_start(tiles, tiles.count) <= exact_tokens) {
    return tiles.width + (tiles.wide > 0) <= exact_tile;
  }
  return bits <= 4 && tiles.count == 1 && tiles.width <= Simd::direct;
}

template <int BITS, int R>
void add_direct(int mode, const Weight &weight, const Packed &packed, int64_t block, int64_t tokens, float *totals) {
  each<R == 1 ? exact_tile : Simd::direct>([&](auto t) {
    constexpr int T = decltype(t)::value + 1;
    if (tokens != T) return;
    if constexpr (T <= Simd::direct) {
      if (mode == PAREDOWN_INT8) direct_int8<BITS, T, R>(weight, packed, block, totals);
    }
#ifdef PAREDOWN_EXACT_HALVES
    if constexpr (Simd::by_halves(T)) {
      if (mode == PAREDOWN_EXACT) halves_exact<BITS, T>(weight, packed, block, totals);
    } else
#endif
    if (mode == PAREDOWN_EXACT) direct_exact<BITS, T, R>(weight, packed, block, totals);
  });
}

/* Every tile of a span by itself. Only exact mode has several. */
template <int BITS, int R>
void add_tiles(int mode, const Weight &weight, const Packed &packed, int64_t block, const Span &span,
               const paredown_linear *completed, float *totals) {
  for (int64_t tile = span.first; tile < span.last; ++tile) {
    const int64_t start = tile_start(span.tiles, tile), width = tile_start(span.tiles, tile + 1) - start;
    Packed here = packed;
    if (tile > 0) here.x = const_cast<float *>(tile_x<float>(weight, packed, span.tiles, tile, 0));
    add_direct<BITS, R>(mode, weight, here, block, width, totals);
    if (completed != nullptr) finish(*completed, block, R, start, width, totals);
    totals += width * R * ROWS;
  }
}

/* Add the products of R blocks of a weight with the tokens of a span to `totals`. Where they complete a call, write its
 * y tile by tile: its columns lie far apart, and the stores of a tile wait while the next is multiplied. */
template <int R>
void add_product(int mode, const Weight &weight, const Packed &packed, int64_t block, const Span &span,
                 const paredown_linear *completed, float *totals) {
  const int bits = bits_of(weight);
  const bool direct = is_direct<R>(mode, bits, span.tiles);
  each<9>([&](auto b) {
    constexpr int BITS = decltype(b)::value;
    if (bits != BITS) return;
    if constexpr (BITS <= 4 && Simd::direct > 0) {
      if (direct) {
        add_tiles<BITS, R>(mode, weight, packed, block, span, completed, totals);
        return;
      }
    }
    if (mode == PAREDOWN_INT8) buffered_int8<BITS, R>(weight, packed, block, span, completed, totals);
    if (mode == PAREDOWN_EXACT) buffered_exact<BITS, R>(weight, packed, block, span, completed, totals);
  });
}

template <int R>
void multiply_blocks(const Linear &linear, int64_t block, const Span &span, float *totals) {
  const int64_t tokens = tile_start(linear.tiles, span.last) - tile_start(linear.tiles, span.first);
  for (int64_t i = 0; i < tokens * R; ++i) Simd::fstore(totals + i * ROWS, Simd::fset(0.0f));
  const bool low = linear.low.given.n != 0;
  add_product<R>(linear.call->mode, linear.weight, linear.x, block, span, low ? nullptr : linear.call, totals);
  if (low) add_product<R>(PAREDOWN_EXACT, linear.low, linear.low_x, block, span, linear.call, totals);
}

inline bool same_table(const Weight &weight, int64_t block) {
  return table_of(weight, block) == table_of(weight, block + 1);
}

/* Whether block and the next can be taken together: they have one table. One token is limited by how fast codes come,
 * and they come faster in one stream: in pairs, 4096 x 4096 with 2 bits took 65 us, not 60, from the last cache, and
 * exact layers got 15 GB/s, not 24, from memory. */
inline bool in_pair(const Linear &linear, int64_t block, int64_t last) {
  if (block + 1 >= last || linear.call->m == 1) return false;
  if (exact_by_tile(linear.call->mode, bits_of(linear.weight))) return false;
  return same_table(linear.weight, block) && (linear.low.given.n == 0 || same_table(linear.low, block));
}

void multiply(const Linear &linear, int64_t first, int64_t last, int64_t first_tile, int64_t last_tile) {
  alignas(64) float totals[tokens_at_once * Simd::blocks * ROWS];
  const Span span{linear.tiles, first_tile, last_tile};
  for (int64_t block = first; block < last;) {
    if (Simd::blocks == 2 && in_pair(linear, block, last)) {
      multiply_blocks<Simd::blocks>(linear, block, span, totals);
      block += 2;
    } else {
      multiply_blocks<1>(linear, block, span, totals);
      ++block;
    }
  }
}

/* --- the limit that all of this is held against --- */

#ifdef PAREDOWN_OWN_MULTIPLY_BYTES /* where tiles multiply by other instructions than Simd::dot */
int64_t multiply_bytes(int64_t count);
#else
int64_t multiply_bytes(int64_t count) {
#ifdef PAREDOWN_DOT_ONCE
  constexpr int at_once = Simd::tile, inputs = 1;
#else /* inputs of each: a compiler that sees the products would share them */
  constexpr int at_once = Simd::tile < 5 ? Simd::tile : 5, inputs = at_once;
#endif
  alignas(64) uint8_t bytes[at_once][UNIT_BYTES] = {};
  alignas(64) int8_t x[inputs * 4] = {};
  __asm__ volatile("" : : "r"(bytes), "r"(x) : "memory");
  const Operand w = Simd::operand(Simd::load(bytes[0]));
  I sum[at_once]; /* that do not wait for one another, and none known to equal another */
  each<at_once>([&](auto i) { sum[i.value] = Simd::load(bytes[i.value]); });
  int64_t done = 0;
  for (; done < count; done += at_once * ROWS * 4) {
    __asm__ volatile("" : : "r"(x) : "memory");
    each<at_once>([&](auto i) { sum[i.value] = Simd::dot(sum[i.value], w, x + decltype(i)::value % inputs * 4); });
  }
  each<at_once>([&](auto i) { Simd::store(bytes[i.value], sum[i.value]); });
  __asm__ volatile("" : : "r"(bytes) : "memory");
  return done;
}
#endif

/* --- activations --- */

/* Round the inputs of one token in one run to bytes: `at` is its place in the tile, `quads` those of the run. */
inline void pack_run(const char *x, int32_t type, int64_t inputs, const Weight &weight, int64_t width, int8_t *to,
                     float *scale, int32_t *correction) {
  constexpr int most = RUN_STEPS * STEP / ROWS;
  const int64_t element = scale_bytes(type);
  F value[most];
  F most_of = Simd::fset(0.0f);
  int count = 0;
  for (int64_t i = 0; i < inputs; i += ROWS, ++count) {
    value[count] = Simd::load_as_float(x + i * element, type, min_of(ROWS, inputs - i));
    most_of = Simd::fmax(most_of, Simd::fabs(value[count]));
  }
  const float largest = Simd::fmax_of(most_of);
  float factor = 127.0f / largest;
  const bool nothing = !(factor <= 3.4028235e38f); /* a run of zeros, or nearly */
  if (nothing) factor = 0.0f;
  I sum = Simd::set(0);
  for (int i = 0; i < count; ++i) {
    alignas(16) int8_t bytes[ROWS];
    const I q = Simd::to_int(Simd::fmul(value[i], Simd::fset(factor)));
    sum = Simd::add(sum, q);
    Simd::bytes_of(q, bytes);
    for (int quad = 0; quad < ROWS / 4; ++quad) {
      __builtin_memcpy(to + (i * (ROWS / 4) + quad) * width * 4, bytes + quad * 4, 4);
    }
  }
  for (int64_t quad = count * (ROWS / 4); quad % QUADS != 0; ++quad) __builtin_memset(to + quad * width * 4, 0, 4);
  *scale = nothing ? 0.0f : largest / 127.0f * weight.given.unit;
  *correction = (Simd::int8_offset - static_cast<int32_t>(weight.given.zero)) * Simd::sum(sum);
}

/* The inputs of a call for one of its two products. */
struct Inputs {
  const char *x;
  int32_t type;
  int64_t stride; /* bytes from a token to the next */
};

/* Copy a tile as floats: 16 inputs of all its tokens at a time, so that whole lines are written. */
inline void copy_tile(const Weight &weight, const Inputs &from, int64_t width, float *to) {
  const char *x = from.x;
  for (int64_t group = 0; group < weight.groups; ++group) {
    const int64_t inputs = group_inputs(weight, group), filled = ceil_div(inputs, STEP) * STEP;
    for (int64_t i = 0; i < filled; i += ROWS) {
      const int64_t here = min_of(ROWS, inputs - i);
      for (int64_t token = 0; token < width; ++token) {
        alignas(64) float value[ROWS];
        const char *at = x + token * from.stride + i * scale_bytes(from.type);
        Simd::fstore(value, here <= 0 ? Simd::fset(0.0f) : Simd::load_as_float(at, from.type, here));
        for (int quad = 0; quad < ROWS / 4; ++quad) {
          __builtin_memcpy(to + (quad * width + token) * 4, value + quad * 4, 4 * sizeof(float));
        }
      }
      to += ROWS * width;
    }
    x += inputs * scale_bytes(from.type);
  }
}

/* Round a tile; a run of each token has its own scale. */
inline void round_tile(const Weight &weight, const Inputs &from, int64_t width, const Packed &to) {
  for (int64_t token = 0; token < width; ++token) {
    const char *x = from.x + token * from.stride;
    int8_t *bytes = static_cast<int8_t *>(to.x) + token * 4;
    int64_t run = token;
    for (int64_t group = 0; group < weight.groups; ++group) {
      const int64_t inputs = group_inputs(weight, group);
      for (int64_t done = 0; done < inputs; done += RUN_STEPS * STEP, run += width) {
        const int64_t here = min_of(RUN_STEPS * STEP, inputs - done);
        const char *at = x + done * scale_bytes(from.type);
        pack_run(at, from.type, here, weight, width, bytes, to.scale + run, to.correction + run);
        bytes += ceil_div(here, STEP) * STEP * width;
      }
      x += inputs * scale_bytes(from.type);
    }
  }
}

inline void pack_tile(const Weight &weight, int mode, const Inputs &from, const Tiles &tiles, int64_t tile,
                      const Packed &to) {
  const int64_t start = tile_start(tiles, tile), width = tile_start(tiles, tile + 1) - start;
  const Inputs here{from.x + start * from.stride, from.type, from.stride};
  const int64_t at = start * weight.steps * STEP, run = start * weight.runs;
  if (mode == PAREDOWN_EXACT) return copy_tile(weight, here, width, static_cast<float *>(to.x) + at);
  round_tile(weight, here, width, {static_cast<int8_t *>(to.x) + at, to.scale + run, to.correction + run});
}

void pack(const Linear &linear, int64_t first, int64_t last) {
  const paredown_linear &call = *linear.call;
  const int64_t element = scale_bytes(call.type);
  const Inputs x{static_cast<const char *>(call.x), call.type, call.x_stride * element};
  const Inputs low_x{static_cast<const char *>(call.low_x), call.type, call.low_stride * element};
  for (int64_t tile = first; tile < last; ++tile) {
    pack_tile(linear.weight, call.mode, x, linear.tiles, tile, linear.x);
    if (linear.low.given.n != 0) pack_tile(linear.low, PAREDOWN_EXACT, low_x, linear.tiles, tile, linear.low_x);
  }
}

}  // namespace
}  // namespace paredown
