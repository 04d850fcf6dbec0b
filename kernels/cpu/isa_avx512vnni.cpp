// AVX-512 with VNNI and VBMI: Ice Lake, Zen 4 and later.
#include "simd_avx512.h"
// After the vectors.
#include "kernel.inl"
// After the loops.
#include "conv.inl"

namespace paredown {

const Isa avx512vnni_isa = {"avx512vnni", {Simd::tile, Simd::tile}, exact_tile, exact_tokens, tokens_at_once, pack, multiply, &convolution,
                            multiply_bytes};

}  // namespace paredown
