/* From sums to y: bias, activation, one rounding. Shared by the linear kernels and by `reduce`. */
#ifndef PAREDOWN_CUDA_FINISH_CUH
#define PAREDOWN_CUDA_FINISH_CUH

#include "intrinsics.cuh"

namespace paredown {

/* y, m rows of n values `stride` apart. With a grid of several z, y is float32 (z, m, n) for `reduce` to finish. */
struct Output {
  void *y;
  const void *bias;
  int stride, n, m, type, activation;

  PD_DEVICE float activated(float value) const {
    switch (activation) {  // paredown_activation of cpu/paredown.h
      case 1:
        return value > 0.0f ? value : 0.0f;
      case 2:
        return 0.5f * value * (1.0f + erf_of(value * 0.70710678118654752f));
      case 3:
        return 0.5f * value * (1.0f + tanh_of(0.79788456080286536f * (value + 0.044715f * value * value * value)));
      case 4:
        return divide(value, 1.0f + exp_of(-value));
      default:
        return value;
    }
  }

  /* y[row of x, column of y] = act(sum + bias). */
  PD_DEVICE void finish(float sum, int column, int row) const {
    if (bias) sum += number(bias, column);
    const float value = activated(sum);
    const int64_t index = static_cast<int64_t>(row) * stride + column;
    if (type == 3) {
      static_cast<float *>(y)[index] = value;
    } else {
      static_cast<uint16_t *>(y)[index] = type == 1 ? to_f16(value) : to_bf16(value);
    }
  }

  PD_DEVICE void write(float sum, int column, int row) const {
    if (grid_size_z() == 1) {
      finish(sum, column, row);
    } else {
      static_cast<float *>(y)[(static_cast<int64_t>(block_index_z()) * m + row) * n + column] = sum;
    }
  }

  PD_DEVICE float number(const void *values, int index) const {
    if (type == 3) return float_of(load4(static_cast<const uint32_t *>(values) + index));
    const uint16_t half = load2(static_cast<const uint16_t *>(values) + index);
    return type == 1 ? from_f16(half) : from_bf16(half);
  }
};

}  // namespace paredown
#endif
