#include "linear.cuh"

PD_LINEAR_KERNELS(KindBF16, bf16, 2)
