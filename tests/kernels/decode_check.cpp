// Compares kernels/lut_decode.h with the words of paredown.h, bit by bit, and prints what differs.
#include "lut_decode.h"

#include <cstdint>
#include <cstdio>

namespace {

uint64_t state = 1;

uint32_t random_word() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}

/* The code of an input of a step, from the definition: planes of w bits, input 4 f + b in bits 8 b + w f upwards. */
uint32_t code_of(const uint32_t *words, int bits, int input) {
  uint32_t code = 0;
  int below = 0;
  for (int w = 8; w > 0; w /= 2) {
    if ((bits & w) == 0) continue;
    const int inside = input % (32 / w), field = inside / 4, byte = inside % 4;
    code |= (words[below + input / (32 / w)] >> (8 * byte + w * field) & ((1u << w) - 1u)) << below;
    below += w;
  }
  return code;
}

uint8_t byte_of(const uint32_t *words, uint32_t i) { return static_cast<uint8_t>(words[i / 4] >> (8 * (i % 4))); }

template <int BITS>
int check(int rounds) {
  int wrong = 0;
  for (int round = 0; round < rounds; ++round) {
    const int stride = 1 + round % 3;
    uint32_t words[BITS * 3], row[BITS], table[64], high[64];
    for (uint32_t &word : words) word = random_word();
    for (uint32_t &word : table) word = random_word();
    for (uint32_t &word : high) word = random_word();
    for (int i = 0; i < BITS; ++i) row[i] = words[i * stride];
    for (int quad = 0; quad < 8; ++quad) {
      const uint32_t codes = paredown::four_codes<BITS>(words, quad, stride);
      const uint32_t bytes = paredown::four_bytes<BITS>(codes, table);
      const paredown::FourHalves halves = paredown::four_halves<BITS>(codes, table, high);
      for (int i = 0; i < 4; ++i) {
        const uint32_t code = code_of(row, BITS, 4 * quad + i), entry = byte_of(table, code);
        const uint32_t half = (i < 2 ? halves.low : halves.high) >> (16 * (i % 2)) & 0xFFFFu;
        wrong += (codes >> (8 * i) & 0xFFu) != code;
        wrong += (paredown::four_bytes_uniform<BITS>(codes) >> (8 * i) & 0xFFu) != code;
        wrong += (bytes >> (8 * i) & 0xFFu) != entry;
        wrong += half != (entry | static_cast<uint32_t>(byte_of(high, code)) << 8);
      }
    }
  }
  std::printf("%d bits: %d wrong\n", BITS, wrong);
  return wrong;
}

}  // namespace

int main() {
  constexpr int rounds = 20000;
  return check<1>(rounds) + check<2>(rounds) + check<3>(rounds) + check<4>(rounds) + check<5>(rounds) +
                     check<6>(rounds) + check<7>(rounds) + check<8>(rounds) ==
                 0
             ? 0
             : 1;
}
