/* From the words of layout mma16 to fragments of operand A of `mma`, by lookups in registers.
 *
 * A lane has 8 codes of a step and row: `Codes`, in the low bits of the nibbles of a word, inputs 0 4 1 5 2 6 3 7 of the
 * eight from the lowest nibble up. PRMT looks 4 of them up at once, since it takes its selector from 4 nibbles. Tables
 * stay in registers, four entries to a word; halves are two tables, of the low and of the high bytes.
 *
 * Cost of a code in instructions of the integer pipe, as counted in the code for sm_80: see tests/kernels/test_cuda_sass.py.
 */
#ifndef PAREDOWN_CUDA_DECODE_CUH
#define PAREDOWN_CUDA_DECODE_CUH

#include "intrinsics.cuh"

namespace paredown {

enum { PD_F16 = 1, PD_BF16 = 2, PD_F32 = 3 };  // paredown_type of cpu/paredown.h

constexpr int UNIT_STEPS = 4, STEP = 32, UNIT = UNIT_STEPS * STEP, BLOCK_ROWS = 16;

template <int BITS>
constexpr int UNIT_BYTES = BLOCK_ROWS * UNIT * BITS / 8;

/* The words of a lane in one unit: those of row g and g + 8 by plane. */
template <int BITS>
struct Words {
  static_assert(BITS == 2 || BITS == 3 || BITS == 4, "the layout has codes of 2, 3 and 4 bits");
  uint32_t word[2 * BITS];

  /* Read the part of this lane from a unit. */
  PD_DEVICE void read(const unsigned char *unit, int lane) {
    const uint4 a = *reinterpret_cast<const uint4 *>(unit + 16 * lane);
    word[0] = a.x, word[1] = a.y, word[2] = a.z, word[3] = a.w;
    if constexpr (BITS == 4) {
      const uint4 b = *reinterpret_cast<const uint4 *>(unit + 512 + 16 * lane);
      word[4] = b.x, word[5] = b.y, word[6] = b.z, word[7] = b.w;
    }
    if constexpr (BITS == 3) {
      const uint2 b = *reinterpret_cast<const uint2 *>(unit + 512 + 8 * lane);
      word[4] = b.x, word[5] = b.y;
    }
  }

  /* The codes of a step of row g (upper = 0) or g + 8 (1). */
  PD_DEVICE uint32_t codes(int upper, int step) const {
    if constexpr (BITS == 4) return word[4 * (step / 2) + 2 * upper + step % 2];
    const uint32_t two = (word[2 * upper + step / 2] >> (2 * (step % 2))) & 0x33333333u;
    if constexpr (BITS == 3) {
      const uint32_t one = word[4 + upper];
      return two | ((step < 2 ? one << (2 - step) : one >> (step - 2)) & 0x44444444u);
    }
    return two;
  }
};

/* A table of 2^BITS bytes, looked up 4 at a time. */
template <int BITS>
struct Bytes {
  static constexpr int WORDS = 1 << (BITS - 2);
  uint32_t entry[WORDS];

  PD_DEVICE void read(const uint32_t *table) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) entry[i] = load4(table + i);
  }
  PD_DEVICE uint32_t four(uint32_t selector, uint32_t pick) const {
    if constexpr (BITS == 2) return permute(entry[0], entry[0], selector);
    if constexpr (BITS == 3) return permute(entry[0], entry[1], selector);
    if constexpr (BITS == 4) {
      return permute(permute(entry[0], entry[1], selector), permute(entry[2], entry[3], selector), pick);
    }
    return 0;
  }
};

/* Selectors of PRMT for 8 codes: the entry, and with 16 entries which half of the table it is in. */
template <int BITS>
struct Selectors {
  uint32_t low, high, pick_low, pick_high;

  /* `first` is FIRST_HALF, from a register: two constants would cost LOP3 one instruction more. */
  PD_DEVICE Selectors(uint32_t codes, uint32_t first) {
    low = BITS == 4 ? codes & 0x77777777u : codes;
    high = low >> 16;
    pick_low = BITS == 4 ? ((codes >> 1) & 0x44444444u) | first : 0u;
    pick_high = pick_low >> 16;
  }
};

/* Takes each byte from the first of two words; 4 more in a nibble takes it from the second. */
constexpr uint32_t FIRST_HALF = 0x32103210u;

/* What the tables need to know besides their entries: `shift` of the call, and 0 that the compiler cannot foresee. */
struct TableArguments {
  uint32_t shift, zero;
};

/* Products of halves: a step is two mma of 16 inputs, inputs 4 f .. 4 f + 3 of each lane in that of number f. */
template <int BITS>
struct HalfTable {
  static constexpr int WORDS = 2 * Bytes<BITS>::WORDS;
  Bytes<BITS> low_bytes, high_bytes;
  uint32_t first;

  PD_DEVICE void read(const uint32_t *table, const TableArguments &with) {
    low_bytes.read(table);
    high_bytes.read(table + Bytes<BITS>::WORDS);
    first = FIRST_HALF | with.zero;
  }
  /* Rows g (upper = 0) and g + 8 (1) are registers 0 and 1 of A, and 2 and 3 for the second pair of inputs. */
  PD_DEVICE void decode(uint32_t (&a)[2][4], uint32_t codes, int upper) const {
    const Selectors<BITS> s(codes, first);
    const uint32_t l0 = low_bytes.four(s.low, s.pick_low), h0 = high_bytes.four(s.low, s.pick_low);
    const uint32_t l1 = low_bytes.four(s.high, s.pick_high), h1 = high_bytes.four(s.high, s.pick_high);
    a[0][upper] = permute(l0, h0, 0x6240u);
    a[0][2 + upper] = permute(l1, h1, 0x6240u);
    a[1][upper] = permute(l0, h0, 0x7351u);
    a[1][2 + upper] = permute(l1, h1, 0x7351u);
  }
};

/* The same from a table of bytes, for float16: 1024 + byte is a half whose low byte is the byte. */
template <int BITS>
struct ByteToHalfTable {
  static constexpr int WORDS = Bytes<BITS>::WORDS;
  Bytes<BITS> bytes;
  uint32_t first, high_bytes, base;

  /* `shift` is 1024 + zero, twice. */
  PD_DEVICE void read(const uint32_t *table, const TableArguments &with) {
    bytes.read(table);
    first = FIRST_HALF | with.zero;
    high_bytes = 0x64646464u | with.zero;
    base = with.shift;
  }
  PD_DEVICE void decode(uint32_t (&a)[2][4], uint32_t codes, int upper) const {
    const Selectors<BITS> s(codes, first);
    const uint32_t v0 = bytes.four(s.low, s.pick_low), v1 = bytes.four(s.high, s.pick_high);
    a[0][upper] = subtract_f16(permute(v0, high_bytes, 0x4240u), base);
    a[0][2 + upper] = subtract_f16(permute(v1, high_bytes, 0x4240u), base);
    a[1][upper] = subtract_f16(permute(v0, high_bytes, 0x4341u), base);
    a[1][2 + upper] = subtract_f16(permute(v1, high_bytes, 0x4341u), base);
  }
};

/* Products of bytes: a step is one mma of 32 inputs, whose x lies in the order of the nibbles. */
template <int BITS>
struct ByteTable {
  static constexpr int WORDS = Bytes<BITS>::WORDS;
  Bytes<BITS> bytes;
  uint32_t first;

  PD_DEVICE void read(const uint32_t *table, const TableArguments &with) {
    bytes.read(table);
    first = FIRST_HALF | with.zero;
  }
  PD_DEVICE void decode(uint32_t (&a)[1][4], uint32_t codes, int upper) const {
    const Selectors<BITS> s(codes, first);
    a[0][upper] = bytes.four(s.low, s.pick_low);
    a[0][2 + upper] = bytes.four(s.high, s.pick_high);
  }
};

/* What a kind of kernel computes in: its table, its sums within a slot, and the x of one step (8 inputs of a lane). */
struct KindF16 {
  template <int BITS>
  using Table = HalfTable<BITS>;
  using Part = float;
  static constexpr int MMAS = 2, X_BYTES = 2;
  static constexpr Part START = 0.0f;
  PD_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_f16(d, a, b0, b1); }
};

struct KindF16B : KindF16 {
  template <int BITS>
  using Table = ByteToHalfTable<BITS>;
};

struct KindBF16 : KindF16 {
  PD_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_bf16(d, a, b0, b1); }
};

/* Sums start at the bits of 1.5 2^23: they stay below 2^22 (128 inputs of at most 128 x 127), and so the result, read
 * as a float, is that constant plus the sum. A conversion would take a quarter of the rate of an addition. */
struct KindS8 {
  template <int BITS>
  using Table = ByteTable<BITS>;
  using Part = int;
  static constexpr int MMAS = 1, X_BYTES = 1;
  static constexpr Part START = 0x4B400000;
  static constexpr float OFFSET = 12582912.0f;
  PD_DEVICE static void mma(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_s8(d, a, b0, b1); }
};

}  // namespace paredown
#endif
