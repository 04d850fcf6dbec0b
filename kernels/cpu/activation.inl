/* The end of a linear layer, on floats: bias, activation, conversion. Include after a header that defines `Simd`.
 *
 * Polynomials were fitted here in float64 (Lawson's algorithm for the least largest relative error). A value that is
 * not a number stays one: `fmax` and `fmin` return their second argument then.
 */
#include "isa.h"

namespace paredown {
namespace {

using F = Simd::F;

template <int N>
inline F polynomial(const float (&coefficient)[N], F x) {
  F value = Simd::fset(coefficient[N - 1]);
  for (int i = N - 2; i >= 0; --i) value = Simd::fma(value, x, Simd::fset(coefficient[i]));
  return value;
}

/* a b - rounded, exact where `rounded` is a b in float. */
inline F lost(F a, F b, F rounded) {
#ifdef PAREDOWN_UNFUSED
  return Simd::residue(a, b, rounded);
#else
  return Simd::fma(a, b, Simd::fsub(Simd::fset(0.0f), rounded));
#endif
}

/* e^x for x held within -87.3 and 88; fitted to 1.9e-9 on |r| <= ln(2) / 2. */
inline F exponential(F x) {
  constexpr float coefficient[] = {1.0f,          1.0f,           0.49999991059303284f, 0.16666419804096222f,
                                   0.0416682325f, 0.0083748987f, 0.00138367421f};
  constexpr float log2_e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  x = Simd::fmin(Simd::fset(88.0f), Simd::fmax(Simd::fset(-87.3f), x));
  const auto n = Simd::to_int(Simd::fmul(x, Simd::fset(log2_e)));
  const F whole = Simd::to_float(n);
  const F r = Simd::fma(whole, Simd::fset(-ln2_low), Simd::fma(whole, Simd::fset(-ln2_high), x));
  return Simd::scale_by_power(polynomial(coefficient, r), n);
}

/* x / (1 + e^-s), given e^-s. */
inline F gated(F x, F power) { return Simd::fdiv(x, Simd::fadd(Simd::fset(1.0f), power)); }

inline F silu(F x) {
  const F held = Simd::fmax(Simd::fset(-100.0f), x); /* below, the result is 0 to within 1e-36 */
  return gated(held, exponential(Simd::fsub(Simd::fset(0.0f), held)));
}

/* x Phi(x). The tail Phi(-z) is e^(-z^2 / 2) P(t) / (1 + z / 4), t = 1 - 2 / (1 + z / 4), P fitted to 7.5e-9 on
 * z = 0 to 13.3; z^2 is split in two floats, or its rounding would show in the power. */
inline F gelu(F x) {
  constexpr float coefficient[] = {0.188821286f,   -0.151974156f,   0.0967842191f,  -0.0466307104f, 0.0151011264f,
                                   -0.0018822815f, -0.000879618863f, 0.000393865193f, 4.8289643e-05f, -3.14224744e-05f};
  const F one = Simd::fset(1.0f), held = Simd::fmax(Simd::fset(-13.2f), x);
  const F z = Simd::fmin(Simd::fset(13.2f), Simd::fabs(held));
  const F square = Simd::fmul(z, z), minus_half = Simd::fset(-0.5f);
  const F rest = lost(z, z, square);
  const F power = exponential(Simd::fmul(square, minus_half));
  const F y = Simd::fdiv(one, Simd::fma(z, Simd::fset(0.25f), one));
  const F shape = Simd::fmul(polynomial(coefficient, Simd::fma(y, Simd::fset(-2.0f), one)), y);
  const F tail = Simd::fmul(shape, Simd::fma(power, Simd::fmul(rest, minus_half), power));
  return Simd::fmul(held, Simd::where_negative(held, tail, Simd::fsub(one, tail)));
}

/* x / (1 + e^-s), s = sqrt(8 / pi) (x + 0.044715 x^3), in two floats for the same reason. */
inline F gelu_tanh(F x) {
  const F one = Simd::fset(1.0f), zero = Simd::fset(0.0f);
  const F cubic = Simd::fset(0.044715f), cubic_low = Simd::fset(1.5461445e-9f);
  const F factor = Simd::fset(1.59576917f), factor_low = Simd::fset(-4.5340681e-8f);
  const F held = Simd::fmax(Simd::fset(-13.2f), x), z = Simd::fmin(Simd::fset(13.2f), held);
  const F square = Simd::fmul(z, z), square_low = lost(z, z, square);
  const F part = Simd::fmul(square, cubic);
  const F part_low = Simd::fma(square, cubic_low, Simd::fma(square_low, cubic, lost(square, cubic, part)));
  const F sum = Simd::fadd(one, part);
  /* What `sum` lost: of the smaller term where that is `part`, of 1 else; both differences are exact (Dekker 1971). */
  const F lost_small = Simd::fsub(part, Simd::fsub(sum, one)), lost_large = Simd::fsub(one, Simd::fsub(sum, part));
  const F sum_low = Simd::fadd(part_low, Simd::where_negative(Simd::fsub(part, one), lost_small, lost_large));
  const F scaled = Simd::fmul(z, factor);
  const F scaled_low = Simd::fma(z, factor_low, lost(z, factor, scaled));
  const F s = Simd::fmul(scaled, sum);
  const F s_low = Simd::fma(scaled, sum_low, Simd::fma(scaled_low, sum, lost(scaled, sum, s)));
  const F power = exponential(Simd::fsub(zero, s));
  return gated(held, Simd::fsub(power, Simd::fmul(power, s_low)));
}

template <int ACTIVATION>
inline F activate(F x) {
  if constexpr (ACTIVATION == PAREDOWN_RELU) return Simd::fmax(Simd::fset(0.0f), x);
  if constexpr (ACTIVATION == PAREDOWN_GELU) return gelu(x);
  if constexpr (ACTIVATION == PAREDOWN_GELU_TANH) return gelu_tanh(x);
  if constexpr (ACTIVATION == PAREDOWN_SILU) return silu(x);
  return x;
}

template <int ACTIVATION>
void finish_with(const paredown_linear &call, int64_t block, int64_t blocks, int64_t first, int64_t tokens,
                 const float *totals) {
  const int64_t element = call.type == PAREDOWN_F32 ? 4 : 2, row = block * ROWS;
  const char *bias = static_cast<const char *>(call.bias) + row * element;
  char *y = static_cast<char *>(call.y) + (first * call.y_stride + row) * element;
  F add[Simd::blocks];
  int64_t rows[Simd::blocks];
  for (int64_t b = 0; b < blocks; ++b) {
    rows[b] = min_of(ROWS, call.weight->n - row - b * ROWS);
    const char *at = bias + b * ROWS * element;
    add[b] = call.bias == nullptr ? Simd::fset(0.0f) : Simd::load_as_float(at, call.type, rows[b]);
  }
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t b = 0; b < blocks; ++b) {
      const F sum = Simd::fadd(Simd::fload(totals + (token * blocks + b) * ROWS), add[b]);
      Simd::store_float_as(y + b * ROWS * element, call.type, activate<ACTIVATION>(sum), rows[b]);
    }
    y += call.y_stride * element;
  }
}

/* Write `tokens` rows of y from `first` on, in the columns of some blocks, from totals[token][block][16]. */
inline void finish(const paredown_linear &call, int64_t block, int64_t blocks, int64_t first, int64_t tokens,
                   const float *totals) {
  switch (call.activation) {
    case PAREDOWN_RELU: return finish_with<PAREDOWN_RELU>(call, block, blocks, first, tokens, totals);
    case PAREDOWN_GELU: return finish_with<PAREDOWN_GELU>(call, block, blocks, first, tokens, totals);
    case PAREDOWN_GELU_TANH: return finish_with<PAREDOWN_GELU_TANH>(call, block, blocks, first, tokens, totals);
    case PAREDOWN_SILU: return finish_with<PAREDOWN_SILU>(call, block, blocks, first, tokens, totals);
    default: return finish_with<PAREDOWN_NONE>(call, block, blocks, first, tokens, totals);
  }
}

}  // namespace
}  // namespace paredown
