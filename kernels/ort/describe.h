/* What onnxruntime calls of an operator, the same for all of ours. */
#ifndef PAREDOWN_ORT_DESCRIBE_H
#define PAREDOWN_ORT_DESCRIBE_H

#include <new>

#include "operators.h"

namespace paredown::ort {

/* Let nodes of an operator be computed by Kernel, made from Made, with create(info) and compute(context). */
template <class Kernel, class Made>
void compute_by(Made *made) noexcept {
  made->create = [](const Operator *self, const Api *api, const Info *info, void **kernel) noexcept -> Status * {
    Kernel *fresh = new (std::nothrow) Kernel(*static_cast<const Made *>(self));
    if (!fresh) return create_status(api, kFail, "paredown: no memory for a kernel");
    Status *status = fresh->create(info);
    if (status) delete fresh;
    *kernel = status ? nullptr : fresh;
    return status;
  };
  made->compute = [](void *kernel, Context *context) noexcept {
    return static_cast<Kernel *>(kernel)->compute(context);
  };
  made->destroy = [](void *kernel) noexcept { delete static_cast<Kernel *>(kernel); };
}

/* Fill all members but `inputs`, `input_type` and `infer`: one output of the operator's type, on the processor. */
template <class Kernel, class Made>
void describe(Made *made) noexcept {
  made->version = kApi;
  made->name = [](const Operator *self) noexcept -> const char * { return static_cast<const Made *>(self)->text; };
  made->provider = [](const Operator *) noexcept -> const char * { return nullptr; };
  made->outputs = [](const Operator *) noexcept -> size_t { return 1; };
  made->output_type = [](const Operator *self, size_t) noexcept { return static_cast<const Made *>(self)->type; };
  made->input_characteristic = [](const Operator *, size_t) noexcept { return kRequired; };
  made->output_characteristic = [](const Operator *, size_t) noexcept { return kRequired; };
  made->input_memory = [](const Operator *, size_t) noexcept { return kDefaultMemory; };
  compute_by<Kernel>(made);
}

}  // namespace paredown::ort

#endif
