/* What one instruction set offers to api.cpp, and the values that both sides work on.
 *
 * Words of this folder: a block is 16 rows of W; a step 32 inputs; a quad 4 inputs; a run up to 4 steps of one group,
 * whose inputs share a scale in int8 mode; a tile the tokens (rows of x) that are multiplied at once.
 *
 * Activations are rearranged first ("packed"): every group is filled up to whole steps with zeros, and each tile is
 * [quad][token][4], floats or signed bytes, so that the inner loop reads them in order.
 *
 * Each translation unit of an instruction set has flags of its own, so none may share code with another: functions of
 * headers stand in unnamed namespaces.
 */
#ifndef PAREDOWN_ISA_H
#define PAREDOWN_ISA_H

#include "paredown.h"

namespace paredown {

enum { ROWS = 16, STEP = 32, QUADS = 8, RUN_STEPS = 4, UNIT_BYTES = 64 };

namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

/* A weight with what follows from its sizes. */
struct Weight {
  paredown_weight given;
  int64_t group;       /* inputs of a group, at least 1 */
  int64_t groups;      /* of a row */
  int64_t blocks;      /* of 16 rows */
  int64_t steps;       /* of a row, all groups */
  int64_t runs;        /* of a row, all groups */
  int64_t block_bytes; /* of codes */
  bool identity;       /* 8 bits, and entry i of the table is i: nothing to look up */
};

/* Packed activations. Tile by tile, each `packed_width` elements and `runs` scales and corrections for each token. */
struct Packed {
  void *x;             /* float, or int8_t */
  float *scale;        /* int8 mode: [run][token] of each tile, times the unit of the weight */
  int32_t *correction; /* int8 mode: [run][token] of each tile: what the inner products miss of the table's zero */
};

/* The table of a block as floats, (entry - zero) * unit. */
struct FloatTable {
  alignas(64) float entry[256];
  float zero, unit;
};

/* Tokens cut into tiles of nearly equal width: the first `wide` tiles have one token more. */
struct Tiles {
  int64_t count, width, wide;
};

namespace {

/* The first token of a tile; of one past the last, the number of tokens. */
inline int64_t tile_start(const Tiles &tiles, int64_t tile) { return tile * tiles.width + min_of(tile, tiles.wide); }

/* The width of the codes, 0 for 8 bits without a table. */
inline int bits_of(const Weight &weight) { return weight.identity ? 0 : weight.given.bits; }

/* Whether a product may decode its weight anew for each tile of tokens: in exact mode, and cheap enough. */
inline bool may_decode_by_tile(int mode, int bits) { return mode == PAREDOWN_EXACT && bits >= 1 && bits <= 4; }

/* Inputs of one group: the last may be short. */
inline int64_t group_inputs(const Weight &weight, int64_t group) {
  return min_of(weight.group, weight.given.k - group * weight.group);
}

}  // namespace

struct Linear {
  const paredown_linear *call;
  Weight weight, low; /* low.given.n is 0 where there is no low-rank term */
  Packed x, low_x;
  Tiles tiles;
};

struct Conv;
struct ConvPart;

/* How an instruction set convolves. */
struct Convolution {
  int32_t tile;   /* most outputs of a row at once */
  int32_t offset; /* operands are table bytes less this */
  /* The largest |x| of `count` values. */
  float (*largest)(const void *x, int32_t type, int64_t count);
  /* Round one row of an image, and write it with its border. */
  void (*round_row)(const Conv &conv, int64_t image, int64_t row);
  /* Multiply the images by blocks [first, last), and write y. */
  void (*convolve)(const Conv &conv, int64_t first, int64_t last, const ConvPart &part);
};

struct Isa {
  const char *name;
  int32_t tile[2];         /* the widest tile, by mode */
  int32_t narrow_tile;     /* the widest where may_decode_by_tile, for up to narrow_tokens */
  int32_t narrow_tokens;
  int32_t tokens;  /* the most that one call of `multiply` takes */
  /* Pack tiles [first, last) of the activations, and of the low-rank ones. */
  void (*pack)(const Linear &linear, int64_t first, int64_t last);
  /* Multiply tiles [first_tile, last_tile) by blocks [first, last), and write y. */
  void (*multiply)(const Linear &linear, int64_t first, int64_t last, int64_t first_tile, int64_t last_tile);
  const Convolution *convolution;
  /* Multiply at least `count` pairs of bytes in registers; return how many. */
  int64_t (*multiply_bytes)(int64_t count);
};

/* Defined in isa_<name>.cpp; dispatch.cpp names those that were built. */
extern const Isa portable_isa, avx2_isa, avxvnni_isa, avx512vnni_isa, amx_isa, neon_isa, dotprod_isa, i8mm_isa;

/* The instruction set in use. */
const Isa &isa_in_use();

}  // namespace paredown

#endif
