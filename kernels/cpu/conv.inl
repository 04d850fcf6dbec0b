/* Dynamic int8 convolution, once for all instruction sets: include after kernel.inl.
 *
 * An image becomes signed bytes with a border of zeros: [row][quad of channels][column] words of four channels, columns
 * of equal remainder by the stride together, so that neighbouring outputs read neighbouring words, whatever the stride.
 * That is the order of a packed tile, and nothing is copied for each tap. A pair of blocks of W is decoded whole; then
 * all sums of a tile stand in registers from the first tap to the last.
 */
#include "conv.h"

namespace paredown {
namespace {

constexpr int row_tokens = 64; /* outputs of a row that are turned at once: 2 blocks of sums are 8 KiB */

/* --- round --- */

float largest_input(const void *x, int32_t type, int64_t count) {
  const char *at = static_cast<const char *>(x);
  const int64_t element = scale_bytes(type);
  F most[4];
  each<4>([&](auto i) { most[i.value] = Simd::fset(0.0f); });
  for (; count >= 4 * ROWS; count -= 4 * ROWS, at += 4 * ROWS * element) {
    each<4>([&](auto i) {
      const F value = Simd::load_as_float(at + i.value * ROWS * element, type, ROWS);
      most[i.value] = Simd::fmax(most[i.value], Simd::fabs(value));
    });
  }
  for (; count > 0; count -= ROWS, at += ROWS * element) {
    most[0] = Simd::fmax(most[0], Simd::fabs(Simd::load_as_float(at, type, min_of(ROWS, count))));
  }
  return Simd::fmax_of(Simd::fmax(Simd::fmax(most[0], most[1]), Simd::fmax(most[2], most[3])));
}

/* Put 16 words of neighbouring columns to their phases; with a stride of 1 also what is behind `count`: the row has
 * room, and the next to be written comes over it. */
inline void put_words(const Conv &conv, I words, int64_t column, int64_t count, int32_t *row) {
  const int64_t stride = conv.call->stride[1];
  if (stride == 1) return Simd::store(row + column, words);
  alignas(64) int32_t word[ROWS];
  Simd::store(word, words);
  int64_t phase = column % stride, place = column / stride;
  for (int64_t i = 0; i < count; ++i) {
    if (place < conv.phase_words) row[phase * conv.phase_words + place] = word[i];
    if (++phase == stride) {
      phase = 0;
      ++place;
    }
  }
}

void round_row(const Conv &conv, int64_t image, int64_t row) {
  const paredown_conv &call = *conv.call;
  const int64_t element = scale_bytes(call.type), plane = call.height * call.width, left = call.pad[1];
  const int64_t from = row - call.pad[0], quads = conv.taps.quads;
  int32_t *words = reinterpret_cast<int32_t *>(conv.image) + (image * conv.image_words + row * conv.row_words) * quads;
  int32_t *sums = conv.sums + image * conv.image_words + row * conv.row_words;
  const bool inside = from >= 0 && from < call.height;
  if (!inside || call.stride[1] > 1 || left > 0 || call.pad[3] > 0) {
    __builtin_memset(words, 0, static_cast<size_t>(conv.row_words * quads) * 4);
  }
  __builtin_memset(sums, 0, static_cast<size_t>(conv.row_words) * 4);
  if (!inside) return;
  const float factor = conv.scale[image] == 0.0f ? 0.0f : 127.0f / conv.largest[image * conv.parts];
  const F by = Simd::fset(factor);
  const char *x = static_cast<const char *>(call.x) + (image * call.channels * plane + from * call.width) * element;
  for (int64_t column = 0; column < call.width; column += ROWS) {
    const int64_t here = min_of(ROWS, call.width - column);
    I total = Simd::set(0);
    for (int64_t quad = 0; quad < quads; ++quad) {
      I q[4];
      each<4>([&](auto i) {
        const int64_t channel = quad * 4 + i.value;
        const char *at = x + (channel * plane + column) * element;
        const F value = channel < call.channels ? Simd::load_as_float(at, call.type, here) : Simd::fset(0.0f);
        q[i.value] = Simd::to_int(Simd::fmul(value, by));
      });
      total = Simd::add(total, Simd::add(Simd::add(q[0], q[1]), Simd::add(q[2], q[3])));
      put_words(conv, Simd::words_of(q), left + column, here, words + quad * conv.row_words);
    }
    put_words(conv, total, left + column, here, sums);
  }
}

/* --- multiply --- */

#ifdef PAREDOWN_TRANSPOSE
inline void turn(const float *from, int64_t stride, float *to) { Simd::transpose(from, stride, to); }
#else
/* Turn 16 x 16 floats. */
inline void turn(const float *from, int64_t stride, float *to) {
  for (int64_t i = 0; i < ROWS; ++i) {
    for (int64_t j = 0; j < ROWS; ++j) to[i * ROWS + j] = from[j * stride + i];
  }
}
#endif

#ifndef PAREDOWN_OWN_CONV_TILE
constexpr int conv_outputs = Simd::tile;

template <int BITS, int R>
inline void decode_in_order(const Simd::Bytes<BITS> &table, Stream<R> &stream, int64_t steps, uint8_t *out) {
  decode_bytes<BITS, R>(table, stream, steps, out);
}

/* Sums of T neighbouring outputs with R blocks. `x` is the word of the first output at the first tap; `taps` are the
 * places of the others, in bytes. */
template <int T, int R>
void conv_tile(const uint8_t *w, const ConvTaps &taps, const int8_t *x, const int32_t *correction, float *totals) {
  I sum[T][R];
  each<T>([&](auto t) { each<R>([&](auto r) { sum[t.value][r.value] = Simd::set(correction[t.value]); }); });
  for (int64_t tap = 0; tap < taps.count; ++tap) {
    const int8_t *at = x + taps.place[tap];
    for (int64_t quad = taps.quads; quad > 0; --quad) {
      Operand bytes[R];
      each<R>([&](auto r) { bytes[r.value] = Simd::operand(Simd::load(w + r.value * UNIT_BYTES)); });
      each<T>([&](auto t) {
        each<R>([&](auto r) {
          sum[t.value][r.value] = Simd::dot(sum[t.value][r.value], bytes[r.value], at + t.value * 4);
        });
      });
      w += R * UNIT_BYTES;
      at += taps.quad_bytes;
    }
  }
  each<T>([&](auto t) {
    each<R>([&](auto r) {
      Simd::fstore(totals + (t.value * R + r.value) * ROWS, Simd::to_float(sum[t.value][r.value]));
    });
  });
}
#endif

template <int R>
using ConvTile = decltype(&conv_tile<1, R>);
template <int R, class Widths = std::make_integer_sequence<int, conv_outputs>>
struct ConvTiles;
template <int R, int... T>
struct ConvTiles<R, std::integer_sequence<int, T...>> {
  static constexpr ConvTile<R> of[] = {&conv_tile<T + 1, R>...};
};

/* Turn sums [output][block][16] to rows of y: times the scales, with bias and activation. */
template <int R>
void finish_outputs(const Conv &conv, int64_t block, int64_t image, int64_t first, int64_t outputs, F (&scale)[R],
                    float *totals) {
  const paredown_conv &call = *conv.call;
  const int64_t element = scale_bytes(call.type), plane = conv.out_height * conv.out_width;
  const F of_x = Simd::fset(conv.scale[image] * conv.weight.given.unit);
  const F least = Simd::fset(call.activation == PAREDOWN_RELU ? 0.0f : -__builtin_inff());
  for (int r = 0; r < R; ++r) {
    const int64_t row = (block + r) * ROWS, rows = min_of(ROWS, conv.weight.given.n - row);
    const char *bias = static_cast<const char *>(call.bias) + row * element;
    const F add = call.bias == nullptr ? Simd::fset(0.0f) : Simd::load_as_float(bias, call.type, rows);
    const F factor = Simd::fmul(of_x, scale[r]);
    char *y = static_cast<char *>(call.y) + ((image * conv.weight.given.n + row) * plane + first) * element;
    for (int64_t output = 0; output < outputs; output += ROWS) {
      alignas(64) float turned[ROWS * ROWS];
      const int64_t here = min_of(ROWS, outputs - output);
      for (int64_t i = 0; i < here; ++i) {
        float *at = totals + ((output + i) * R + r) * ROWS;
        Simd::fstore(at, Simd::fmax(least, Simd::fma(Simd::fload(at), factor, add)));
      }
      turn(totals + (output * R + r) * ROWS, R * ROWS, turned);
      for (int64_t i = 0; i < rows; ++i) {
        Simd::store_float_as(y + (i * plane + output) * element, call.type, Simd::fload(turned + i * ROWS), here);
      }
    }
  }
}

/* What the products of the outputs of a row miss of the table's zero: the sums of the bytes under each. */
inline void correct(const Conv &conv, int64_t image, int64_t row, int32_t *out) {
  const int64_t first = image * conv.image_words + row * conv.call->stride[0] * conv.row_words;
  const int32_t factor = Simd::int8_offset - static_cast<int32_t>(conv.weight.given.zero);
  for (int64_t i = 0; i < conv.out_width; ++i) out[i] = 0;
  for (int64_t tap = 0; tap < conv.taps.count; ++tap) {
    const int32_t *sums = conv.sums + first + conv.taps.word[tap];
    for (int64_t i = 0; i < conv.out_width; ++i) out[i] += sums[i];
  }
  for (int64_t i = 0; i < conv.out_width; ++i) out[i] *= factor;
}

template <int BITS, int R>
void conv_blocks(const Conv &conv, int64_t block, const ConvPart &part) {
  const Weight &weight = conv.weight;
  const Simd::Bytes<BITS> table(byte_table(weight, block));
  Stream<R> stream(weight, block);
  F scale[R];
  each<R>([&](auto r) { scale[r.value] = stream.scales(r.value, 0); });
  decode_in_order<BITS, R>(table, stream, weight.steps, part.buffer);
  alignas(64) float totals[(row_tokens + ROWS) * R * ROWS];
  for (int64_t at = part.first; at < part.last; ++at) {
    const int64_t image = at / conv.out_height, row = at % conv.out_height;
    if (conv.must_correct) correct(conv, image, row, part.correction);
    const int64_t first_word = image * conv.image_words + row * conv.call->stride[0] * conv.row_words;
    const int8_t *x = conv.image + first_word * conv.taps.quads * 4;
    int64_t done = 0, waiting = 0;
    for (int64_t tile = 0; tile < conv.tiles.count; ++tile) {
      const int64_t start = tile_start(conv.tiles, tile), width = tile_start(conv.tiles, tile + 1) - start;
      if (waiting + width > row_tokens) {
        finish_outputs<R>(conv, block, image, row * conv.out_width + done, waiting, scale, totals);
        done += waiting;
        waiting = 0;
      }
      ConvTiles<R>::of[width - 1](part.buffer, conv.taps, x + start * 4, part.correction + start,
                                  totals + waiting * R * ROWS);
      waiting += width;
    }
    finish_outputs<R>(conv, block, image, row * conv.out_width + done, waiting, scale, totals);
  }
}

template <int R>
void conv_blocks_of(const Conv &conv, int64_t block, const ConvPart &part) {
  const int bits = bits_of(conv.weight);
  each<9>([&](auto b) {
    if (bits == b.value) conv_blocks<decltype(b)::value, R>(conv, block, part);
  });
}

void convolve(const Conv &conv, int64_t first, int64_t last, const ConvPart &part) {
  for (int64_t i = 0; i < conv.out_width && !conv.must_correct; ++i) part.correction[i] = 0;
  for (int64_t block = first; block < last;) {
    if (Simd::blocks == 2 && block + 1 < last && same_table(conv.weight, block)) {
      conv_blocks_of<Simd::blocks>(conv, block, part);
      block += 2;
    } else {
      conv_blocks_of<1>(conv, block, part);
      ++block;
    }
  }
}

constexpr Convolution convolution = {conv_outputs, Simd::int8_offset, largest_input, round_row, convolve};

}  // namespace
}  // namespace paredown
