/* Plain C++: arrays that the compiler may put in whatever vector registers the base of its target has. */
#ifndef PAREDOWN_SIMD_PORTABLE_H
#define PAREDOWN_SIMD_PORTABLE_H

#include "../lut_decode.h"
#include "convert.h"
#include "isa.h"

/* For activation.inl: products are rounded before they are added. */
#define PAREDOWN_UNFUSED

namespace paredown {
namespace {

struct Simd {
  struct I { /* a unit, or an int32 for each row */
    uint32_t row[ROWS];
  };
  struct F { /* a float for each row */
    float row[ROWS];
  };
  struct Operand { /* four signed bytes for each row */
    int8_t byte[ROWS * 4];
  };

  static constexpr int blocks = 1;
  static constexpr int direct = 0;        /* compilers keep no such arrays in registers */
  static constexpr int chained = 1;
  static constexpr int tile = 4;
  static constexpr int int8_offset = 128; /* operands are table bytes less this */

  template <class Out, class Get>
  static inline __attribute__((always_inline)) Out rows(Get get) {
    Out out;
    for (int r = 0; r < ROWS; ++r) out.row[r] = get(r);
    return out;
  }

  static I load(const void *p) {
    I out;
    memcpy(&out, p, sizeof out);
    return out;
  }
  static void store(void *p, const I &v) { memcpy(p, &v, sizeof v); }
  static I set(int32_t v) {
    return rows<I>([&](int) { return static_cast<uint32_t>(v); });
  }
  static I add(const I &a, const I &b) {
    return rows<I>([&](int r) { return a.row[r] + b.row[r]; });
  }
  /* The low bytes of four integers of each row, side by side. */
  static I words_of(const I (&v)[4]) {
    return rows<I>([&](int r) {
      return (v[0].row[r] & 255u) | (v[1].row[r] & 255u) << 8 | (v[2].row[r] & 255u) << 16 | v[3].row[r] << 24;
    });
  }
  static int32_t sum(const I &a) {
    uint32_t total = 0;
    for (const uint32_t v : a.row) total += v;
    return static_cast<int32_t>(total);
  }

  static F fload(const float *p) {
    return rows<F>([&](int r) { return p[r]; });
  }
  static void fstore(float *p, const F &v) {
    for (int r = 0; r < ROWS; ++r) p[r] = v.row[r];
  }
  static F fset(float v) {
    return rows<F>([&](int) { return v; });
  }
  static F fadd(const F &a, const F &b) {
    return rows<F>([&](int r) { return a.row[r] + b.row[r]; });
  }
  static F fsub(const F &a, const F &b) {
    return rows<F>([&](int r) { return a.row[r] - b.row[r]; });
  }
  static F fmul(const F &a, const F &b) {
    return rows<F>([&](int r) { return a.row[r] * b.row[r]; });
  }
  static F fdiv(const F &a, const F &b) {
    return rows<F>([&](int r) { return a.row[r] / b.row[r]; });
  }
  /* Of accumulation: rounded once or twice, as the target has it. */
  static F fma(const F &a, const F &b, const F &c) {
#if defined(__FP_FAST_FMAF)
    return rows<F>([&](int r) { return __builtin_fmaf(a.row[r], b.row[r], c.row[r]); });
#else
    return rows<F>([&](int r) { return a.row[r] * b.row[r] + c.row[r]; });
#endif
  }
  /* a b - c for c near a b, exact: what a product lost in rounding. */
  static F residue(const F &a, const F &b, const F &c) {
    return rows<F>([&](int r) {
      return static_cast<float>(static_cast<double>(a.row[r]) * b.row[r] - static_cast<double>(c.row[r]));
    });
  }
  static F fmax(const F &a, const F &b) {
    return rows<F>([&](int r) { return a.row[r] > b.row[r] ? a.row[r] : b.row[r]; });
  }
  static F fmin(const F &a, const F &b) {
    return rows<F>([&](int r) { return a.row[r] < b.row[r] ? a.row[r] : b.row[r]; });
  }
  static F fabs(const F &a) {
    return rows<F>([&](int r) { return fabsf(a.row[r]); });
  }
  /* a < 0 ? b : c */
  static F where_negative(const F &a, const F &b, const F &c) {
    return rows<F>([&](int r) { return a.row[r] < 0.0f ? b.row[r] : c.row[r]; });
  }
  static float fmax_of(const F &a) {
    float largest = a.row[0];
    for (const float v : a.row) largest = v > largest ? v : largest;
    return largest;
  }
  static F to_float(const I &a) {
    return rows<F>([&](int r) { return static_cast<float>(static_cast<int32_t>(a.row[r])); });
  }
  /* Half to even, for values below 2^22: adding 1.5 * 2^23 leaves no place for a fraction. */
  static I to_int(const F &a) {
    return rows<I>([&](int r) {
      const float shifted = a.row[r] + 12582912.0f;
      return static_cast<uint32_t>(static_cast<int32_t>(shifted - 12582912.0f));
    });
  }
  /* 2^n x for whole n of -126 to 127. */
  static F scale_by_power(const F &x, const I &n) {
    return rows<F>([&](int r) { return x.row[r] * float_of_bits((n.row[r] + 127u) << 23); });
  }
  static void bytes_of(const I &v, int8_t *out) {
    for (int r = 0; r < ROWS; ++r) out[r] = static_cast<int8_t>(static_cast<int32_t>(v.row[r]));
  }

  static Operand operand(const I &bytes) {
    Operand out;
    memcpy(out.byte, &bytes, sizeof out.byte);
    for (int8_t &b : out.byte) b = static_cast<int8_t>(static_cast<uint8_t>(b) ^ 0x80u);
    return out;
  }
  static I dot(const I &sum, const Operand &w, const int8_t *x) {
    return rows<I>([&](int r) {
      int32_t all = 0;
      for (int b = 0; b < 4; ++b) all += w.byte[r * 4 + b] * x[b];
      return sum.row[r] + static_cast<uint32_t>(all);
    });
  }

  static F load_as_float(const void *p, int32_t type, int64_t count) {
    return rows<F>([&](int r) { return r < count ? paredown::load_as_float(p, type, r) : 0.0f; });
  }
  static void store_float_as(void *p, int32_t type, const F &v, int64_t count) {
    for (int64_t r = 0; r < min_of(count, ROWS); ++r) paredown::store_float_as(p, type, r, v.row[r]);
  }

  /* The code of each row's four inputs of a quad. */
  template <int BITS>
  static I codes(const I *unit, int quad) {
    return rows<I>([&](int r) { return four_codes<BITS>(&unit[0].row[r], quad, ROWS); });
  }

  template <int BITS>
  struct Bytes {
    explicit Bytes(const uint8_t *given) : table(given) {}
    template <int Q>
    I quad(const I *unit) const {
      if constexpr (BITS == 0) return unit[Q];
      const I code = codes<BITS == 0 ? 8 : BITS>(unit, Q);
      return rows<I>([&](int r) {
        const uint32_t c = code.row[r];
        return static_cast<uint32_t>(table[c & 255u]) | static_cast<uint32_t>(table[c >> 8 & 255u]) << 8 |
               static_cast<uint32_t>(table[c >> 16 & 255u]) << 16 | static_cast<uint32_t>(table[c >> 24]) << 24;
      });
    }
    const uint8_t *table;
  };
  template <int BITS>
  struct Floats {
    explicit Floats(const FloatTable &given) : table(given.entry) {}
    template <int Q, int B>
    F input(const I *unit) const {
      using P = Planes<BITS == 0 ? 8 : BITS>;
      I code = set(0);
      for (int p = 0; p < P::count; ++p) {
        const I &word = unit[P::word(p, Q)];
        const uint32_t mask = (1u << P::width(p)) - 1u;
        code = rows<I>([&](int r) {
          return code.row[r] | (word.row[r] >> (8 * B + P::shift(p, Q)) & mask) << P::place(p);
        });
      }
      return rows<F>([&](int r) { return table[code.row[r]]; });
    }
    const float *table;
  };
};

}  // namespace
}  // namespace paredown

#endif
