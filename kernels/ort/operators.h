/* The operators of the library, as onnxruntime's OrtCustomOp. */
#ifndef PAREDOWN_ORT_OPERATORS_H
#define PAREDOWN_ORT_OPERATORS_H

#include "node.h"

namespace paredown::ort {

/* Lut[Planes]Linear[Int8][LowRank][Relu|Gelu|GeluTanh|Silu]: act(x W^T + t L^T + bias); x, bias, t, y of one type. */
struct LinearOperator : Operator {
  const Api *api;
  Type type;
  bool planes, int8, low_rank;
  paredown_activation activation;
  char text[48];
};

/* LutGather, LutGatherFloat16, LutGatherBfloat16: W[indices]. No input says in which type the output is, and
 * onnxruntime asks the inputs only, so the name says it. */
struct GatherOperator : Operator {
  const Api *api;
  Type type;
  const char *text;
};

/* Lut[Planes]ConvInt8[Relu]: act(x * W + bias), a convolution of one group; x, bias, y of one type. */
struct ConvOperator : Operator {
  const Api *api;
  Type type;
  bool planes;
  paredown_activation activation;
  char text[32];
};

/* Fill the members that onnxruntime calls; the others are set. */
void make_linear(LinearOperator *made) noexcept;
/* The same operator for onnxruntime's CUDA provider, where it `runs_on_cuda`; float32 is not multiplied exactly there. */
bool runs_on_cuda(const LinearOperator &described) noexcept;
void make_cuda_linear(LinearOperator *made) noexcept;
void make_conv(ConvOperator *made) noexcept;
void make_gather(GatherOperator *made) noexcept;

}  // namespace paredown::ort

#endif
