// Any processor.
#include "simd_portable.h"
// After the vectors.
#include "kernel.inl"
// After the loops.
#include "conv.inl"

namespace paredown {

const Isa portable_isa = {"portable", {Simd::tile, Simd::tile}, Simd::tile, 0, tokens_at_once, pack, multiply, &convolution,
                          multiply_bytes};

}  // namespace paredown
