/* What conv.inl leaves to NEON; include between kernel_neon.inl and that file.
 */
#define PAREDOWN_OWN_CONV_TILE
#include "conv.h"

namespace paredown {
namespace {

#if defined(__ARM_FEATURE_DOTPROD)
constexpr int conv_outputs = Simd::tile;
#else
constexpr int conv_outputs = Simd::tile / 2; /* a sum takes two registers */
#endif

/* The words of up to 4 outputs are one register: those behind T are read and not used, and scratch goes on behind an
 * image. */
template <int T, int R>
void conv_tile(const uint8_t *w, const ConvTaps &taps, const int8_t *x, const int32_t *correction, float *totals) {
  static_assert(R == 1 && T <= 4, "a block at a time");
  Sums sum[T][parts];
  for (int64_t tap = 0; tap < taps.count; ++tap) {
    const int8_t *at = x + taps.place[tap];
    for (int64_t quad = taps.quads; quad > 0; --quad) {
      const int8x16_t words = vld1q_s8(at);
      each<parts>([&](auto p) {
        const int8x16_t rows = vreinterpretq_s8_u8(vld1q_u8(w + p.value * part_bytes));
        each<T>([&](auto t) { sum[t.value][p.value].template add<decltype(t)::value>(rows, words); });
      });
      w += UNIT_BYTES;
      at += taps.quad_bytes;
    }
  }
  each<T>([&](auto t) {
    each<parts>([&](auto p) {
      const int32x4_t all = vaddq_s32(sum[t.value][p.value].total(), vdupq_n_s32(correction[t.value]));
      vst1q_f32(totals + t.value * ROWS + p.value * part_rows, vcvtq_f32_s32(all));
    });
  });
}

}  // namespace
}  // namespace paredown
