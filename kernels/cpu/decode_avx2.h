/* From units to table entries with AVX2; part of simd_avx2.h. The contract is that of decode_avx512.h.
 *
 * `vpshufb` looks at the low 4 bits of an index and gives 0 where its bit 7 is set, so indices are cut to a nibble;
 * tables are laid out for wherever in it the bits of a code lie. `vpermps` looks at the low 3 bits alone.
 */
#ifndef PAREDOWN_DECODE_AVX2_H
#define PAREDOWN_DECODE_AVX2_H

#include "../lut_decode.h"
#include "simd_avx2.h"

namespace paredown {
namespace {

inline Simd::I each_byte(int byte) {
  return Simd::set(static_cast<int32_t>(in_each_byte(static_cast<uint32_t>(byte))));
}

/* 16 bytes of which entry i is that of the code whose bits are found in i: the low ones from bit LOW, the highest,
 * for HIGH >= 0, in bit HIGH. */
template <int BITS, int LOW, int HIGH = -1>
__m256i nibble_table(const uint8_t *table) {
  constexpr int low_bits = HIGH < 0 ? BITS : BITS - 1;
  alignas(16) uint8_t spread[16];
  for (int i = 0; i < 16; ++i) {
    const int low = (i >> LOW) & ((1 << low_bits) - 1);
    spread[i] = table[HIGH < 0 ? low : low | ((i >> (HIGH < 0 ? 0 : HIGH)) & 1) << low_bits];
  }
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(spread)));
}

inline Simd::I look_up(__m256i table, Simd::I index) {
  return {_mm256_shuffle_epi8(table, index.a), _mm256_shuffle_epi8(table, index.b)};
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
      : at{nibble_table<1, 0>(table), nibble_table<1, 1>(table), nibble_table<1, 2>(table),
           nibble_table<1, 3>(table)} {}
  template <int Q>
  I quad(const I *unit) const {
    return look_up(at[Q % 4], bit_and(right<Q / 4 * 4>(unit[0]), each_byte(0x0F)));
  }
  __m256i at[4];
};

template <>
struct Simd::Bytes<2> {
  explicit Bytes(const uint8_t *table) : at{nibble_table<2, 0>(table), nibble_table<2, 2>(table)} {}
  template <int Q>
  I quad(const I *unit) const {
    return look_up(at[Q % 2], bit_and(right<Q % 4 / 2 * 4>(unit[Q / 4]), each_byte(0x0F)));
  }
  __m256i at[2];
};

/* Even quads have the plane of two bits in bits 0-1 of the index and that of one in bit 2, odd ones in 2-3 and 1. */
template <>
struct Simd::Bytes<3> {
  explicit Bytes(const uint8_t *table) : even(nibble_table<3, 0, 2>(table)), odd(nibble_table<3, 2, 1>(table)) {}
  template <int Q>
  I quad(const I *unit) const {
    const I two = right<Q % 4 / 2 * 4>(unit[Q / 4]), one = right<Q % 2 == 0 ? Q - 2 : Q - 1>(unit[2]);
    if constexpr (Q % 2 == 0) {
      return look_up(even, bit_or(bit_and(two, each_byte(0x03)), bit_and(one, each_byte(0x04))));
    } else {
      return look_up(odd, bit_or(bit_and(two, each_byte(0x0C)), bit_and(one, each_byte(0x02))));
    }
  }
  __m256i even, odd;
};

template <>
struct Simd::Bytes<4> {
  explicit Bytes(const uint8_t *table) : entries(nibble_table<4, 0>(table)) {}
  template <int Q>
  I quad(const I *unit) const {
    return look_up(entries, bit_and(right<Q % 2 * 4>(unit[Q / 2]), each_byte(0x0F)));
  }
  __m256i entries;
};

/* The codes of a quad, each alone in its byte. */
template <int BITS>
Simd::I codes_of(const Simd::I *unit, int quad) {
  using P = Planes<BITS>;
  Simd::I codes = Simd::set(0);
  for (int p = 0; p < P::count; ++p) {
    const Simd::I from = unit[P::word(p, quad)], mask = each_byte((1 << P::width(p)) - 1);
    const int shift = P::shift(p, quad);
    const Simd::I shifted = {_mm256_srli_epi32(from.a, shift), _mm256_srli_epi32(from.b, shift)};
    const Simd::I plane = Simd::bit_and(shifted, mask);
    codes = Simd::bit_or(codes, {_mm256_slli_epi32(plane.a, P::place(p)), _mm256_slli_epi32(plane.b, P::place(p))});
  }
  return codes;
}

/* 5 to 8 bits: the codes first, then 16 entries at a time. */
template <int BITS>
struct Simd::Bytes {
  explicit Bytes(const uint8_t *given) : table(given) {}
  template <int Q>
  I quad(const I *unit) const {
    const I codes = codes_of<BITS>(unit, Q), low = bit_and(codes, each_byte(0x0F));
    const I high = bit_and(right<4>(codes), each_byte(0x0F));
    I out = set(0);
    for (int part = 0; part < (1 << BITS) / 16; ++part) {
      const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i *>(table) + part);
      const I found = look_up(_mm256_broadcastsi128_si256(sixteen), low), here = each_byte(part);
      const I hit = {_mm256_cmpeq_epi8(high.a, here.a), _mm256_cmpeq_epi8(high.b, here.b)};
      out = bit_or(out, bit_and(found, hit));
    }
    return out;
  }
  const uint8_t *table;
};

/* Eight rows at once; a pair of them is Simd::Floats. */
template <int BITS>
struct HalfFloats {
  explicit HalfFloats(const FloatTable &table) : entries(table.entry) {}
  template <int Q, int B>
  __m256 input(const __m256i *unit) const {
    Simd::I both[units];
    for (int u = 0; u < units; ++u) both[u] = {unit[u], unit[u]};
    const __m256i codes = codes_of<BITS>(both, Q).a;
    return _mm256_i32gather_ps(entries, _mm256_and_si256(right_by<8 * B>(codes), _mm256_set1_epi32(0xFF)), 4);
  }
  static constexpr int units = BITS;
  const float *entries;
};

template <>
struct HalfFloats<0> {
  explicit HalfFloats(const FloatTable &table)
      : zero(_mm256_set1_ps(table.zero)), unit_of_table(_mm256_set1_ps(table.unit)) {}
  template <int Q, int B>
  __m256 input(const __m256i *unit) const {
    const __m256i byte = _mm256_and_si256(right_by<8 * B>(unit[Q]), _mm256_set1_epi32(0xFF));
    return _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(byte), zero), unit_of_table);
  }
  static constexpr int units = 8;
  __m256 zero, unit_of_table;
};

/* 1 to 3 bits: eight entries, those of narrower codes repeated. */
template <int BITS>
__m256 eight_entries(const FloatTable &table) {
  alignas(32) float entry[8];
  for (int i = 0; i < 8; ++i) entry[i] = table.entry[i % (1 << BITS)];
  return _mm256_load_ps(entry);
}

template <>
struct HalfFloats<1> {
  explicit HalfFloats(const FloatTable &table) : entries(eight_entries<1>(table)) {}
  template <int Q, int B>
  __m256 input(const __m256i *unit) const {
    return _mm256_permutevar8x32_ps(entries, right_by<8 * B + Q>(unit[0]));
  }
  static constexpr int units = 1;
  __m256 entries;
};

template <>
struct HalfFloats<2> {
  explicit HalfFloats(const FloatTable &table) : entries(eight_entries<2>(table)) {}
  template <int Q, int B>
  __m256 input(const __m256i *unit) const {
    return _mm256_permutevar8x32_ps(entries, right_by<8 * B + Q % 4 * 2>(unit[Q / 4]));
  }
  static constexpr int units = 2;
  __m256 entries;
};

/* Both planes first, for the inputs of all four bytes: the plane of one bit goes above that of two, or below it where
 * a byte ends with that of two, and then the lowest bit of an index is the highest of its code. */
template <>
struct HalfFloats<3> {
  explicit HalfFloats(const FloatTable &table)
      : entries(eight_entries<3>(table)),
        rotated(_mm256_permutevar8x32_ps(entries, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))) {}
  template <int Q, int B>
  __m256 input(const __m256i *unit) const {
    constexpr int two = Q % 4 * 2, one = Q % 4 == 3 ? 5 : two + 2, lowest = Q % 4 == 3 ? one : two;
    const __m256i below = _mm256_and_si256(unit[Q / 4], each_byte(3 << two).a);
    const __m256i above = _mm256_and_si256(right_by<Q - one>(unit[2]), each_byte(1 << one).a);
    const __m256i index = right_by<8 * B + lowest>(_mm256_or_si256(below, above));
    return _mm256_permutevar8x32_ps(Q % 4 == 3 ? rotated : entries, index);
  }
  static constexpr int units = 3;
  __m256 entries, rotated;
};

template <>
struct HalfFloats<4> {
  explicit HalfFloats(const FloatTable &table)
      : low(_mm256_loadu_ps(table.entry)), high(_mm256_loadu_ps(table.entry + 8)) {}
  template <int Q, int B>
  __m256 input(const __m256i *unit) const {
    constexpr int place = 8 * B + Q % 2 * 4;
    const __m256i index = right_by<place>(unit[Q / 2]), upper = right_by<place - 28>(unit[Q / 2]); /* bit 3 as sign */
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                            _mm256_castsi256_ps(upper));
  }
  static constexpr int units = 4;
  __m256 low, high;
};

template <int BITS>
struct Simd::Floats {
  explicit Floats(const FloatTable &table) : half(table) {}
  template <int Q, int B>
  F input(const I *unit) const {
    __m256i a[units], b[units];
    for (int u = 0; u < units; ++u) a[u] = unit[u].a, b[u] = unit[u].b;
    return {half.template input<Q, B>(a), half.template input<Q, B>(b)};
  }
  static constexpr int units = HalfFloats<BITS>::units;
  HalfFloats<BITS> half;
};

}  // namespace
}  // namespace paredown

#endif
