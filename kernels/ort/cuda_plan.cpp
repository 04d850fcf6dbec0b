#include "cuda_plan.h"

#include <algorithm>
#include <iterator>

namespace paredown::ort::cuda {

namespace {

bool is_whole_byte(float zero) { return zero >= 0 && zero <= 255 && zero == static_cast<float>(static_cast<int>(zero)); }

Kind kind_of(const paredown_weight &weight, int32_t type, bool int8) {
  if (int8) return kS8;
  if (type == PAREDOWN_BF16) return kBf16;
  return weight.table_type == PAREDOWN_U8 && weight.bits == 4 && is_whole_byte(weight.zero) ? kF16b : kF16;
}

const Form &form_for(const Shape &shape, int64_t m, int processors) {
  const bool tile = m > kGemvMost;
  const bool paired = shape.table_rows % 32 == 0 && shape.n >= int64_t{2} * 32 * processors;
  const Form *last = nullptr;
  for (const Form &form : kForms) {
    if (form.tile != tile || (!tile && form.rows != (paired ? 32 : 16))) continue;
    last = &form;
    if (form.tokens >= m) break;
  }
  return *last;
}

}  // namespace

Shape::Shape(const paredown_weight &weight)
    : n(weight.n),
      k(weight.k),
      bits(weight.bits),
      group(weight.group ? weight.group : weight.k),
      groups(ceil_div(k, group)),
      table_rows(weight.table_rows),
      blocks(ceil_div(n, kRows)),
      group_steps(ceil_div(group, kStep)) {
  steps = k / group * group_steps + ceil_div(k % group, kStep);
  units = ceil_div(steps, kUnitSteps);
  const bool whole = groups == 1 || group_steps % kUnitSteps == 0;
  steps_per_slot = whole ? kUnitSteps : group_steps % 2 == 0 ? 2 : 1;
  units_per_slot = whole ? std::max<int64_t>(1, ceil_div(group_steps, kUnitSteps)) : 1;
  slots = whole ? groups : units * kUnitSteps / steps_per_slot;
}

const Unit &unit_for(const paredown_weight &weight, int32_t type, bool int8) {
  const Kind kind = kind_of(weight, type, int8);
  for (const Unit &unit : kUnits) {
    if (unit.kind == kind && unit.bits == weight.bits) return unit;
  }
  throw Failure{"codes of " + std::to_string(weight.bits) +
                " bits, the CUDA kernels have 2, 3 and 4; run the model without the CUDA provider"};
}

Plan::Plan(const Shape &shape, int64_t m, int processors) {
  const Form &chosen = form_for(shape, m, processors);
  form = static_cast<size_t>(&chosen - kForms);
  const int64_t rows = ceil_div(shape.n, chosen.rows), tokens = ceil_div(m, chosen.tokens);
  const int64_t most = std::min(processors / (rows * tokens), shape.units / (2 * kUnitSteps));
  parts = chosen.tile ? std::max<int64_t>(1, most) : 1;
  grid = {static_cast<unsigned>(rows), static_cast<unsigned>(tokens), static_cast<unsigned>(parts)};
}

bool reads_in_place(const Shape &shape, const void *x) {
  const bool aligned = shape.k % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  return aligned && (shape.groups == 1 || shape.group % kStep == 0);
}

}  // namespace paredown::ort::cuda
