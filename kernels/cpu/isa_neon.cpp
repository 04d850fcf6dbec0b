// NEON of every 64-bit ARM processor: Cortex-A53, A57 and A72, without sdot.
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

/* Without sdot a sum takes two registers, so that half as wide a tile fits. */
const Isa neon_isa = {"neon", {Simd::tile, Simd::tile / 2}, Simd::tile, 0, tokens_at_once, pack, multiply, &convolution,
                      multiply_bytes};

}  // namespace paredown
