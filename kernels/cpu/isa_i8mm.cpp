// NEON with smmla: Cortex-A710, Neoverse V1, N2 and V3AE (Thor) and later. Few tokens are multiplied as with sdot.
//
// smmla multiplies two rows of 8 inputs by two tokens of 8. Zipping two quads of a part, words (row), gives two
// operands of two rows each; zipping two quads of packed activations, words (token), gives those of two tokens each.
#define PAREDOWN_OWN_DECODE
#define PAREDOWN_OWN_TILE_INT8
#define PAREDOWN_OWN_MULTIPLY_BYTES
#include "simd_neon.h"
// After the vectors.
#include "kernel.inl"
// After the loops.
#include "kernel_neon.inl"
#include "conv_neon.inl"
// After its tile.
#include "conv.inl"

namespace paredown {
namespace {

inline int8x16_t zip_low(uint8x16_t a, uint8x16_t b) {
  return vreinterpretq_s8_s32(vzip1q_s32(Simd::s32(a), Simd::s32(b)));
}
inline int8x16_t zip_high(uint8x16_t a, uint8x16_t b) {
  return vreinterpretq_s8_s32(vzip2q_s32(Simd::s32(a), Simd::s32(b)));
}

/* Decode `steps` steps: [pair of quads][pair of rows] operands of 16 bytes. */
template <int BITS, int R>
void decode_bytes(const Simd::Bytes<BITS> &table, Stream<R> &stream, int64_t steps, uint8_t *out) {
  constexpr int units = units_of(BITS);
  for (; steps > 0; --steps) {
    for (int part = 0; part < parts; ++part) {
      uint8x16_t unit[units];
      load_part(stream.codes[0], part, unit);
      each<QUADS / 2>([&](auto pair) {
        constexpr int Q = 2 * decltype(pair)::value;
        const uint8x16_t first = table.template quad<Q>(unit), second = table.template quad<Q + 1>(unit);
        int8_t *to = reinterpret_cast<int8_t *>(out) + Q * UNIT_BYTES + part * 2 * part_bytes;
        vst1q_s8(to, zip_low(first, second));
        vst1q_s8(to + part_bytes, zip_high(first, second));
      });
    }
    out += QUADS * UNIT_BYTES;
    stream.codes[0] += units * UNIT_BYTES;
  }
}

/* Two tokens of 8 inputs; zeros stand in for one beyond the last. */
template <int T>
inline int8x16_t two_tokens(const int8_t *x, int token) {
  int64_t near = 0, far = 0;
  const int bytes = token + 1 < T ? 8 : 4;
  __builtin_memcpy(&near, x + token * 4, static_cast<size_t>(bytes));
  __builtin_memcpy(&far, x + (T + token) * 4, static_cast<size_t>(bytes));
  return zip_low(vreinterpretq_u8_s64(vdupq_n_s64(near)), vreinterpretq_u8_s64(vdupq_n_s64(far)));
}

/* Multiply decoded bytes by one tile of a run. */
template <int T, int R>
void tile_int8(const uint8_t *w, int64_t quads, const int8_t *x, const float *x_scale, const int32_t *correction,
               const F *scale, float *totals) {
  constexpr int token_pairs = (T + 1) / 2, row_pairs = ROWS / 2;
  int32x4_t sum[token_pairs][row_pairs]; /* (row, token) of a pair of each */
  each<token_pairs>([&](auto t) {
    each<row_pairs>([&](auto p) { sum[t.value][p.value] = vdupq_n_s32(0); });
  });
  for (; quads > 0; quads -= 2) {
    int8x16_t tokens[token_pairs];
    each<token_pairs>([&](auto t) { tokens[t.value] = two_tokens<T>(x, 2 * t.value); });
    each<row_pairs>([&](auto p) {
      const int8x16_t rows = vld1q_s8(reinterpret_cast<const int8_t *>(w) + p.value * 16);
      each<token_pairs>([&](auto t) {
        sum[t.value][p.value] = vmmlaq_s32(sum[t.value][p.value], rows, tokens[t.value]);
      });
    });
    w += 2 * UNIT_BYTES;
    x += 2 * T * 4;
  }
  each<T>([&](auto t) {
    constexpr int pair = decltype(t)::value / 2, place = decltype(t)::value % 2;
    const I of_token = Simd::each<I>([&](int i) {
      const int32x4_t a = sum[pair][2 * i], b = sum[pair][2 * i + 1];
      return Simd::u8(place == 0 ? vuzp1q_s32(a, b) : vuzp2q_s32(a, b));
    });
    const F all = Simd::to_float(Simd::add(of_token, Simd::set(correction[t.value])));
    float *to = totals + t.value * ROWS;
    Simd::fstore(to, Simd::fma(all, Simd::fmul(Simd::fset(x_scale[t.value]), scale[0]), Simd::fload(to)));
  });
}

int64_t multiply_bytes(int64_t count) {
  constexpr int at_once = 16;
  int8_t bytes[16] = {1};
  __asm__ volatile("" : : "r"(bytes) : "memory");
  const int8x16_t operand = vld1q_s8(bytes);
  int32x4_t sum[at_once];
  each<at_once>([&](auto i) { sum[i.value] = vdupq_n_s32(0); });
  int64_t done = 0;
  for (; done < count; done += at_once * 2 * 2 * 8) {
    each<at_once>([&](auto i) { sum[i.value] = vmmlaq_s32(sum[i.value], operand, operand); });
    __asm__ volatile("" ::: "memory");
  }
  each<at_once>([&](auto i) { vst1q_s32(reinterpret_cast<int32_t *>(bytes), sum[i.value]); });
  __asm__ volatile("" : : "r"(bytes) : "memory");
  return done;
}

}  // namespace

const Isa i8mm_isa = {"i8mm", {Simd::tile, Simd::tile}, Simd::tile, 0, tokens_at_once, pack, multiply, &convolution, multiply_bytes};

}  // namespace paredown
