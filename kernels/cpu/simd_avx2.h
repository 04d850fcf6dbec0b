/* AVX2 with FMA and F16C, with or without VNNI: two registers are a unit (16 rows x 32 bits), or a float for each row.
 *
 * With VNNI, operands are table bytes. Without, they are table bytes less 128, as sign and magnitude: `vpmaddubsw` adds
 * two products of at most 128 x 127 in 16 bits, which fits.
 */
#ifndef PAREDOWN_SIMD_AVX2_H
#define PAREDOWN_SIMD_AVX2_H

#include <immintrin.h>

#include "convert.h"
#include "isa.h"

namespace paredown {
namespace {

template <int N>
__m256i right_by(__m256i x) {
  if constexpr (N == 0) return x;
  if constexpr (N > 0) return _mm256_srli_epi32(x, N);
  return _mm256_slli_epi32(x, N < 0 ? -N : 0);
}

struct Simd {
  struct I { /* a unit, or an int32 for each row */
    __m256i a, b;
  };
  struct F { /* a float for each row */
    __m256 a, b;
  };
#if defined(__AVXVNNI__)
  using Operand = I; /* four table bytes for each row, ready to multiply */
  static constexpr int int8_offset = 0;
#else
  struct Operand {
    I entry, magnitude;
  };
  static constexpr int int8_offset = 128; /* operands are table bytes less this */
#endif

  static constexpr int blocks = 1;  /* row blocks at once */
  static constexpr int direct = 4;  /* tokens up to which words are decoded in registers */
  static constexpr int chained = 1; /* of those, tokens up to which each has four sums */
  static constexpr int tile = 6;    /* tokens at once: 12 accumulators of 16 registers */
#define PAREDOWN_EXACT_TILE 8      /* see kernel.inl */
#define PAREDOWN_EXACT_TOKENS 8
#define PAREDOWN_EXACT_HALVES      /* see kernel_avx2.inl */
  static constexpr bool by_halves(int tokens) { return tokens > 2; }

  static __m256i part(const void *p, int i) { return _mm256_loadu_si256(static_cast<const __m256i *>(p) + i); }
  static I load(const void *p) { return {part(p, 0), part(p, 1)}; }
  static void store(void *p, I v) {
    _mm256_storeu_si256(static_cast<__m256i *>(p), v.a);
    _mm256_storeu_si256(static_cast<__m256i *>(p) + 1, v.b);
  }
  static I set(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
  static I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static I bit_and(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
  static I bit_or(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  template <int N>
  static I right(I x) {
    return {right_by<N>(x.a), right_by<N>(x.b)};
  }
  /* The low bytes of four integers of each row, side by side. */
  static I words_of(const I (&v)[4]) {
    const I low = set(255);
    const I first = bit_or(bit_and(v[0], low), right<-8>(bit_and(v[1], low)));
    return bit_or(first, bit_or(right<-16>(bit_and(v[2], low)), right<-24>(v[3])));
  }
  static int32_t sum(I x) {
    const __m256i all = _mm256_add_epi32(x.a, x.b);
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
  }

  static F fload(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void fstore(float *p, F v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
  }
  static F fset(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static F fadd(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F fsub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F fmul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F fdiv(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static F fmax(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F fmin(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static F fabs(F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
  }
  /* x < 0 ? y : z */
  static F where_negative(F x, F y, F z) {
    const __m256 zero = _mm256_setzero_ps();
    return {_mm256_blendv_ps(z.a, y.a, _mm256_cmp_ps(x.a, zero, _CMP_LT_OQ)),
            _mm256_blendv_ps(z.b, y.b, _mm256_cmp_ps(x.b, zero, _CMP_LT_OQ))};
  }
  static float fmax_of(F x) {
    const __m256 all = _mm256_max_ps(x.a, x.b);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  static F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; } /* half to even */
  /* 2^n x for whole n of -126 to 127. */
  static F scale_by_power(F x, I n) {
    const I power = right<-23>(add(n, set(127)));
    return fmul(x, {_mm256_castsi256_ps(power.a), _mm256_castsi256_ps(power.b)});
  }
  static void bytes_of(I v, int8_t *out) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.a, v.b), 0xD8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out), bytes);
  }

  static __m256i four_of(const int8_t *x) {
    int32_t word;
    __builtin_memcpy(&word, x, sizeof word);
    return _mm256_set1_epi32(word);
  }
#if defined(__AVXVNNI__)
  static Operand operand(I bytes) { return bytes; }
  /* Add the products of four bytes of each row with four signed bytes of x. */
  static I dot(I sum, const Operand &w, const int8_t *x) {
    const __m256i four = four_of(x);
    return {products(sum.a, w.a, four), products(sum.b, w.b, four)};
  }
  static __m256i products(__m256i sum, __m256i w, __m256i x) {
#if defined(__GNUC__)
    /* GCC 12 copies the sum around the intrinsic and runs out of registers: 16 tokens took twice as long. */
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
    return sum;
#else
    return _mm256_dpbusd_avx_epi32(sum, w, x);
#endif
  }
#else
  static Operand operand(I bytes) {
    const __m256i middle = _mm256_set1_epi8(-128);
    const I entry = {_mm256_xor_si256(bytes.a, middle), _mm256_xor_si256(bytes.b, middle)};
    return {entry, {_mm256_abs_epi8(entry.a), _mm256_abs_epi8(entry.b)}};
  }
  static __m256i products(__m256i magnitude, __m256i entry, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, entry));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
  static I dot(I sum, const Operand &w, const int8_t *x) {
    const __m256i four = four_of(x);
    return {_mm256_add_epi32(sum.a, products(w.magnitude.a, w.entry.a, four)),
            _mm256_add_epi32(sum.b, products(w.magnitude.b, w.entry.b, four))};
  }
#endif

  /* `count` (up to 16) values of a type as floats; those behind are 0 and not read. */
  static F load_as_float(const void *p, int32_t type, int64_t count) {
    if (count < ROWS) {
      float some[ROWS] = {};
      for (int64_t i = 0; i < count; ++i) some[i] = paredown::load_as_float(p, type, i);
      return fload(some);
    }
    if (type == PAREDOWN_F32) return fload(static_cast<const float *>(p));
    const __m256i half = part(p, 0);
    const __m128i low = _mm256_castsi256_si128(half), high = _mm256_extracti128_si256(half, 1);
    if (type == PAREDOWN_F16) return {_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
    const I wide = right<-16>({_mm256_cvtepu16_epi32(low), _mm256_cvtepu16_epi32(high)});
    return {_mm256_castsi256_ps(wide.a), _mm256_castsi256_ps(wide.b)};
  }
  static void store_float_as(void *p, int32_t type, F v, int64_t count) {
    if (count < ROWS || type == PAREDOWN_BF16) {
      float some[ROWS];
      fstore(some, v);
      for (int64_t i = 0; i < min_of(count, ROWS); ++i) paredown::store_float_as(p, type, i, some[i]);
    } else if (type == PAREDOWN_F32) {
      fstore(static_cast<float *>(p), v);
    } else {
      constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
      _mm_storeu_si128(static_cast<__m128i *>(p), _mm256_cvtps_ph(v.a, nearest));
      _mm_storeu_si128(static_cast<__m128i *>(p) + 1, _mm256_cvtps_ph(v.b, nearest));
    }
  }

  template <int BITS>
  struct Bytes;
  template <int BITS>
  struct Floats;
};

}  // namespace
}  // namespace paredown

#include "decode_avx2.h"

#endif
