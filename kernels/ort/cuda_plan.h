/* How a product of m rows is cut and started: the formulas of kernels/layout_mma16.py and kernels/cuda/launch.py, which
 * explain them. tests/kernels/test_ort_cuda.py holds both against each other. */
#ifndef PAREDOWN_ORT_CUDA_PLAN_H
#define PAREDOWN_ORT_CUDA_PLAN_H

#include "../cpu/paredown.h"
#include "cuda_device.h"

namespace paredown::ort::cuda {

constexpr int64_t kRows = 16, kStep = 32, kUnitSteps = 4, kUnitInputs = 128, kUnitCodes = 16 * 128;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* layout_mma16.Shape; `group` is k where there is one group, `steps` those of layout c16. */
struct Shape {
  explicit Shape(const paredown_weight &weight);

  int64_t n, k, bits, group, groups, table_rows;
  int64_t blocks, steps, units, group_steps, steps_per_slot, units_per_slot, slots;

  size_t codes_bytes() const { return static_cast<size_t>(blocks * units * kUnitCodes * bits / 8); }
};

/* launch.kind_of and launch.refusal: the unit for activations of a type (paredown_type). Failure says why there is none. */
const Unit &unit_for(const paredown_weight &weight, int32_t type, bool int8);

/* launch.choose and launch.splits. */
struct Plan {
  Plan(const Shape &shape, int64_t m, int processors);

  size_t form;
  int64_t parts;
  Grid grid;
};

/* launch.reads_in_place for rows of k halves without gaps. */
bool reads_in_place(const Shape &shape, const void *x);

}  // namespace paredown::ort::cuda

#endif
