/* From what a caller gives to a Weight: the checks of its sizes. */
#ifndef PAREDOWN_WEIGHT_H
#define PAREDOWN_WEIGHT_H

#include "isa.h"

namespace paredown {

/* Fill in `out`; false where the sizes, types or pointers are no weight. */
bool read_weight(const paredown_weight *given, Weight &out);

/* As read_weight, without looking at the pointers. */
bool read_sizes(const paredown_weight *given, Weight &out);

}  // namespace paredown

#endif
