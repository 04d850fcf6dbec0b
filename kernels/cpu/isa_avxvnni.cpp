// AVX2 with VNNI: Alder Lake, Zen 5 and later.
#include "simd_avx2.h"
// After the vectors.
#include "kernel.inl"
// After what it completes.
#include "kernel_avx2.inl"
// After the loops.
#include "conv.inl"

namespace paredown {

const Isa avxvnni_isa = {"avxvnni", {Simd::tile, Simd::tile}, exact_tile, exact_tokens, tokens_at_once, pack, multiply, &convolution,
                         multiply_bytes};

}  // namespace paredown
