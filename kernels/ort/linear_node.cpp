#include "linear_node.h"

#include <string.h>

namespace paredown::ort {

Status *LinearNode::create(const Info *info) noexcept {
  node.name_after(info);
  PAREDOWN_TRY(weight.read_base(node, info, described.planes, kCodes));
  const float zero = weight.value.zero;
  const bool whole = zero >= 0 && zero <= 255 && zero == static_cast<float>(static_cast<int>(zero));
  if (described.int8 && (weight.value.table_type != PAREDOWN_U8 || !whole))
    return node.fail("int8 inputs need a uint8 table and a whole zero in 0..255 (zero=%g)", static_cast<double>(zero));
  if (described.low_rank) {
    left.value.n = weight.value.n;
    PAREDOWN_TRY(node.read(info, "", "rank", &left.value.k));
    PAREDOWN_TRY(left.read(node, info, "left_", kLeft));
  }
  int is_constant = 0;
  const Value *value = nullptr;
  PAREDOWN_TRY(constant_input(node.api(), info, kBias, &is_constant, &value));
  constant_bias = is_constant && value;
  if (!constant_bias) return nullptr;
  Tensor seen;
  PAREDOWN_TRY(node.view(value, &seen));
  return read_bias(seen, &bias);
}

Status *LinearNode::take_bias(const Context *context, const void **values) const noexcept {
  Tensor seen;
  PAREDOWN_TRY(node.input(context, kBias, &seen));
  return read_bias(seen, values);
}

/* One value where there are more outputs stands for no bias. */
Status *LinearNode::read_bias(const Tensor &tensor, const void **values) const noexcept {
  const int64_t n = weight.value.n, count = tensor.count();
  *values = tensor.data;
  if (count == n) return nullptr;
  if (count != 1)
    return node.fail("bias has %lld values, W has %lld rows", static_cast<long long>(count), static_cast<long long>(n));
  uint32_t bits = 0;
  memcpy(&bits, tensor.data, described.type == kFloat ? 4 : 2);
  if (bits << (described.type == kFloat ? 1 : 17))
    return node.fail("a bias of one value is 0 where W has %lld rows", static_cast<long long>(n));
  *values = nullptr;
  return nullptr;
}

Status *LinearNode::inputs(Context *context, LinearInputs *found) const noexcept {
  *found = {};
  Tensor x;
  PAREDOWN_TRY(node.input(context, kX, &x));
  const int64_t k = weight.value.k, rank = left.value.k;
  if (x.rank == 0) return node.fail("x is a scalar; W takes %lld inputs", static_cast<long long>(k));
  if (x.sizes[x.rank - 1] != k)
    return node.fail("the last size of x is %lld, W takes %lld inputs", static_cast<long long>(x.sizes[x.rank - 1]),
                     static_cast<long long>(k));
  Output y;
  PAREDOWN_TRY(node.output(context, x.sizes, x.rank - 1, weight.value.n, &y));
  found->x = x.data, found->y = y.data, found->m = y.rows;
  if (!described.low_rank || y.rows == 0) return nullptr;
  Tensor t;
  PAREDOWN_TRY(node.input(context, kT, &t));
  if (t.rank == 0 || t.sizes[t.rank - 1] != rank || t.count() != y.rows * rank)
    return node.fail("t has %lld elements; %lld rows of rank %lld are needed", static_cast<long long>(t.count()),
                     static_cast<long long>(y.rows), static_cast<long long>(rank));
  found->t = t.data;
  return nullptr;
}

}  // namespace paredown::ort
