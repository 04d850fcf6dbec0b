/* y = act(x W^T + low_x low^T + bias), W in layout mma16 (../layout_mma16.py), one template for all widths and kinds.
 *
 * Weights are operand A: 16 rows of W to an mma, 8 rows of x ("tokens"). A unit (16 rows x 128 inputs) is decoded in
 * registers by one warp, 4 steps of 32 inputs, and multiplied with NT tiles of 8 tokens. Sums over a slot (the inputs
 * that share a scale) stay in `part`; scales multiply them into `total`, in float32.
 *
 *   gemv    m <= 16      block = RB x 16 rows, 8 warps, each an eighth of the units:
 *
 *                          units 0 .. | warp 1 | warp 2 | .. | warp 7      each warp has a ring of STAGES units in
 *                          RB x 16 rows of W, x from L1 / L2               shared memory that it alone fills and reads
 *
 *                        then one sum over the 8 warps in shared memory, in a fixed order. No workspace.
 *   tile    m > 16       block = 8 warps x 16 rows, NT x 8 tokens; all warps share each unit's x, which is staged in
 *                        shared memory together with their weights; the grid's z shares out the units.
 *
 * Arguments and launch parameters: launch.py. Names: paredown_<form>_<kind>_b<bits>.
 */
#ifndef PAREDOWN_CUDA_LINEAR_CUH
#define PAREDOWN_CUDA_LINEAR_CUH

#include "decode.cuh"
#include "finish.cuh"

namespace paredown {

constexpr int THREADS = 256, WARPS = THREADS / 32;

struct Linear {
  const unsigned char *codes;
  const uint32_t *table;
  const void *scale;
  const unsigned char *x;
  const float *x_scale;
  const void *bias;
  const uint16_t *low, *low_x;
  int n, m, k, units, slots, steps_per_slot, units_per_slot, table_rows, x_stride;
  int scale_type, low_type, rank, low_stride;
  float unit;
  uint32_t shift;
};

/* Sums of RB blocks of 16 rows x NT tiles of 8 tokens; [0], [1] are tokens 2 t, 2 t + 1 of row g, [2], [3] of g + 8. */
template <int RB, int NT>
struct Total {
  float sum[RB][NT][4] = {};
};

/* Where a lane is in an mma. */
struct Lane {
  int index, g, t;
  PD_DEVICE explicit Lane(int thread) : index(thread & 31), g((thread & 31) >> 2), t(thread & 3) {}
};

PD_DEVICE float load_scale(const void *scale, int64_t index, int type) {
  if (type == PD_F32) return float_of(load4(static_cast<const uint32_t *>(scale) + index));
  const uint16_t half = load2(static_cast<const uint16_t *>(scale) + index);
  return type == PD_F16 ? from_f16(half) : from_bf16(half);
}

/* The scales of rows g and g + 8 of a block in a slot. */
struct RowScales {
  float lower, upper;
};

/* The scales of x for tokens 2 t and 2 t + 1 of a tile in a slot, and the sums of their bytes. */
struct TokenScales {
  float scale[2], sum[2];

  /* A slot of x is one of W, except that whole units are slots of their own. */
  PD_DEVICE void read(const Linear &p, int slot, int tile, const Lane &lane) {
    const int tiles = (p.m + 7) / 8;
    if (tile >= tiles) tile = tiles - 1;  // of tokens that are not there; nobody uses the result
    const uint4 bits = load16(p.x_scale + ((static_cast<int64_t>(slot) * tiles + tile) * 8 + 2 * lane.t) * 2);
    scale[0] = float_of(bits.x), sum[0] = float_of(bits.y), scale[1] = float_of(bits.z), sum[1] = float_of(bits.w);
  }
};

/* Walks through the slots of one block, a unit at a time. WHOLE: slots are whole units and scales float16, which is the
 * common case and has a loop of its own; the other loop looks everything up when it needs it. */
template <bool WHOLE>
struct Slots {
  const unsigned char *here;
  int64_t first;
  int slot, left;

  PD_DEVICE Slots(const Linear &p, int block, int unit, const Lane &lane) {
    first = static_cast<int64_t>(block) * p.slots * BLOCK_ROWS + lane.g;
    const int each = p.units_per_slot;
    slot = p.steps_per_slot == UNIT_STEPS ? unit / each : unit * (UNIT_STEPS >> (p.steps_per_slot >> 1));
    left = each - unit % each;
    here = static_cast<const unsigned char *>(p.scale) + 2 * (first + static_cast<int64_t>(slot) * BLOCK_ROWS);
  }
  /* The scales of a step of the unit where it is. */
  PD_DEVICE RowScales read(const Linear &p, int step) const {
    if constexpr (WHOLE) return {from_f16(load2(here)), from_f16(load2(here + 16))};
    const int at = p.steps_per_slot == UNIT_STEPS ? slot : slot + (step >> (p.steps_per_slot >> 1));
    const int64_t index = first + static_cast<int64_t>(at) * BLOCK_ROWS;
    return {load_scale(p.scale, index, p.scale_type), load_scale(p.scale, index + 8, p.scale_type)};
  }
  PD_DEVICE void next(const Linear &p) {
    if (!WHOLE && p.steps_per_slot < UNIT_STEPS) {
      slot += UNIT_STEPS >> (p.steps_per_slot >> 1);
    } else if (--left == 0) {
      left = p.units_per_slot, ++slot, here += 2 * BLOCK_ROWS;
    }
  }
};

/* total += scale * part, and part starts anew. For bytes: also the scales of x, and the zero point by the sums of x. */
template <class K>
PD_DEVICE void flush(const Linear &p, float (&total)[4], typename K::Part (&part)[4], const RowScales &rows,
                     const TokenScales &tokens) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float by = i < 2 ? rows.lower : rows.upper;
    if constexpr (K::X_BYTES == 1) {
      const float sum = float_of(static_cast<uint32_t>(part[i])) - K::OFFSET - float_of(p.shift) * tokens.sum[i % 2];
      total[i] += sum * (by * tokens.scale[i % 2]);
    } else {
      total[i] += part[i] * by;
    }
    part[i] = K::START;
  }
}

/* Add the product of one unit of a block. `x(nt, step, b)` puts what a lane multiplies in a step into b, and
 * `x.scales(..)` gives the scales of tokens in the slot of a step. */
template <class K, int BITS, int NT, bool WHOLE, class X>
PD_DEVICE void multiply(const Linear &p, float (&total)[NT][4], const Words<BITS> &words,
                        const typename K::template Table<BITS> &table, const X &x, const RowScales &whole,
                        const Slots<WHOLE> &slots) {
  typename K::Part part[NT][4];
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
    for (int i = 0; i < 4; ++i) part[nt][i] = K::START;
  }
#pragma unroll
  for (int step = 0; step < UNIT_STEPS; ++step) {
    uint32_t a[K::MMAS][4];
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) table.decode(a, words.codes(upper, step), upper);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      uint32_t b[2 * K::MMAS];
      x(nt, step, b);
#pragma unroll
      for (int f = 0; f < K::MMAS; ++f) K::mma(part[nt], a[f], b[2 * f], b[2 * f + 1]);
    }
    const bool ends = WHOLE ? step == UNIT_STEPS - 1 : ((step + 1) & (p.steps_per_slot - 1)) == 0;
    if (!ends) continue;
    const RowScales rows = WHOLE ? whole : slots.read(p, step);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      TokenScales tokens;
      if constexpr (K::X_BYTES == 1) x.scales(tokens, nt, step);
      flush<K>(p, total[nt], part[nt], rows, tokens);
    }
  }
}

/* Start copying what one lane will read of a unit. */
template <int BITS>
PD_DEVICE void copy_own(unsigned char *to, const unsigned char *from, int lane, uint64_t policy) {
  copy16_once(to + 16 * lane, from + 16 * lane, policy);
  if constexpr (BITS == 4) copy16_once(to + 512 + 16 * lane, from + 512 + 16 * lane, policy);
  if constexpr (BITS == 3) copy8_once(to + 512 + 8 * lane, from + 512 + 8 * lane, policy);
}

/* Add the low-rank term, 32 ranks at a time; `slice` of `slices` warps that share the rows do every so manyth. */
template <int RB, int NT>
PD_DEVICE void add_low_rank(const Linear &p, Total<RB, NT> &total, int first_row, int first_token, int slice, int slices,
                            const Lane &lane) {
  const int columns = (p.rank + 31) / 32 * 32;
#pragma unroll 1
  for (int start = 32 * slice; start < p.rank; start += 32 * slices) {
    const int rank = start + 8 * lane.t;
    uint32_t a[RB][2][4];
#pragma unroll
    for (int rb = 0; rb < RB; ++rb) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        int row = first_row + BLOCK_ROWS * rb + lane.g + 8 * upper;
        row = row < p.n ? row : p.n - 1;
        const uint4 left = load16(p.low + static_cast<int64_t>(row) * columns + rank);
        a[rb][0][upper] = left.x, a[rb][0][2 + upper] = left.y, a[rb][1][upper] = left.z, a[rb][1][2 + upper] = left.w;
      }
    }
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const int token = first_token + 8 * nt + lane.g;
      uint32_t b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint16_t *from = p.low_x + static_cast<int64_t>(token) * p.low_stride + rank + 2 * i;
        const uint32_t even = token < p.m && rank + 2 * i < p.rank ? load2(from) : 0u;
        const uint32_t odd = token < p.m && rank + 2 * i + 1 < p.rank ? load2(from + 1) : 0u;
        b[i] = even | (odd << 16);
      }
#pragma unroll
      for (int rb = 0; rb < RB; ++rb) {
#pragma unroll
        for (int f = 0; f < 2; ++f) {
          if (p.low_type == PD_F16) {
            mma_f16(total.sum[rb][nt], a[rb][f], b[2 * f], b[2 * f + 1]);
          } else {
            mma_bf16(total.sum[rb][nt], a[rb][f], b[2 * f], b[2 * f + 1]);
          }
        }
      }
    }
  }
}

/* Lay sums out by token, rows side by side; 4 floats more for each token keep the lanes of a store in different banks. */
template <int ROWS, int RB, int NT>
PD_DEVICE void spread(float *sums, const Total<RB, NT> &total, int first_row, const Lane &lane) {
#pragma unroll
  for (int rb = 0; rb < RB; ++rb) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * nt + 2 * lane.t + i % 2, row = first_row + BLOCK_ROWS * rb + lane.g + 8 * (i / 2);
        sums[token * (ROWS + 4) + row] = total.sum[rb][nt][i];
      }
    }
  }
}

/* Add up what SLICES warps spread, in their order, and write y. */
template <int ROWS, int TOKENS, int SLICES>
PD_DEVICE void write_sums(const float *sums, const Linear &p, const Output &out, int first_row, int first_token) {
#pragma unroll 1
  for (int i = thread_index(); i < ROWS * TOKENS; i += THREADS) {
    const int row = i % ROWS, token = i / ROWS;
    if (first_row + row >= p.n || first_token + token >= p.m) continue;
    float sum = 0.0f;
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice) sum += sums[(slice * TOKENS + token) * (ROWS + 4) + row];
    out.write(sum, first_row + row, first_token + token);
  }
}

template <int RB, int NT>
PD_DEVICE void scale_by_unit(const Linear &p, Total<RB, NT> &total) {
#pragma unroll
  for (int rb = 0; rb < RB; ++rb) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int i = 0; i < 4; ++i) total.sum[rb][nt][i] *= p.unit;
    }
  }
}

/* Read the table of a block into registers. */
template <class T>
PD_DEVICE void read_table(T &table, const Linear &p, int block) {
  const int index = p.table_rows ? block / (p.table_rows / BLOCK_ROWS) : 0;
  table.read(p.table + static_cast<int64_t>(index) * T::WORDS, {p.shift, static_cast<uint32_t>(p.n) >> 31});
}

}  // namespace paredown

#include "gemv.cuh"
#include "tile.cuh"

#define PD_LINEAR_PARAMETERS                                                                                          \
  const unsigned char *codes, const uint32_t *table, const void *scale, const unsigned char *x, const float *x_scale, \
      const void *bias, const uint16_t *low, const uint16_t *low_x, int n, int m, int k, int units, int slots,        \
      int steps_per_slot, int units_per_slot, int table_rows, int x_stride, int y_stride, int scale_type, int y_type, \
      int low_type, int activation, int has_bias, int rank, int low_stride, int unit_bits, int shift_bits, void *y

#define PD_LINEAR_VALUES                                                                                        \
  const paredown::Linear linear{codes, table, scale, x, x_scale, bias, low, low_x, n, m, k, units, slots,        \
                                steps_per_slot, units_per_slot, table_rows, x_stride, scale_type, low_type, rank, \
                                low_stride, paredown::float_of(static_cast<uint32_t>(unit_bits)),               \
                                static_cast<uint32_t>(shift_bits)};                                             \
  const paredown::Output output{y, has_bias ? bias : nullptr, y_stride, n, m, y_type, activation}

/* The kernels of one kind and width. The blocks per multiprocessor leave registers for the sums of each form. */
#define PD_LINEAR_KERNEL(form, KIND, kind, BITS, blocks, ...)                                       \
  PD_KERNEL PD_THREADS(256, blocks) paredown_##form##_##kind##_b##BITS(PD_LINEAR_PARAMETERS) {      \
    PD_LINEAR_VALUES;                                                                               \
    paredown::__VA_ARGS__(linear, output);                                                          \
  }
#define PD_LINEAR_KERNELS(KIND, kind, BITS)                                                                     \
  PD_LINEAR_KERNEL(gemv_r16_m8, KIND, kind, BITS, 2, run_gemv<paredown::KIND, BITS, 1, 1>)                      \
  PD_LINEAR_KERNEL(gemv_r32_m8, KIND, kind, BITS, 2, run_gemv<paredown::KIND, BITS, 2, 1>)                      \
  PD_LINEAR_KERNEL(gemv_r16_m16, KIND, kind, BITS, 2, run_gemv<paredown::KIND, BITS, 1, 2>)                     \
  PD_LINEAR_KERNEL(gemv_r32_m16, KIND, kind, BITS, 2, run_gemv<paredown::KIND, BITS, 2, 2>)                     \
  PD_LINEAR_KERNEL(tile_r128_m32, KIND, kind, BITS, 2, run_tile<paredown::KIND, BITS, 4>)                       \
  PD_LINEAR_KERNEL(tile_r128_m64, KIND, kind, BITS, 1, run_tile<paredown::KIND, BITS, 8>)

#endif
