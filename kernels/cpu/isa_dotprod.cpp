// NEON with sdot: Cortex-A76, A78AE (Orin), Neoverse N1 and later.
#define PAREDOWN_OWN_DECODE
#define PAREDOWN_OWN_TILE_INT8
#define PAREDOWN_OWN_MULTIPLY_BYTES
#include "simd_neon.h"
// After the vectors.
#include "kernel.inl"
// After the loops.
#include "kernel_neon.inl"
#include "conv_neon.inl"
// After its tile.
#include "conv.inl"

namespace paredown {

const Isa dotprod_isa = {"dotprod", {Simd::tile, Simd::tile}, Simd::tile, 0, tokens_at_once, pack, multiply, &convolution,
                         multiply_bytes};

}  // namespace paredown
