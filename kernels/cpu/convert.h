/* Numbers of 16 bits, one at a time. */
#ifndef PAREDOWN_CONVERT_H
#define PAREDOWN_CONVERT_H

#include <math.h>
#include <string.h>

#include "paredown.h"

namespace paredown {
namespace {

inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, rest = half & 0x7FFFu;
  if (rest >= 0x7C00u) return float_of_bits(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
  if (rest >= 0x400u) return float_of_bits(sign | ((rest << 13) + (112u << 23)));
  const float tiny = static_cast<float>(rest) * 0x1p-24f;
  return float_of_bits(sign | bits_of_float(tiny));
}

/* Half to even; what is not a number stays one. */
inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7FFFFFFFu;
  if (rest > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (rest >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
  if (rest < 0x38800000u) { /* below 2^-14: steps of 2^-24 */
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(nearbyint(float_of_bits(rest) * 0x1p24f)));
  }
  return static_cast<uint16_t>(sign | (rest - (112u << 23) + 0xFFFu + (rest >> 13 & 1u)) >> 13);
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

inline float load_as_float(const void *p, int32_t type, int64_t i) {
  if (type == PAREDOWN_F32) return static_cast<const float *>(p)[i];
  const uint16_t bits = static_cast<const uint16_t *>(p)[i];
  return type == PAREDOWN_F16 ? half_to_float(bits) : float_of_bits(static_cast<uint32_t>(bits) << 16);
}

inline void store_float_as(void *p, int32_t type, int64_t i, float value) {
  if (type == PAREDOWN_F32) {
    static_cast<float *>(p)[i] = value;
  } else {
    static_cast<uint16_t *>(p)[i] = type == PAREDOWN_F16 ? float_to_half(value) : float_to_bfloat16(value);
  }
}

}  // namespace
}  // namespace paredown

#endif
