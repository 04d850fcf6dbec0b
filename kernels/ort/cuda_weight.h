/* A weight on a GPU, in the layout of the CUDA kernels: what kernels/cuda/call.py `pack` makes for torch. */
#ifndef PAREDOWN_ORT_CUDA_WEIGHT_H
#define PAREDOWN_ORT_CUDA_WEIGHT_H

#include "cuda_plan.h"

namespace paredown::ort::cuda {

/* What a weight is made of, in host memory: layout c16, the left factor of its low-rank term and n values of bias, or
 * null. `type` is that of x, y and bias. */
struct HostWeight {
  const paredown_weight *weight, *left;
  const void *bias;
  int32_t type;
  bool int8;
};

class DeviceWeight {
 public:
  /* Upload; codes are put in order on the device, by the kernel `repack`. Everything is there on return. */
  DeviceWeight(Device &device, const HostWeight &host);

  const Shape &shape() const noexcept { return shape_; }
  const Unit &unit() const noexcept { return unit_; }
  /* What the linear kernels are told of the weight, of bias and of the left factor; the rest is of a call. */
  const LinearArguments &arguments() const noexcept { return arguments_; }

 private:
  const Shape shape_;
  const Unit &unit_;
  Memory memory_;
  LinearArguments arguments_;
};

}  // namespace paredown::ort::cuda

#endif
