/* From stored words to table entries: the decode that every kernel shares, for hosts, nvcc and NVRTC.
 *
 * Words are those of layout c16 (kernels/cpu/paredown.h): a step is 32 inputs of one row in BITS words, a plane of w
 * bits in w of them, widest plane first and lowest bits of the codes in it. A quad is 4 neighbouring inputs of a step,
 * 0 to 7; its four codes (or table entries) sit in the four bytes of a word, the first input in the lowest.
 *
 *   BITS   1 to 8, bits of a code
 *   table  2^BITS bytes, four to a word (little endian), in 1 word for 1 and 2 bits, 2 for 3, 4 for 4, 2^BITS / 4 above
 *
 * Vector kernels on CPUs use the constants of `Planes` and shuffles of their own; the portable one uses all of it.
 */
#ifndef PAREDOWN_LUT_DECODE_H
#define PAREDOWN_LUT_DECODE_H

#if defined(__CUDACC_RTC__)
typedef unsigned int uint32_t;
#else
#include <stdint.h>
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define PAREDOWN_HD __host__ __device__ __forceinline__
#else
#define PAREDOWN_HD inline
#endif

namespace paredown {
namespace {  // each translation unit has its own flags, so none may share code with another

/* Which planes hold a code of BITS bits, and where a quad is in them. */
template <int BITS>
struct Planes {
  static_assert(BITS >= 1 && BITS <= 8, "codes have 1 to 8 bits");

  static constexpr int count = BITS == 7 ? 3 : BITS == 3 || BITS == 5 || BITS == 6 ? 2 : 1;

  /* Bits of plane p: the largest of 8, 4, 2 and 1 that the planes before leave. */
  PAREDOWN_HD static constexpr int width(int p) {
    int left = BITS;
    for (int done = 0; done < p; ++done) left -= largest(left);
    return largest(left);
  }
  /* The bit of the code that is the lowest of plane p. */
  PAREDOWN_HD static constexpr int place(int p) {
    int bits = 0;
    for (int before = 0; before < p; ++before) bits += width(before);
    return bits;
  }
  /* The word of a step that holds `quad` in plane p, and the shift that brings its first code to bit 0. */
  PAREDOWN_HD static constexpr int word(int p, int quad) { return place(p) + quad * width(p) / 8; }
  PAREDOWN_HD static constexpr int shift(int p, int quad) { return quad * width(p) % 8; }

 private:
  PAREDOWN_HD static constexpr int largest(int bits) { return bits >= 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }
};

/* The same byte in all four bytes. */
PAREDOWN_HD constexpr uint32_t in_each_byte(uint32_t byte) { return byte * 0x01010101u; }

/* PRMT: byte i is byte (selector >> 4 i) & 7 of the eight bytes b:a. */
PAREDOWN_HD uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(a, b, selector);
#else
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t from = (selector >> (4 * i)) & 7u;
    out |= (((from < 4 ? a : b) >> (8 * (from & 3u))) & 0xFFu) << (8 * i);
  }
  return out;
#endif
}

/* The four codes of a quad. `words` are those of one row of a step, `stride` words apart. */
template <int BITS>
PAREDOWN_HD uint32_t four_codes(const uint32_t *words, int quad, int stride = 1) {
  using P = Planes<BITS>;
  uint32_t codes = 0;
  for (int p = 0; p < P::count; ++p) {
    const uint32_t mask = in_each_byte((1u << P::width(p)) - 1u);
    codes |= ((words[P::word(p, quad) * stride] >> P::shift(p, quad)) & mask) << P::place(p);
  }
  return codes;
}

/* Four codes below 16 as the nibbles of a PRMT selector. */
PAREDOWN_HD uint32_t selector_of(uint32_t codes) { return byte_perm(codes | (codes >> 4), 0u, 0x4420u); }

/* Look four codes up in a table of bytes. */
template <int BITS>
PAREDOWN_HD uint32_t four_bytes(uint32_t codes, const uint32_t *table) {
  if constexpr (BITS <= 2) {
    return byte_perm(table[0], 0u, selector_of(codes));
  } else if constexpr (BITS == 3) {
    return byte_perm(table[0], table[1], selector_of(codes));
  } else if constexpr (BITS == 4) {
    const uint32_t selector = selector_of(codes);
    const uint32_t low = byte_perm(table[0], table[1], selector);
    const uint32_t high = byte_perm(table[2], table[3], selector);
    const uint32_t upper = ((codes >> 3) & in_each_byte(1u)) * 0xFFu;
    return (low & ~upper) | (high & upper);
  } else {
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t code = (codes >> (8 * i)) & 0xFFu;
      out |= ((table[code / 4] >> (8 * (code % 4))) & 0xFFu) << (8 * i);
    }
    return out;
  }
}

/* A uniform table (entry i is i): nothing to look up. */
template <int BITS>
PAREDOWN_HD uint32_t four_bytes_uniform(uint32_t codes) {
  return codes;
}

/* Four halves, the first two in `low`. */
struct FourHalves {
  uint32_t low, high;
};

/* Look four codes up in a table of fp16, given as one table of low bytes and one of high bytes. */
template <int BITS>
PAREDOWN_HD FourHalves four_halves(uint32_t codes, const uint32_t *low_bytes, const uint32_t *high_bytes) {
  const uint32_t low = four_bytes<BITS>(codes, low_bytes), high = four_bytes<BITS>(codes, high_bytes);
  return {byte_perm(low, high, 0x5140u), byte_perm(low, high, 0x7362u)};
}

}  // namespace
}  // namespace paredown

#endif
