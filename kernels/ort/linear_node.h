/* What the kernels of the Lut...Linear... operators share, whichever processor they run on: attributes and inputs. */
#ifndef PAREDOWN_ORT_LINEAR_NODE_H
#define PAREDOWN_ORT_LINEAR_NODE_H

#include "operators.h"

namespace paredown::ort {

/* The inputs of one run; `m` rows. */
struct LinearInputs {
  const void *x, *t;
  void *y;
  int64_t m;
};

class LinearNode {
 public:
  /* x, codes, table, scale, bias, and with a low-rank term t, left_codes, left_table, left_scale. */
  enum Input : size_t { kX = 0, kCodes = 1, kBias = 4, kT = 5, kLeft = 6 };

  explicit LinearNode(const LinearOperator &operator_) noexcept
      : described(operator_), node(operator_.api, operator_.text) {}

  Status *create(const Info *info) noexcept;
  /* Take a bias that is not constant from this run. */
  Status *take_bias(const Context *context, const void **values) const noexcept;
  /* Look at x and t of this run, and make y. */
  Status *inputs(Context *context, LinearInputs *found) const noexcept;

  const LinearOperator &described;
  Node node;
  Weight weight, left;
  bool constant_bias = false;
  const void *bias = nullptr; /* n values, or null for none */

 private:
  Status *read_bias(const Tensor &tensor, const void **values) const noexcept;
};

}  // namespace paredown::ort

#endif
