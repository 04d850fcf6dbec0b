/* What convolution shares between conv.cpp, which cuts the work, and conv.inl, which does it. */
#ifndef PAREDOWN_CONV_H
#define PAREDOWN_CONV_H

#include "isa.h"

namespace paredown {

/* Where an output finds the inputs of each tap, from the word of the first one on. */
struct ConvTaps {
  int64_t count, quads, quad_bytes; /* of the channels; from one quad of a row to the next */
  const int64_t *place;             /* of each tap, in bytes of the image */
  const int64_t *word;              /* and in sums */
};

struct Conv {
  const paredown_conv *call;
  Weight weight;
  int64_t out_height, out_width;
  int64_t rows, phase_words, row_words; /* of an image with its border: columns of one phase, of all with slack */
  int64_t image_words;                  /* rows x row_words */
  ConvTaps taps;
  Tiles tiles;       /* of the outputs of a row */
  int8_t *image;     /* [image][row][quad][row_words] words */
  int32_t *sums;     /* [image][row][row_words] sums of the bytes of all channels */
  float *largest;    /* [image][part] */
  int64_t parts;     /* in which the largest input is looked for */
  float *scale;      /* [image] largest / 127 */
  bool must_correct; /* operands of this instruction set are not the entries less the zero */
};

/* Rows [first, last) of the outputs of all images, and the scratch of one task. */
struct ConvPart {
  int64_t first, last;
  uint8_t *buffer; /* two decoded blocks */
  int32_t *correction;
};

}  // namespace paredown

#endif
