#include "linear.cuh"

PD_LINEAR_KERNELS(KindF16B, f16b, 4)
