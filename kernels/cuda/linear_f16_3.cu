#include "linear.cuh"

PD_LINEAR_KERNELS(KindF16, f16, 3)
