/* Exact mode of a few tokens for AVX2: include behind kernel.inl.
 *
 * A run of a block is gone through twice, for eight rows each time: the sums of sixteen, their table and what is decoded
 * do not fit in 16 registers, and sums that go through memory wait for it. 1024 x 1024, 4 bits, 4 tokens: 211 us with
 * sixteen rows at once.
 */
namespace paredown {
namespace {

template <int BITS, int T>
inline void add_half(const HalfFloats<BITS> &table, const uint8_t *codes, int64_t steps, const float *x, __m256 scale,
                     float *totals) {
  constexpr int units = HalfFloats<BITS>::units, chains = T <= 5 ? 2 : 1;
  __m256 sum[T][chains];
  each<T * chains>([&](auto i) { sum[i.value / chains][i.value % chains] = _mm256_setzero_ps(); });
  for (; steps > 0; --steps) {
    __m256i unit[units];
    each<units>([&](auto u) { unit[u.value] = Simd::part(codes + u.value * UNIT_BYTES, 0); });
    each<QUADS * 4>([&](auto i) {
      constexpr int Q = decltype(i)::value / 4, B = decltype(i)::value % 4;
      const __m256 w = table.template input<Q, B>(unit);
      each<T>([&](auto t) {
        __m256 &s = sum[t.value][B % chains];
        s = _mm256_fmadd_ps(w, _mm256_broadcast_ss(x + (Q * T + t.value) * 4 + B), s);
      });
    });
    codes += units * UNIT_BYTES;
    x += QUADS * T * 4;
  }
  each<T>([&](auto t) {
    __m256 all = sum[t.value][0];
    each_from<1, chains>([&](auto c) { all = _mm256_add_ps(all, sum[t.value][c.value]); });
    float *to = totals + t.value * ROWS;
    _mm256_storeu_ps(to, _mm256_fmadd_ps(all, scale, _mm256_loadu_ps(to)));
  });
}

template <int BITS, int T>
void halves_exact(const Weight &weight, const Packed &packed, int64_t block, float *totals) {
  FloatTable entries;
  float_table(weight, block, entries);
  const HalfFloats<BITS> table(entries);
  Stream<1> stream(weight, block);
  const float *x = static_cast<const float *>(packed.x);
  for (int64_t group = 0; group < weight.groups; ++group) {
    const F scale = stream.scales(0, group);
    for (int64_t left = ceil_div(group_inputs(weight, group), STEP); left > 0; left -= RUN_STEPS) {
      const int64_t steps = min_of(left, RUN_STEPS);
      add_half<BITS, T>(table, stream.codes[0], steps, x, scale.a, totals);
      add_half<BITS, T>(table, stream.codes[0] + UNIT_BYTES / 2, steps, x, scale.b, totals + ROWS / 2);
      stream.codes[0] += steps * HalfFloats<BITS>::units * UNIT_BYTES;
      x += steps * QUADS * T * 4;
    }
  }
}

}  // namespace
}  // namespace paredown
