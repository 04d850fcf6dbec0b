/* From units to table entries with AVX-512 VBMI; part of simd_avx512.h.
 *
 *   Bytes<BITS>.quad<Q>(unit)      the table's bytes of quad Q, from the units of a step
 *   Floats<BITS>.input<Q, B>(unit) the table's floats of input 4 Q + B
 *
 * BITS = 0 stands for 8 bits without a table (entry i is i). `vpermb` and `vpermps` look only at the low 6 (4) bits of
 * an index. Narrow tables are therefore laid out for wherever the bits of a code happen to lie within those, and most
 * quads need neither a shift nor a mask.
 */
#ifndef PAREDOWN_DECODE_AVX512_H
#define PAREDOWN_DECODE_AVX512_H

#include "../lut_decode.h"
#include "simd_avx512.h"

namespace paredown {
namespace {

/* Which code an index stands for: its low bits from bit LOW of the index and its highest, for HIGH >= 0, from there. */
template <int SIZE, int BITS, int LOW, int HIGH, class T>
struct Positions {
  alignas(64) T code[SIZE];
  constexpr Positions() : code() {
    constexpr int low_bits = HIGH < 0 ? BITS : BITS - 1;
    for (int i = 0; i < SIZE; ++i) {
      const int low = (i >> LOW) & ((1 << low_bits) - 1);
      code[i] = static_cast<T>(HIGH < 0 ? low : low | ((i >> (HIGH < 0 ? 0 : HIGH)) & 1) << low_bits);
    }
  }
};
template <int BITS, int LOW, int HIGH>
constexpr Positions<64, BITS, LOW, HIGH, uint8_t> byte_positions{};
template <int BITS, int LOW, int HIGH>
constexpr Positions<16, BITS, LOW, HIGH, int32_t> float_positions{};

template <int BITS, int LOW, int HIGH = -1>
__m512i spread_bytes(const uint8_t *table) {
  const __mmask64 mask = (uint64_t{1} << (1 << BITS)) - 1u;
  const __m512i entries = _mm512_maskz_loadu_epi8(mask, table);
  return _mm512_permutexvar_epi8(_mm512_load_si512(byte_positions<BITS, LOW, HIGH>.code), entries);
}
template <int BITS, int LOW, int HIGH = -1>
__m512 spread_floats(const float *table) {
  const __m512 entries = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << (1 << BITS)) - 1u), table);
  return _mm512_permutexvar_ps(_mm512_load_si512(float_positions<BITS, LOW, HIGH>.code), entries);
}

template <>
struct Simd::Bytes<0> {
  explicit Bytes(const uint8_t *) {}
  template <int Q>
  I quad(const I *unit) const {
    return unit[Q];
  }
};

template <>
struct Simd::Bytes<1> {
  explicit Bytes(const uint8_t *table)
      : at{spread_bytes<1, 0>(table), spread_bytes<1, 1>(table), spread_bytes<1, 2>(table),
           spread_bytes<1, 3>(table), spread_bytes<1, 4>(table), spread_bytes<1, 5>(table)} {}
  template <int Q>
  I quad(const I *unit) const {
    if constexpr (Q < 6) return _mm512_permutexvar_epi8(unit[0], at[Q]);
    return _mm512_permutexvar_epi8(right<2>(unit[0]), at[Q < 6 ? 0 : Q - 2]);
  }
  I at[6];
};

template <>
struct Simd::Bytes<2> {
  explicit Bytes(const uint8_t *table)
      : at{spread_bytes<2, 0>(table), spread_bytes<2, 2>(table), spread_bytes<2, 4>(table)} {}
  template <int Q>
  I quad(const I *unit) const {
    constexpr int field = Q % 4;
    if constexpr (field < 3) return _mm512_permutexvar_epi8(unit[Q / 4], at[field]);
    return _mm512_permutexvar_epi8(right<2>(unit[Q / 4]), at[2]);
  }
  I at[3];
};

/* The plane of two bits gives the low nibble of the index and the plane of one the high nibble, or the other way round;
 * `vpternlog` with a mask takes either. 4 shifts for the 8 quads of a step. */
template <>
struct Simd::Bytes<3> {
  explicit Bytes(const uint8_t *table)
      : low0_high4(spread_bytes<3, 0, 4>(table)),
        low2_high5(spread_bytes<3, 2, 5>(table)),
        low4_high2(spread_bytes<3, 4, 2>(table)),
        low4_high3(spread_bytes<3, 4, 3>(table)),
        nibble(set(0x0F0F0F0F)) {}
  template <int Q>
  I quad(const I *unit) const {
    const I two = right<Q % 4 == 3 ? 2 : 0>(unit[Q / 4]);
    const I one = right<Q < 2 ? -4 : Q < 6 ? 0 : 4>(unit[2]);
    constexpr int two_below = 0xCA, one_below = 0xAC; /* mask ? two : one, and mask ? one : two */
    if constexpr (Q % 4 < 2) {
      const I index = _mm512_ternarylogic_epi32(nibble, two, one, two_below);
      return _mm512_permutexvar_epi8(index, Q % 4 == 0 ? low0_high4 : low2_high5);
    } else {
      const I index = _mm512_ternarylogic_epi32(nibble, two, one, one_below);
      return _mm512_permutexvar_epi8(index, Q % 4 == 2 ? low4_high2 : low4_high3);
    }
  }
  I low0_high4, low2_high5, low4_high2, low4_high3, nibble;
};

template <>
struct Simd::Bytes<4> {
  explicit Bytes(const uint8_t *table) : entries(spread_bytes<4, 0>(table)) {}
  template <int Q>
  I quad(const I *unit) const {
    return _mm512_permutexvar_epi8(right<Q % 2 * 4>(unit[Q / 2]), entries);
  }
  I entries;
};

/* 5 to 8 bits: the codes first, each alone in its byte, then 64 entries at a time. */
template <int BITS>
__m512i codes_of(const __m512i *unit, int quad) {
  using P = Planes<BITS>;
  __m512i codes = _mm512_setzero_si512();
  for (int p = 0; p < P::count; ++p) {
    const __m512i mask = Simd::set(static_cast<int32_t>(in_each_byte((1u << P::width(p)) - 1u)));
    const __m512i plane = _mm512_and_si512(_mm512_srli_epi32(unit[P::word(p, quad)], P::shift(p, quad)), mask);
    codes = _mm512_or_si512(codes, _mm512_slli_epi32(plane, P::place(p)));
  }
  return codes;
}

template <int BITS>
struct Simd::Bytes {
  explicit Bytes(const uint8_t *table) {
    const __mmask64 mask = BITS == 5 ? (uint64_t{1} << 32) - 1u : ~uint64_t{0};
    for (int i = 0; i < parts; ++i) part[i] = _mm512_maskz_loadu_epi8(mask, table + 64 * i);
  }
  template <int Q>
  I quad(const I *unit) const {
    const I codes = codes_of<BITS>(unit, Q);
    if constexpr (parts == 1) {
      return _mm512_permutexvar_epi8(codes, part[0]);
    } else if constexpr (parts == 2) {
      return _mm512_permutex2var_epi8(part[0], codes, part[1]);
    } else {
      const I low = _mm512_permutex2var_epi8(part[0], codes, part[1]);
      const I high = _mm512_permutex2var_epi8(part[2], codes, part[3]);
      return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(codes), high);
    }
  }
  static constexpr int parts = BITS <= 6 ? 1 : BITS == 7 ? 2 : 4;
  I part[parts];
};

template <>
struct Simd::Floats<0> {
  explicit Floats(const FloatTable &table) : zero(fset(table.zero)), unit_of_table(fset(table.unit)) {}
  template <int Q, int B>
  F input(const I *unit) const {
    const I byte = B == 3 ? right<24>(unit[Q]) : bit_and(right<8 * B>(unit[Q]), set(0xFF));
    return fmul(fsub(to_float(byte), zero), unit_of_table);
  }
  F zero, unit_of_table;
};

template <>
struct Simd::Floats<1> {
  explicit Floats(const FloatTable &table)
      : at{spread_floats<1, 0>(table.entry), spread_floats<1, 1>(table.entry), spread_floats<1, 2>(table.entry),
           spread_floats<1, 3>(table.entry)} {}
  template <int Q, int B>
  F input(const I *unit) const {
    return _mm512_permutexvar_ps(right<8 * B + Q / 4 * 4>(unit[0]), at[Q % 4]);
  }
  F at[4];
};

template <>
struct Simd::Floats<2> {
  explicit Floats(const FloatTable &table) : at{spread_floats<2, 0>(table.entry), spread_floats<2, 2>(table.entry)} {}
  template <int Q, int B>
  F input(const I *unit) const {
    return _mm512_permutexvar_ps(right<8 * B + Q % 4 / 2 * 4>(unit[Q / 4]), at[Q % 2]);
  }
  F at[2];
};

/* Both planes first, for the inputs of all four bytes: a nibble of each byte is then an index. Even quads have the plane
 * of two bits in its bits 0-1 and that of one in bit 2, odd ones in 2-3 and 1. Quads 0 and 3, and 4 and 7, share one. */
template <>
struct Simd::Floats<3> {
  explicit Floats(const FloatTable &table)
      : even(spread_floats<3, 0, 2>(table.entry)), odd(spread_floats<3, 2, 1>(table.entry)), middle(set(0x3C3C3C3C)) {}
  template <int Q, int B>
  F input(const I *unit) const {
    const I nibbles = right<8 * B + Q % 4 / 2 * 4>(both<Q>(unit[Q / 4], unit[2]));
    return _mm512_permutexvar_ps(nibbles, Q % 2 == 0 ? even : odd);
  }
  template <int Q>
  I both(I two, I ones) const {
    constexpr int outer = 0xAC, inner = 0xCA; /* where `two` lies: mask ? one : two, and mask ? two : one */
    constexpr int shift[] = {-2, 0, -4, -2, 2, 4, 0, 2};
    const I one = right<shift[Q]>(ones);
    if constexpr (Q % 4 == 0 || Q % 4 == 3) return _mm512_ternarylogic_epi32(middle, two, one, outer);
    else return _mm512_ternarylogic_epi32(middle, two, one, inner);
  }
  F even, odd;
  I middle; /* bits of each byte */
};

template <>
struct Simd::Floats<4> {
  explicit Floats(const FloatTable &table) : entries(fload(table.entry)) {}
  template <int Q, int B>
  F input(const I *unit) const {
    return _mm512_permutexvar_ps(right<8 * B + Q % 2 * 4>(unit[Q / 2]), entries);
  }
  F entries;
};

template <int BITS>
struct Simd::Floats {
  explicit Floats(const FloatTable &table) : entries(table.entry) {}
  template <int Q, int B>
  F input(const I *unit) const {
    const I codes = codes_of<BITS>(unit, Q);
    const I code = B == 3 ? right<24>(codes) : bit_and(right<8 * B>(codes), set(0xFF));
    return _mm512_i32gather_ps(code, entries, 4);
  }
  const float *entries;
};

}  // namespace
}  // namespace paredown

#endif
