/* NEON: four registers are a unit (16 rows x 32 bits), or a float for each row of a block. Nothing here needs more than
 * every 64-bit ARM processor has, so the same header serves all three instruction sets; loops are in kernel_neon.inl.
 */
#ifndef PAREDOWN_SIMD_NEON_H
#define PAREDOWN_SIMD_NEON_H

#include <arm_neon.h>

#include "isa.h"
#include "../lut_decode.h"

namespace paredown {
namespace {

struct Simd {
  struct I { /* a unit, or an int32 for each row */
    uint8x16_t part[4];
  };
  struct F { /* a float for each row */
    float32x4_t part[4];
  };

  /* f(part) for each register. */
  template <class Out, class Get>
  static Out each(Get get) {
    return {{get(0), get(1), get(2), get(3)}};
  }
  static int32x4_t s32(uint8x16_t v) { return vreinterpretq_s32_u8(v); }
  static uint32x4_t u32(uint8x16_t v) { return vreinterpretq_u32_u8(v); }
  static uint8x16_t u8(int32x4_t v) { return vreinterpretq_u8_s32(v); }
  static uint8x16_t u8(uint32x4_t v) { return vreinterpretq_u8_u32(v); }

  static I load(const void *p) {
    return each<I>([p](int i) { return vld1q_u8(static_cast<const uint8_t *>(p) + 16 * i); });
  }
  static void store(void *p, I v) {
    for (int i = 0; i < 4; ++i) vst1q_u8(static_cast<uint8_t *>(p) + 16 * i, v.part[i]);
  }
  /* The low bytes of four integers of each row, side by side. */
  static I words_of(const I (&v)[4]) {
    return each<I>([&](int i) {
      const uint32x4_t first = vsliq_n_u32(u32(v[0].part[i]), u32(v[1].part[i]), 8);
      return u8(vsliq_n_u32(vsliq_n_u32(first, u32(v[2].part[i]), 16), u32(v[3].part[i]), 24));
    });
  }
  static I set(int32_t v) {
    return each<I>([v](int) { return u8(vdupq_n_s32(v)); });
  }
  static I add(I a, I b) {
    return each<I>([&](int i) { return u8(vaddq_s32(s32(a.part[i]), s32(b.part[i]))); });
  }
  static int32_t sum(I a) {
    const int32x4_t low = vaddq_s32(s32(a.part[0]), s32(a.part[1]));
    return vaddvq_s32(vaddq_s32(low, vaddq_s32(s32(a.part[2]), s32(a.part[3]))));
  }

  static F fload(const float *p) {
    return each<F>([p](int i) { return vld1q_f32(p + 4 * i); });
  }
  static void fstore(float *p, F v) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v.part[i]);
  }
  static F fset(float v) {
    return each<F>([v](int) { return vdupq_n_f32(v); });
  }
  static F fadd(F a, F b) {
    return each<F>([&](int i) { return vaddq_f32(a.part[i], b.part[i]); });
  }
  static F fsub(F a, F b) {
    return each<F>([&](int i) { return vsubq_f32(a.part[i], b.part[i]); });
  }
  static F fmul(F a, F b) {
    return each<F>([&](int i) { return vmulq_f32(a.part[i], b.part[i]); });
  }
  static F fdiv(F a, F b) {
    return each<F>([&](int i) { return vdivq_f32(a.part[i], b.part[i]); });
  }
  static F fma(F a, F b, F c) {
    return each<F>([&](int i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
  }
  static F fmax(F a, F b) {
    return each<F>([&](int i) { return vmaxq_f32(a.part[i], b.part[i]); });
  }
  static F fmin(F a, F b) {
    return each<F>([&](int i) { return vminq_f32(a.part[i], b.part[i]); });
  }
  static F fabs(F a) {
    return each<F>([&](int i) { return vabsq_f32(a.part[i]); });
  }
  /* where(a < 0, b, c) */
  static F where_negative(F a, F b, F c) {
    return each<F>([&](int i) { return vbslq_f32(vcltzq_f32(a.part[i]), b.part[i], c.part[i]); });
  }
  static float fmax_of(F a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.part[0], a.part[1]), vmaxq_f32(a.part[2], a.part[3])));
  }
  static F to_float(I a) {
    return each<F>([&](int i) { return vcvtq_f32_s32(s32(a.part[i])); });
  }
  static I to_int(F a) { /* half to even */
    return each<I>([&](int i) { return u8(vcvtnq_s32_f32(a.part[i])); });
  }
  /* 2^n x for whole n of -126 to 127. */
  static F scale_by_power(F x, I n) {
    return each<F>([&](int i) {
      const int32x4_t power = vshlq_n_s32(vaddq_s32(s32(n.part[i]), vdupq_n_s32(127)), 23);
      return vmulq_f32(x.part[i], vreinterpretq_f32_s32(power));
    });
  }
  static void bytes_of(I v, int8_t *out) {
    const int16x8_t low = vcombine_s16(vqmovn_s32(s32(v.part[0])), vqmovn_s32(s32(v.part[1])));
    const int16x8_t high = vcombine_s16(vqmovn_s32(s32(v.part[2])), vqmovn_s32(s32(v.part[3])));
    vst1q_s8(out, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
  }

  /* `count` (up to 16) values of a type as floats; those behind are 0 and not read. */
  static F load_as_float(const void *p, int32_t type, int64_t count) {
    alignas(16) char whole[ROWS * sizeof(float)] = {};
    const int64_t size = type == PAREDOWN_F32 ? 4 : 2;
    if (count < ROWS) {
      __builtin_memcpy(whole, p, static_cast<size_t>(count * size));
      p = whole;
    }
    if (type == PAREDOWN_F32) return fload(static_cast<const float *>(p));
    const uint16_t *half = static_cast<const uint16_t *>(p);
    if (type == PAREDOWN_F16)
      return each<F>([half](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(half + 4 * i))); });
    return each<F>([half](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(half + 4 * i), 16)); });
  }
  static void store_float_as(void *p, int32_t type, F v, int64_t count) {
    alignas(16) char whole[ROWS * sizeof(float)];
    const int64_t size = type == PAREDOWN_F32 ? 4 : 2;
    char *out = count < ROWS ? whole : static_cast<char *>(p);
    for (int i = 0; i < 4; ++i) {
      char *at = out + 4 * i * size;
      if (type == PAREDOWN_F32) vst1q_f32(reinterpret_cast<float *>(at), v.part[i]);
      uint16_t *half = reinterpret_cast<uint16_t *>(at);
      if (type == PAREDOWN_F16) vst1_u16(half, vreinterpret_u16_f16(vcvt_f16_f32(v.part[i])));
      if (type == PAREDOWN_BF16) vst1_u16(half, bfloat16(v.part[i]));
    }
    if (count < ROWS) __builtin_memcpy(p, whole, static_cast<size_t>(count * size));
  }
  static uint16x4_t bfloat16(float32x4_t v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7FFF));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
  }

  using Operand = I; /* kernel_neon.inl multiplies parts by itself */

  static constexpr int blocks = 1;        /* row blocks at once */
  static constexpr int direct = 4;        /* tokens up to which words are decoded in registers */
  static constexpr int tile = 4;          /* tokens at once: 16 sums of 32 registers; with 6, GCC 12 spills some */
  static constexpr int int8_offset = 128; /* operands are table bytes less this */

  template <int BITS>
  struct Bytes;
  template <int BITS>
  struct Floats;
};

}  // namespace
}  // namespace paredown

#include "decode_neon.h"

#endif
