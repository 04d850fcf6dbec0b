/* AVX-512 with VNNI and VBMI: one register is a unit (16 rows x 32 bits), or a float for each row of a block.
 */
#ifndef PAREDOWN_SIMD_AVX512_H
#define PAREDOWN_SIMD_AVX512_H

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" /* false for GCC's own _mm512_undefined_*, GCC bug 105593 */
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "isa.h"

namespace paredown {
namespace {

struct Simd {
  using I = __m512i;       /* a unit, or an int32 for each row */
  using F = __m512;        /* a float for each row */
  using Operand = __m512i; /* four table bytes for each row, ready to multiply */

  static constexpr int blocks = 2;          /* row blocks at once */
  static constexpr int direct = 4;          /* tokens up to which words are decoded in registers */
  static constexpr int chained = 4;         /* of those, tokens up to which each has four sums */
  static constexpr int tile = 12;           /* tokens at once: 24 accumulators of 32 registers */
#define PAREDOWN_EXACT_TILE 8               /* see kernel.inl */
  static constexpr int int8_offset = 0;     /* operands are table bytes less this */

  static I load(const void *p) {
    I unit = _mm512_loadu_si512(p);
#if defined(__GNUC__)
    /* GCC 12 loads a unit again for each of its uses, and loads limit 2 bits: one token took 62 us, not 58. */
    __asm__("" : "+v"(unit));
#endif
    return unit;
  }
  static void store(void *p, I v) { _mm512_storeu_si512(p, v); }
  static I set(int32_t v) { return _mm512_set1_epi32(v); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  static I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
  template <int N>
  static I right(I a) {
    if constexpr (N == 0) return a;
    return N > 0 ? _mm512_srli_epi32(a, N) : _mm512_slli_epi32(a, -N);
  }
  static int32_t sum(I a) { return _mm512_reduce_add_epi32(a); }

  static F fload(const float *p) { return _mm512_loadu_ps(p); }
  static void fstore(float *p, F v) { _mm512_storeu_ps(p, v); }
  static F fset(float v) { return _mm512_set1_ps(v); }
  static F fadd(F a, F b) { return _mm512_add_ps(a, b); }
  static F fsub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F fmul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fdiv(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fmax(F a, F b) { return _mm512_max_ps(a, b); }
  static F fmin(F a, F b) { return _mm512_min_ps(a, b); }
  static F fabs(F a) { return _mm512_abs_ps(a); }
  /* where(a < 0, b, c) */
  static F where_negative(F a, F b, F c) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_LT_OQ), c, b);
  }
  static float fmax_of(F a) { return _mm512_reduce_max_ps(a); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I to_int(F a) { return _mm512_cvtps_epi32(a); } /* half to even */
  /* 2^n x for whole n of -126 to 127. */
  static F scale_by_power(F x, I n) {
    return fmul(x, _mm512_castsi512_ps(_mm512_slli_epi32(add(n, set(127)), 23)));
  }
  static void bytes_of(I v, int8_t *out) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm512_cvtsepi32_epi8(v));
  }
  /* The low bytes of four integers of each row, side by side. */
  static I words_of(const I (&v)[4]) {
    const I low = set(255);
    const I first = bit_or(bit_and(v[0], low), right<-8>(bit_and(v[1], low)));
    return bit_or(first, bit_or(right<-16>(bit_and(v[2], low)), right<-24>(v[3])));
  }
#define PAREDOWN_TRANSPOSE
  /* Turn 16 rows of 16 floats. */
  static void transpose(const float *from, int64_t stride, float *to) {
    F a[ROWS], b[ROWS];
    for (int i = 0; i < ROWS; ++i) a[i] = fload(from + i * stride);
    for (int i = 0; i < ROWS; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < ROWS; i += 4) { /* a[i + j]: column j of each 128 bits, of rows i to i + 3 */
      for (int j = 0; j < 2; ++j) {
        const __m512d upper = _mm512_castps_pd(b[i + j]), lower = _mm512_castps_pd(b[i + 2 + j]);
        a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(upper, lower));
        a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(upper, lower));
      }
    }
    for (int j = 0; j < 4; ++j) {
      const F even = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), odd = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xDD);
      const F even_8 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
      const F odd_8 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xDD);
      fstore(to + j * ROWS, _mm512_shuffle_f32x4(even, even_8, 0x88));
      fstore(to + (4 + j) * ROWS, _mm512_shuffle_f32x4(odd, odd_8, 0x88));
      fstore(to + (8 + j) * ROWS, _mm512_shuffle_f32x4(even, even_8, 0xDD));
      fstore(to + (12 + j) * ROWS, _mm512_shuffle_f32x4(odd, odd_8, 0xDD));
    }
  }

  static Operand operand(I bytes) { return bytes; }
  /* Add the products of four bytes of each row with four signed bytes of x. */
  static I dot(I sum, Operand w, const int8_t *x) {
    const I four = set(word_at(x));
#if defined(__GNUC__)
    /* GCC 12 copies the sum around the intrinsic and runs out of registers: 16 tokens took 950 us, not 690. */
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(four));
    return sum;
#else
    return _mm512_dpbusd_epi32(sum, w, four);
#endif
  }
#if defined(__GNUC__)
  /* The same where no other row block takes these bytes of x: one instruction does both. */
#define PAREDOWN_DOT_ONCE
  static I dot_once(I sum, Operand w, const int8_t *x) {
    const Four &four = *reinterpret_cast<const Four *>(x);
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(four));
    return sum;
  }
  typedef int32_t __attribute__((may_alias, aligned(1))) Four;
#endif
  static int32_t word_at(const void *p) {
    int32_t v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }

  /* `count` (up to 16) values of a type as floats; those behind are 0 and not read. */
  static F load_as_float(const void *p, int32_t type, int64_t count) {
    const __mmask16 mask = count >= ROWS ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1u);
    if (type == PAREDOWN_F32) return _mm512_maskz_loadu_ps(mask, p);
    __m256i half = _mm256_maskz_loadu_epi16(mask, p);
    if (type == PAREDOWN_F16) return _mm512_cvtph_ps(half);
#if defined(__GNUC__)
    /* GCC 12 did what follows before it asked for the type: 4096 x 4096 with 2 bits took 121.7 us, not 119.4 (Zen 4). */
    __asm__ volatile("" : "+v"(half));
#endif
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static void store_float_as(void *p, int32_t type, F v, int64_t count) {
    const __mmask16 mask = count >= ROWS ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1u);
    if (type == PAREDOWN_F32) {
      _mm512_mask_storeu_ps(p, mask, v);
    } else if (type == PAREDOWN_F16) {
      _mm256_mask_storeu_epi16(p, mask, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else {
      _mm256_mask_storeu_epi16(p, mask, bfloat16(v));
    }
  }
  static __m256i bfloat16(F v) {
    const I bits = _mm512_castps_si512(v);
    const I odd = bit_and(right<16>(bits), set(1));
    const I rounded = right<16>(add(add(bits, odd), set(0x7FFF)));
    const I quiet = _mm512_or_si512(right<16>(bits), set(0x40));
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet));
  }

  template <int BITS>
  struct Bytes;
  template <int BITS>
  struct Floats;
};

}  // namespace
}  // namespace paredown

#include "decode_avx512.h"

#endif
