#include "linear.cuh"

PD_LINEAR_KERNELS(KindS8, s8, 2)
