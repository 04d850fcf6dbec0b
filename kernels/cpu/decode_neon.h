/* From units to table entries with NEON; part of simd_neon.h. A part is one register of a unit: four rows.
 *
 *   Bytes<BITS>.quad<Q>(unit)        the table's bytes of quad Q less 128, from the parts of a step's units
 *   Floats<BITS>.quad<Q>(unit, out)  the table's floats of the four inputs of quad Q, from parts in order (input, row)
 *
 * BITS = 0 stands for 8 bits without a table (entry i is i). Bytes are less 128 because sdot and smmla multiply signed
 * ones. `tbl` gives 0 for an index above its table: below 4 bits a whole nibble is the index, into a table of its own
 * for each place that a code can have in it, so that codes need not be masked one by one. Quads share what they have in
 * common (nibbles, merged planes): the compiler sees that they are the same.
 */
#ifndef PAREDOWN_DECODE_NEON_H
#define PAREDOWN_DECODE_NEON_H

#include "../lut_decode.h"
#include "simd_neon.h"

namespace paredown {
namespace {

inline uint8x16_t low_nibble(uint8x16_t v) { return vandq_u8(v, vdupq_n_u8(15)); }
inline uint8x16_t high_nibble(uint8x16_t v) { return vshrq_n_u8(v, 4); }

/* The codes of quad Q, each alone in its byte. `plane` counts the planes that are done. */
template <int BITS, int Q, int PLANE = 0>
inline uint8x16_t codes_of(const uint8x16_t *unit) {
  using P = Planes<BITS>;
  constexpr int width = P::width(PLANE), shift = P::shift(PLANE, Q);
  uint8x16_t plane = unit[P::word(PLANE, Q)];
  if constexpr (shift != 0) plane = vshrq_n_u8(plane, shift);
  if constexpr (PLANE + 1 < P::count) {
    /* The next plane lies above this one, and overwrites what this one has there. */
    return vsliq_n_u8(plane, codes_of<BITS, Q, PLANE + 1>(unit), width);
  } else if constexpr (shift + width == 8) {
    return plane;
  } else {
    return vandq_u8(plane, vdupq_n_u8((1 << width) - 1));
  }
}

/* Sixteen entries by what the nibble holds: the code's low bits from bit LOW of it and its highest, for HIGH >= 0, in
 * bit HIGH. */
template <int BITS, int LOW, int HIGH = -1>
inline uint8x16_t spread_bytes(const uint8_t *table) {
  constexpr int low_bits = HIGH < 0 ? BITS : BITS - 1;
  uint8_t entry[16];
  for (int i = 0; i < 16; ++i) {
    const int low = (i >> LOW) & ((1 << low_bits) - 1);
    const int code = HIGH < 0 ? low : low | ((i >> (HIGH < 0 ? 0 : HIGH)) & 1) << low_bits;
    entry[i] = static_cast<uint8_t>(table[code] ^ 0x80);
  }
  return vld1q_u8(entry);
}

template <>
struct Simd::Bytes<0> {
  explicit Bytes(const uint8_t *) {}
  template <int Q>
  uint8x16_t quad(const uint8x16_t *unit) const {
    return veorq_u8(unit[Q], vdupq_n_u8(0x80));
  }
};

template <>
struct Simd::Bytes<1> {
  explicit Bytes(const uint8_t *table)
      : at{spread_bytes<1, 0>(table), spread_bytes<1, 1>(table), spread_bytes<1, 2>(table),
           spread_bytes<1, 3>(table)} {}
  template <int Q>
  uint8x16_t quad(const uint8x16_t *unit) const {
    return vqtbl1q_u8(at[Q % 4], Q < 4 ? low_nibble(unit[0]) : high_nibble(unit[0]));
  }
  uint8x16_t at[4];
};

template <>
struct Simd::Bytes<2> {
  explicit Bytes(const uint8_t *table) : at{spread_bytes<2, 0>(table), spread_bytes<2, 2>(table)} {}
  template <int Q>
  uint8x16_t quad(const uint8x16_t *unit) const {
    return vqtbl1q_u8(at[Q % 2], Q % 4 < 2 ? low_nibble(unit[Q / 4]) : high_nibble(unit[Q / 4]));
  }
  uint8x16_t at[2];
};

/* A nibble of `merged<Q>` holds two bits of quad Q where the plane of two has them, and beside them its bit of the
 * other plane. Quads 0 and 3 (4 and 7) come from one unit and have their third bits 3 apart, so one shift brings both
 * to their places; those of quads 1 and 6 are there already, and those of 5 and 2 are with the nibbles exchanged. */
template <>
struct Simd::Bytes<3> {
  explicit Bytes(const uint8_t *table) : below(spread_bytes<3, 0, 2>(table)), above(spread_bytes<3, 2, 1>(table)) {}
  template <int Q>
  uint8x16_t quad(const uint8x16_t *unit) const {
    const uint8x16_t both = merged<Q>(unit[0], unit[1], unit[2]);
    return vqtbl1q_u8(Q % 2 == 0 ? below : above, Q % 4 < 2 ? low_nibble(both) : high_nibble(both));
  }
  template <int Q>
  static uint8x16_t merged(uint8x16_t first, uint8x16_t second, uint8x16_t third) {
    const uint8x16_t ends = vdupq_n_u8(0xC3), quad1 = vdupq_n_u8(0x0C), quad2 = vdupq_n_u8(0x30);
    if constexpr (Q == 0 || Q == 3) return vbslq_u8(ends, first, vshlq_n_u8(third, 2));
    if constexpr (Q == 4 || Q == 7) return vbslq_u8(ends, second, vshrq_n_u8(third, 2));
    if constexpr (Q == 1 || Q == 6) return vbslq_u8(quad1, first, vbslq_u8(quad2, second, third));
    const uint8x16_t exchanged = vsliq_n_u8(vshrq_n_u8(third, 4), third, 4);
    return vbslq_u8(quad1, second, vbslq_u8(quad2, first, exchanged));
  }
  uint8x16_t below, above;
};

template <>
struct Simd::Bytes<4> {
  explicit Bytes(const uint8_t *table) : entries(spread_bytes<4, 0>(table)) {}
  template <int Q>
  uint8x16_t quad(const uint8x16_t *unit) const {
    return vqtbl1q_u8(entries, codes_of<4, Q>(unit));
  }
  uint8x16_t entries;
};

/* 5 to 8 bits: 64 entries at a time; `tbx` leaves a byte whose index is not among them. */
template <int BITS>
struct Simd::Bytes {
  explicit Bytes(const uint8_t *table) {
    for (int i = 0; i < 1 << BITS; ++i) entry[i] = static_cast<uint8_t>(table[i] ^ 0x80);
  }
  template <int Q>
  uint8x16_t quad(const uint8x16_t *unit) const {
    const uint8x16_t codes = codes_of<BITS, Q>(unit);
    if constexpr (BITS == 5) {
      return vqtbl2q_u8({{vld1q_u8(entry), vld1q_u8(entry + 16)}}, codes);
    } else {
      uint8x16_t out = vqtbl4q_u8(entries(0), codes);
      for (int from = 64; from < 1 << BITS; from += 64)
        out = vqtbx4q_u8(out, entries(from), vsubq_u8(codes, vdupq_n_u8(static_cast<uint8_t>(from))));
      return out;
    }
  }
  uint8x16x4_t entries(int from) const {
    const uint8_t *at = entry + from;
    return {{vld1q_u8(at), vld1q_u8(at + 16), vld1q_u8(at + 32), vld1q_u8(at + 48)}};
  }
  alignas(16) uint8_t entry[1 << BITS];
};

template <>
struct Simd::Floats<0> {
  explicit Floats(const FloatTable &table) : zero(vdupq_n_f32(table.zero)), unit_of_table(vdupq_n_f32(table.unit)) {}
  template <int Q>
  void quad(const uint8x16_t *unit, float32x4_t *out) const {
    const uint16x8_t low = vmovl_u8(vget_low_u8(unit[Q])), high = vmovl_high_u8(unit[Q]);
    out[0] = value(vmovl_u16(vget_low_u16(low)));
    out[1] = value(vmovl_high_u16(low));
    out[2] = value(vmovl_u16(vget_low_u16(high)));
    out[3] = value(vmovl_high_u16(high));
  }
  float32x4_t value(uint32x4_t code) const { return vmulq_f32(vsubq_f32(vcvtq_f32_u32(code), zero), unit_of_table); }
  float32x4_t zero, unit_of_table;
};

/* 5 to 8 bits, one by one. */
template <int BITS>
struct Simd::Floats {
  explicit Floats(const FloatTable &table) : entries(table.entry) {}
  template <int Q>
  void quad(const uint8x16_t *unit, float32x4_t *out) const {
    alignas(16) uint8_t code[16];
    vst1q_u8(code, codes_of<BITS, Q>(unit));
    for (int b = 0; b < 4; ++b) {
      const uint8_t *at = code + 4 * b;
      const float row[4] = {entries[at[0]], entries[at[1]], entries[at[2]], entries[at[3]]};
      out[b] = vld1q_f32(row);
    }
  }
  const float *entries;
};

/* Up to 4 bits each of the four bytes of a float has a table, and zipping puts them together: registers hold no table
 * of 16 floats, and converting bytes would take longer, at half a register a cycle on processors like Cortex-A76. */
template <int BITS>
struct FloatsByBytes {
  explicit FloatsByBytes(const FloatTable &table) {
    for (int b = 0; b < 4; ++b) {
      uint8_t entry[16];
      for (int i = 0; i < 16; ++i)
        __builtin_memcpy(entry + i, reinterpret_cast<const char *>(table.entry + i % (1 << BITS)) + b, 1);
      byte[b] = vld1q_u8(entry);
    }
  }
  template <int Q>
  void quad(const uint8x16_t *unit, float32x4_t *out) const {
    const uint8x16_t codes = codes_of<BITS, Q>(unit);
    const uint8x16_t byte0 = vqtbl1q_u8(byte[0], codes), byte1 = vqtbl1q_u8(byte[1], codes);
    const uint8x16_t byte2 = vqtbl1q_u8(byte[2], codes), byte3 = vqtbl1q_u8(byte[3], codes);
    join(vzip1q_u8(byte0, byte1), vzip1q_u8(byte2, byte3), out);
    join(vzip2q_u8(byte0, byte1), vzip2q_u8(byte2, byte3), out + 2);
  }
  static void join(uint8x16_t low, uint8x16_t high, float32x4_t *out) {
    const uint16x8_t a = vreinterpretq_u16_u8(low), b = vreinterpretq_u16_u8(high);
    out[0] = vreinterpretq_f32_u16(vzip1q_u16(a, b));
    out[1] = vreinterpretq_f32_u16(vzip2q_u16(a, b));
  }
  uint8x16_t byte[4];
};
template <>
struct Simd::Floats<1> : FloatsByBytes<1> {
  using FloatsByBytes::FloatsByBytes;
};
template <>
struct Simd::Floats<2> : FloatsByBytes<2> {
  using FloatsByBytes::FloatsByBytes;
};
template <>
struct Simd::Floats<3> : FloatsByBytes<3> {
  using FloatsByBytes::FloatsByBytes;
};
template <>
struct Simd::Floats<4> : FloatsByBytes<4> {
  using FloatsByBytes::FloatsByBytes;
};

}  // namespace
}  // namespace paredown

#endif
