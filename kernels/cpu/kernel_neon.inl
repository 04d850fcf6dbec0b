/* The decoding loops of kernel.inl for NEON, part by part; include behind that file, with PAREDOWN_OWN_DECODE
 * and PAREDOWN_OWN_TILE_INT8.
 *
 * A unit is four registers here, and decoding all of it at once would keep more of them than there are. Each part, four
 * rows, is therefore taken through a run (a step) alone: its tables, units, inputs and sums fit. The lines of a run are
 * read from the first cache three times more.
 *
 * Instructions of the inner loop for one token and 64 weights, counted in what GCC 12 makes of `run_of_part` at -O3 (in
 * brackets those of vectors other than loads); none spills a register. Divide by what a processor issues in a cycle for
 * a bound on its speed: nothing here was timed on one.
 *
 *   bits                        1            2            3            4
 *   int8, sdot        11.5  (9.0)  13.5 (10.0)  22.0 (17.5)  17.0 (12.0)
 *   int8, without     29.0 (24.5)  31.5 (25.5)  39.0 (33.0)  34.5 (27.5)
 *   exact             76.0 (71.5)  81.0 (76.0)  88.0 (82.0)  80.0 (74.0)
 */
namespace paredown {
namespace {

constexpr int parts = 4, part_bytes = UNIT_BYTES / parts, part_rows = ROWS / parts;

template <int UNITS>
inline void load_part(const uint8_t *codes, int part, uint8x16_t (&unit)[UNITS]) {
  each<UNITS>([&](auto u) { unit[u.value] = vld1q_u8(codes + u.value * UNIT_BYTES + part * part_bytes); });
}
/* Likewise, the bytes of each in order (input, row): a register of floats is four rows of one input. */
template <int UNITS>
inline void load_part_by_input(const uint8_t *codes, int part, uint8x16_t (&unit)[UNITS]) {
  static const uint8_t places[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  const uint8x16_t order = vld1q_u8(places);
  load_part(codes, part, unit);
  each<UNITS>([&](auto u) { unit[u.value] = vqtbl1q_u8(unit[u.value], order); });
}

#if defined(__ARM_FEATURE_DOTPROD)
/* The sums of four rows with one token: sum[row] += the products of w[row][4] and word LANE of x. */
struct Sums {
  int32x4_t sum = vdupq_n_s32(0);
  template <int LANE>
  void add(int8x16_t w, int8x16_t x) {
    sum = vdotq_laneq_s32(sum, w, x, LANE);
  }
  int32x4_t total() const { return sum; }
};
#else
/* Without sdot, pairs of products are added in 16 bits: two of them are below 2^15. */
struct Sums {
  int32x4_t first = vdupq_n_s32(0), second = vdupq_n_s32(0); /* (row, half) */
  template <int LANE>
  void add(int8x16_t w, int8x16_t x) {
    const int8x16_t four = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x), LANE));
    first = vpadalq_s16(first, vmull_s8(vget_low_s8(w), vget_low_s8(four)));
    second = vpadalq_s16(second, vmull_high_s8(w, four));
  }
  int32x4_t total() const { return vpaddq_s32(first, second); }
};
#endif

/* Four rows by T tokens over the `steps` of a run. */
template <int BITS, int T>
inline __attribute__((always_inline)) void run_of_part(const Simd::Bytes<BITS> &table, const uint8_t *codes, int part,
                                                       int64_t steps, const int8_t *x, Sums (&sum)[T]) {
  constexpr int units = units_of(BITS);
  for (; steps > 0; --steps) {
    uint8x16_t unit[units];
    load_part(codes, part, unit);
    int8x16_t words[2 * T]; /* [quad][token] 4 inputs */
    each<2 * T>([&](auto i) { words[i.value] = vld1q_s8(x + i.value * 16); });
    each<QUADS>([&](auto q) {
      constexpr int Q = decltype(q)::value;
      const int8x16_t w = vreinterpretq_s8_u8(table.template quad<Q>(unit));
      each<T>([&](auto t) {
        constexpr int word = Q * T + decltype(t)::value;
        sum[t.value].template add<word % 4>(w, words[word / 4]);
      });
    });
    codes += units * UNIT_BYTES;
    x += QUADS * T * 4;
  }
}

template <int BITS, int T, int R>
void direct_int8(const Weight &weight, const Packed &packed, int64_t block, float *totals) {
  static_assert(R == 1, "Simd::blocks is 1");
  constexpr int step_bytes = units_of(BITS) * UNIT_BYTES;
  const Simd::Bytes<BITS> table(byte_table(weight, block));
  Stream<1> stream(weight, block);
  const int8_t *x = static_cast<const int8_t *>(packed.x);
  const float *x_scale = packed.scale;
  const int32_t *correction = packed.correction;
  for (int64_t group = 0; group < weight.groups; ++group) {
    const F scale = stream.scales(0, group);
    for (int64_t left = ceil_div(group_inputs(weight, group), STEP); left > 0; left -= RUN_STEPS) {
      const int64_t steps = min_of(left, RUN_STEPS);
      for (int part = 0; part < parts; ++part) {
        Sums sum[T];
        run_of_part<BITS, T>(table, stream.codes[0], part, steps, x, sum);
        each<T>([&](auto t) {
          float *to = totals + t.value * ROWS + part * part_rows;
          const int32x4_t all = vaddq_s32(sum[t.value].total(), vdupq_n_s32(correction[t.value]));
          const float32x4_t by = vmulq_n_f32(scale.part[part], x_scale[t.value]);
          vst1q_f32(to, vfmaq_f32(vld1q_f32(to), vcvtq_f32_s32(all), by));
        });
      }
      stream.codes[0] += steps * step_bytes;
      x += steps * QUADS * T * 4;
      x_scale += T;
      correction += T;
    }
  }
}

/* Four rows by T tokens over the `steps` of a run; each sum in `chains` parts, for the latency of `fmla`. */
template <int BITS, int T, int CHAINS>
inline __attribute__((always_inline)) void run_of_part(const Simd::Floats<BITS> &table, const uint8_t *codes, int part,
                                                       int64_t steps, const float *x, float32x4_t (&sum)[T][CHAINS]) {
  constexpr int units = units_of(BITS);
  for (; steps > 0; --steps) {
    uint8x16_t unit[units];
    load_part_by_input(codes, part, unit);
    each<QUADS>([&](auto q) {
      constexpr int Q = decltype(q)::value;
      float32x4_t w[4];
      table.template quad<Q>(unit, w);
      each<T>([&](auto t) {
        const float32x4_t inputs = vld1q_f32(x + (Q * T + t.value) * 4);
        each<4>([&](auto b) {
          constexpr int B = decltype(b)::value;
          float32x4_t &s = sum[t.value][B % CHAINS];
          s = vfmaq_laneq_f32(s, w[B], inputs, B);
        });
      });
    });
    codes += units * UNIT_BYTES;
    x += QUADS * T * 4;
  }
}

template <int BITS, int T, int R>
void direct_exact(const Weight &weight, const Packed &packed, int64_t block, float *totals) {
  static_assert(R == 1, "Simd::blocks is 1");
  constexpr int step_bytes = units_of(BITS) * UNIT_BYTES, chains = T <= 2 ? 4 : 2;
  FloatTable entries;
  float_table(weight, block, entries);
  const Simd::Floats<BITS> table(entries);
  Stream<1> stream(weight, block);
  const float *x = static_cast<const float *>(packed.x);
  for (int64_t group = 0; group < weight.groups; ++group) {
    const F scale = stream.scales(0, group);
    for (int64_t left = ceil_div(group_inputs(weight, group), STEP); left > 0; left -= RUN_STEPS) {
      const int64_t steps = min_of(left, RUN_STEPS);
      for (int part = 0; part < parts; ++part) {
        float32x4_t sum[T][chains] = {};
        run_of_part<BITS, T, chains>(table, stream.codes[0], part, steps, x, sum);
        each<T>([&](auto t) {
          float32x4_t all = vaddq_f32(sum[t.value][0], sum[t.value][1]);
          if constexpr (chains == 4) all = vaddq_f32(all, vaddq_f32(sum[t.value][2], sum[t.value][3]));
          float *to = totals + t.value * ROWS + part * part_rows;
          vst1q_f32(to, vfmaq_f32(vld1q_f32(to), all, scale.part[part]));
        });
      }
      stream.codes[0] += steps * step_bytes;
      x += steps * QUADS * T * 4;
    }
  }
}

/* Decode `steps` steps: [quad] units. */
template <int BITS, int R>
void decode_in_order(const Simd::Bytes<BITS> &table, Stream<R> &stream, int64_t steps, uint8_t *out) {
  constexpr int units = units_of(BITS);
  for (; steps > 0; --steps) {
    for (int part = 0; part < parts; ++part) {
      uint8x16_t unit[units];
      load_part(stream.codes[0], part, unit);
      each<QUADS>([&](auto q) {
        vst1q_u8(out + q.value * UNIT_BYTES + part * part_bytes, table.template quad<decltype(q)::value>(unit));
      });
    }
    out += QUADS * UNIT_BYTES;
    stream.codes[0] += units * UNIT_BYTES;
  }
}

#ifndef __ARM_FEATURE_MATMUL_INT8 /* whose products take another order: isa_i8mm.cpp */
int64_t multiply_bytes(int64_t count) {
  constexpr int at_once = 12;
  int8_t bytes[at_once][part_bytes] = {};
  __asm__ volatile("" : : "r"(bytes) : "memory");
  const int8x16_t w = vld1q_s8(bytes[0]);
  Sums sum[at_once];
  int64_t done = 0;
  for (; done < count; done += at_once * part_bytes) {
    __asm__ volatile("" : : "r"(bytes) : "memory");
    each<at_once>([&](auto i) { sum[i.value].template add<0>(w, vld1q_s8(bytes[i.value])); });
  }
  each<at_once>([&](auto i) { vst1q_s32(reinterpret_cast<int32_t *>(bytes[i.value]), sum[i.value].total()); });
  __asm__ volatile("" : : "r"(bytes) : "memory");
  return done;
}

template <int BITS, int R>
void decode_bytes(const Simd::Bytes<BITS> &table, Stream<R> &stream, int64_t steps, uint8_t *out) {
  decode_in_order<BITS, R>(table, stream, steps, out);
}

/* Four quads at a time: their words of T tokens are T registers. */
template <int T, int R>
void tile_int8(const uint8_t *w, int64_t quads, const int8_t *x, const float *x_scale, const int32_t *correction,
               const F *scale, float *totals) {
  static_assert(R == 1, "a block at a time");
  Sums sum[T][parts];
  for (; quads > 0; quads -= 4) {
    int8x16_t words[T]; /* [quad][token] 4 inputs */
    each<T>([&](auto i) { words[i.value] = vld1q_s8(x + i.value * 16); });
    each<4>([&](auto q) {
      each<parts>([&](auto p) {
        const uint8_t *at = w + q.value * UNIT_BYTES + p.value * part_bytes;
        const int8x16_t rows = vreinterpretq_s8_u8(vld1q_u8(at));
        each<T>([&](auto t) {
          constexpr int word = decltype(q)::value * T + decltype(t)::value;
          sum[t.value][p.value].template add<word % 4>(rows, words[word / 4]);
        });
      });
    });
    w += 4 * UNIT_BYTES;
    x += 4 * T * 4;
  }
  each<T>([&](auto t) {
    each<parts>([&](auto p) {
      const int32x4_t all = vaddq_s32(sum[t.value][p.value].total(), vdupq_n_s32(correction[t.value]));
      const float32x4_t by = vmulq_n_f32(scale[0].part[p.value], x_scale[t.value]);
      float *to = totals + t.value * ROWS + p.value * part_rows;
      vst1q_f32(to, vfmaq_f32(vld1q_f32(to), vcvtq_f32_s32(all), by));
    });
  });
}
#endif

template <int BITS, int R>
void decode_floats(const Simd::Floats<BITS> &table, Stream<R> &stream, const F (&scale)[R], float *out) {
  for (int part = 0; part < parts; ++part) {
    uint8x16_t unit[units_of(BITS)];
    load_part_by_input(stream.codes[0], part, unit);
    each<QUADS>([&](auto q) {
      float32x4_t w[4];
      table.template quad<decltype(q)::value>(unit, w);
      each<4>([&](auto b) {
        vst1q_f32(out + (q.value * 4 + b.value) * ROWS + part * part_rows, vmulq_f32(w[b.value], scale[0].part[part]));
      });
    });
  }
  stream.codes[0] += units_of(BITS) * UNIT_BYTES;
}

}  // namespace
}  // namespace paredown
