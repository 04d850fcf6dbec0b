/* What goes before and after the products: rounding or filling up x, layouts, decoding W whole, sums of parts.
 *
 * Arguments and launch parameters: launch.py. `group` is the number of inputs of a group, k where there is one group.
 */
#include "../lut_decode.h"
#include "decode.cuh"
#include "finish.cuh"

namespace paredown {

/* The input at a place of a row that is filled up group by group, or -1. */
PD_DEVICE int input_at(int place, int k, int group, int group_steps) {
  const int of = place / (group_steps * STEP), within = place % (group_steps * STEP), input = of * group + within;
  return within < group && input < k ? input : -1;
}

PD_DEVICE float load_number(const void *x, int64_t index, int type) {
  if (type == PD_F32) return float_of(load4(static_cast<const uint32_t *>(x) + index));
  const uint16_t half = load2(static_cast<const uint16_t *>(x) + index);
  return type == PD_F16 ? from_f16(half) : from_bf16(half);
}

/* Where byte 0 of the 8 inputs of a token, step and t lies in q: the order in which lanes load operand B. */
PD_DEVICE int64_t place_in_q(int token, int step, int t, int units) {
  const int64_t unit = static_cast<int64_t>(token / 8) * units + step / UNIT_STEPS;
  const int in_unit = step % UNIT_STEPS;
  return (unit * 2 + in_unit / 2) * 512 + ((token % 8) * 4 + t) * 16 + in_unit % 2 * 8;
}

/* Where a token's (scale, sum) of a slot lies, in pairs of floats. */
PD_DEVICE int64_t place_in_scales(int token, int slot, int m) {
  return (static_cast<int64_t>(slot) * ((m + 7) / 8) + token / 8) * 8 + token % 8;
}

/* The 8 codes of a lane in a step, in nibbles as `Words` has them, read where they lie. */
PD_DEVICE uint32_t codes_at(const unsigned char *unit, int bits, int lane, int upper, int step) {
  if (bits == 4) return load4(unit + step / 2 * 512 + lane * 16 + upper * 8 + step % 2 * 4);
  const uint32_t two = (load4(unit + lane * 16 + upper * 8 + step / 2 * 4) >> (2 * (step % 2))) & 0x33333333u;
  if (bits == 2) return two;
  return two | ((load4(unit + 512 + lane * 8 + upper * 4) >> step) & 0x11111111u) << 2;
}

/* Write 8 neighbouring elements of W, at once where they are whole and aligned. */
PD_DEVICE void write_eight(void *w, int64_t index, const float (&value)[8], int count, int type) {
  if (type == PD_F32) {
    for (int i = 0; i < 8; ++i) {
      if (i < count) static_cast<float *>(w)[index + i] = value[i];
    }
    return;
  }
  uint16_t half[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) half[i] = type == PD_F16 ? to_f16(value[i]) : to_bf16(value[i]);
  uint16_t *out = static_cast<uint16_t *>(w) + index;
  if (count == 8 && reinterpret_cast<uint64_t>(out) % 16 == 0) {
    uint4 all;
    all.x = half[0] | static_cast<uint32_t>(half[1]) << 16, all.y = half[2] | static_cast<uint32_t>(half[3]) << 16;
    all.z = half[4] | static_cast<uint32_t>(half[5]) << 16, all.w = half[6] | static_cast<uint32_t>(half[7]) << 16;
    *reinterpret_cast<uint4 *>(out) = all;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) out[i] = half[i];
  }
}

/* The word of layout mma16 at `index` of a unit, from the words of c16. */
template <int BITS>
PD_DEVICE uint32_t repacked(const uint32_t *c16, int block, int unit, int steps, int index) {
  using P = Planes<BITS>;
  uint32_t out = 0;
#pragma unroll
  for (int plane = 0; plane < P::count; ++plane) {
    const int width = P::width(plane), begin = 64 * P::place(plane), at = index - begin;
    if (at < 0 || at >= 64 * width) continue;
    const int each = width == 1 ? 2 : 4, lane = at / each % 32, i = at % each;
    const int upper = width == 1 ? i : i / 2, word = width == 1 ? 0 : at / 128 * 2 + i % 2;
    const int row = lane / 4 + 8 * upper, t = lane % 4;
    for (int e = 0; e < 4 / width; ++e) {
      const int step = unit * UNIT_STEPS + word * (4 / width) + e;
      if (step >= steps) continue;
      for (int f = 0; f < 2; ++f) {
        const int quad = 2 * t + f;
        const int64_t from = (static_cast<int64_t>(block) * steps + step) * BITS + P::word(plane, quad);
        const uint32_t four = load4(c16 + from * BLOCK_ROWS + row) >> P::shift(plane, quad);
        out |= (four & in_each_byte((1u << width) - 1u)) << (4 * f + width * e);
      }
    }
  }
  return out;
}

}  // namespace paredown

using namespace paredown;

/* Round x to bytes in runs of up to 128 inputs within each group, as cpu/paredown.h says; a warp for each run. */
PD_KERNEL PD_THREADS(256, 1)
    paredown_quantize(const void *x, int m, int k, int group, int group_steps, int units, int steps_per_slot,
                      int x_stride, int x_type, int8_t *q, float *q_scale) {
  const int lane = thread_index() % 32, token = block_index_x();
  const int runs = (group_steps + UNIT_STEPS - 1) / UNIT_STEPS, run = block_index_y() * 8 + thread_index() / 32;
  const int begin = run / runs * group + run % runs * UNIT, end_of_group = (run / runs + 1) * group;
  const int end_of_run = begin + UNIT < end_of_group ? begin + UNIT : end_of_group, end = end_of_run < k ? end_of_run : k;
  if (begin >= end) return;

  float value[4], most = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int input = begin + 4 * lane + i;
    value[i] = input < end ? load_number(x, static_cast<int64_t>(token) * x_stride + input, x_type) : 0.0f;
    const float size = value[i] < 0.0f ? -value[i] : value[i];
    most = size > most ? size : most;
  }
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) most = max_across(most, lanes);
  const float inverse = most > 0.0f ? 127.0f / most : 0.0f;

  const int first_step = run / runs * group_steps + run % runs * UNIT_STEPS, steps = (end - begin + STEP - 1) / STEP;
  const int step = first_step + lane / 8;
  int8_t *out = q + place_in_q(token, step, lane % 8 / 2, units) + lane % 2;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int rounded = round_to_int(value[i] * inverse);
    rounded = rounded > 127 ? 127 : rounded < -127 ? -127 : rounded;  // only where 127 / most overflows
    sum += rounded;
    if (lane / 8 < steps) out[2 * i] = static_cast<int8_t>(rounded);
  }
#pragma unroll
  for (int lanes = 1; lanes < 8; lanes *= 2) sum = add_across(sum, lanes);
  const int beside = add_across(sum, 8);
  if (steps_per_slot >= 2) sum = beside;
  const int across = add_across(sum, 16);
  if (steps_per_slot == UNIT_STEPS) sum = across;
  if (lane % 8 == 0 && lane / 8 < steps && lane / 8 % steps_per_slot == 0) {
    float *pair = q_scale + 2 * place_in_scales(token, step / steps_per_slot, m);
    pair[0] = most / 127.0f, pair[1] = static_cast<float>(sum);
  }
  // The last run also clears the steps that fill up the last unit: the table's entry of code 0 stands there.
  const int beyond = first_step + steps + lane / 8;
  if (end == k && beyond < units * UNIT_STEPS) {
    for (int i = 0; i < 4; ++i) q[place_in_q(token, beyond, lane % 8 / 2, units) + lane % 2 + 2 * i] = 0;
    if (lane % 8 == 0 && beyond % steps_per_slot == 0) {
      float *pair = q_scale + 2 * place_in_scales(token, beyond / steps_per_slot, m);
      pair[0] = 0.0f, pair[1] = 0.0f;
    }
  }
}

/* Copy rows of halves, each group filled up with zeros to whole steps and the row to whole units. */
PD_KERNEL PD_THREADS(256, 1) paredown_pad(const uint16_t *x, int m, int k, int group, int group_steps, int units,
                                          int x_stride, uint16_t *out) {
  const int place = block_index_y() * 256 + thread_index(), token = block_index_x(), columns = units * UNIT;
  if (place >= columns || token >= m) return;
  const int input = input_at(place, k, group, group_steps);
  out[static_cast<int64_t>(token) * columns + place] =
      input < 0 ? uint16_t{0} : load2(x + static_cast<int64_t>(token) * x_stride + input);
}

/* Decode W to (n, k): table values in float32, (entry - zero) unit, times scale, rounded once. */
PD_KERNEL PD_THREADS(256, 1)
    paredown_dense(const unsigned char *codes, const uint32_t *table, const void *scale, int n, int k, int bits,
                   int group, int group_steps, int units, int slots, int steps_per_slot, int units_per_slot,
                   int table_rows, int scale_type, int w_type, void *w) {
  const int unit = block_index_x() * 8 + thread_index() / 32, block = block_index_y(), lane = thread_index() % 32;
  if (unit >= units) return;
  const unsigned char *from = codes + (static_cast<int64_t>(block) * units + unit) * (BLOCK_ROWS * UNIT * bits / 8);
  const uint32_t *values = table + (table_rows ? static_cast<int64_t>(block * BLOCK_ROWS / table_rows) << bits : 0);
#pragma unroll 1
  for (int i = 0; i < 2 * UNIT_STEPS; ++i) {
    const int step = i / 2, upper = i % 2, row = block * BLOCK_ROWS + lane / 4 + 8 * upper;
    const int at = unit * UNIT_STEPS + step, within = at % group_steps * STEP + 8 * (lane % 4);
    const int column = at / group_steps * group + within;
    const int end = (at / group_steps + 1) * group < k ? (at / group_steps + 1) * group : k;
    if (row >= n || column >= end) continue;
    const int slot = steps_per_slot == UNIT_STEPS ? unit / units_per_slot : at / steps_per_slot;
    const int64_t place = (static_cast<int64_t>(block) * slots + slot) * BLOCK_ROWS + lane / 4 + 8 * upper;
    const float by = load_number(scale, place, scale_type);
    const uint32_t eight = codes_at(from, bits, lane, upper, step);
    float value[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {  // input 4 f + b is in nibble 2 b + f
      value[j] = float_of(load4(values + ((eight >> (4 * (2 * (j % 4) + j / 4))) & 15u))) * by;
    }
    write_eight(w, static_cast<int64_t>(row) * k + column, value, end - column < 8 ? end - column : 8, w_type);
  }
}

/* Codes of layout c16 to layout mma16; a thread for each word. */
PD_KERNEL PD_THREADS(256, 1)
    paredown_repack(const uint32_t *c16, int n, int bits, int steps, int units, uint32_t *codes) {
  const int word = block_index_x() * 256 + thread_index(), block = block_index_y(), each = 64 * bits;
  if (word >= units * each || block * BLOCK_ROWS >= n) return;
  const int unit = word / each, index = word % each;
  codes[static_cast<int64_t>(block) * units * each + word] = bits == 2   ? repacked<2>(c16, block, unit, steps, index)
                                                             : bits == 3 ? repacked<3>(c16, block, unit, steps, index)
                                                                         : repacked<4>(c16, block, unit, steps, index);
}

/* y = act(sum of the parts + bias), parts in their order. */
PD_KERNEL PD_THREADS(256, 1) paredown_reduce(const float *partial, const void *bias, int n, int m, int splits,
                                             int y_stride, int y_type, int activation, int has_bias, void *y) {
  const int column = block_index_y() * 256 + thread_index(), row = block_index_x();
  if (column >= n) return;
  const Output output{y, has_bias ? bias : nullptr, y_stride, n, m, y_type, activation};
  float sum = 0.0f;
  for (int part = 0; part < splits; ++part) {
    sum += float_of(load4(partial + (static_cast<int64_t>(part) * m + row) * n + column));
  }
  output.finish(sum, column, row);
}
