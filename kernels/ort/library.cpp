/* RegisterCustomOps, by which onnxruntime learns of the operators of domain "paredown". */
#include <stdio.h>
#include <string.h>

#include <mutex>
#include <new>

#include "operators.h"

namespace paredown::ort {

namespace {

constexpr Type kFloats[] = {kFloat, kFloat16, kBfloat16};
constexpr const char *kGathers[] = {"LutGather", "LutGatherFloat16", "LutGatherBfloat16"};

struct Activation {
  const char *name;
  paredown_activation number;
};
constexpr Activation kActivations[] = {{"", PAREDOWN_NONE},
                                       {"Relu", PAREDOWN_RELU},
                                       {"Gelu", PAREDOWN_GELU},
                                       {"GeluTanh", PAREDOWN_GELU_TANH},
                                       {"Silu", PAREDOWN_SILU}};

/* Planes, Int8, LowRank: yes and no of each. */
constexpr size_t kNames = 2 * 2 * 2 * (sizeof kActivations / sizeof *kActivations), kTypes = 3;
/* Planes, Relu. */
constexpr size_t kConvs = 2 * 2;

/* The operators for one onnxruntime in this process, made once and kept: the library is never unloaded (build.py). */
struct Registration {
  Registration(const Api *runtime) noexcept;

  const Api *const api;
  Domain *domain = nullptr;
  Registration *next = nullptr;
  LinearOperator linear[kNames * kTypes] = {}, cuda[kNames * kTypes] = {};
  size_t on_cuda = 0;
  GatherOperator gather[kTypes] = {};
  ConvOperator conv[kConvs * kTypes] = {};
};

Registration::Registration(const Api *runtime) noexcept : api(runtime) {
  size_t made = 0;
  for (const Activation &activation : kActivations)
    for (int kind = 0; kind < 8; ++kind)
      for (Type type : kFloats) {
        LinearOperator &op = linear[made++];
        op.api = runtime, op.type = type, op.activation = activation.number;
        op.planes = kind & 1, op.int8 = kind & 2, op.low_rank = kind & 4;
        snprintf(op.text, sizeof op.text, "Lut%sLinear%s%s%s", op.planes ? "Planes" : "", op.int8 ? "Int8" : "",
                 op.low_rank ? "LowRank" : "", activation.name);
        if (runs_on_cuda(op)) make_cuda_linear(&(cuda[on_cuda++] = op));
        make_linear(&op);
      }
  for (size_t i = 0; i < kTypes; ++i) {
    gather[i].api = runtime, gather[i].type = kFloats[i], gather[i].text = kGathers[i];
    make_gather(&gather[i]);
  }
  made = 0;
  for (int kind = 0; kind < 4; ++kind)
    for (Type type : kFloats) {
      ConvOperator &op = conv[made++];
      op.api = runtime, op.type = type, op.planes = kind & 1;
      op.activation = kind & 2 ? PAREDOWN_RELU : PAREDOWN_NONE;
      snprintf(op.text, sizeof op.text, "Lut%sConvInt8%s", op.planes ? "Planes" : "", kind & 2 ? "Relu" : "");
      make_conv(&op);
    }
}

/* Whether this onnxruntime was built with the CUDA provider: operators for it cost every session time otherwise. */
Status *has_cuda(const Api *api, bool *found) noexcept {
  char **names = nullptr;
  int count = 0;
  PAREDOWN_TRY(available_providers(api, &names, &count));
  for (int i = 0; i < count; ++i) *found |= strcmp(names[i], "CUDAExecutionProvider") == 0;
  return release_providers(api, names, count);
}

Status *fill(Registration *made) noexcept {
  const Api *api = made->api;
  bool cuda = false;
  PAREDOWN_TRY(has_cuda(api, &cuda));
  Domain *domain = nullptr;
  PAREDOWN_TRY(create_domain(api, "paredown", &domain));
  for (LinearOperator &op : made->linear) PAREDOWN_TRY(add_operator(api, domain, &op));
  for (size_t i = 0; cuda && i < made->on_cuda; ++i) PAREDOWN_TRY(add_operator(api, domain, &made->cuda[i]));
  for (GatherOperator &op : made->gather) PAREDOWN_TRY(add_operator(api, domain, &op));
  for (ConvOperator &op : made->conv) PAREDOWN_TRY(add_operator(api, domain, &op));
  made->domain = domain;
  return nullptr;
}

Status *register_operators(SessionOptions *options, const Api *api) noexcept {
  static std::mutex mutex;
  static Registration *first = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  Registration *found = first;
  while (found && found->api != api) found = found->next;
  if (!found) {
    found = new (std::nothrow) Registration(api);
    if (!found) return create_status(api, kFail, "paredown: no memory for the operators");
    if (Status *status = fill(found)) {
      delete found;
      return status;
    }
    found->next = first, first = found;
  }
  return add_domain(api, options, found->domain);
}

}  // namespace

}  // namespace paredown::ort

extern "C" PAREDOWN_API paredown::ort::Status *RegisterCustomOps(paredown::ort::SessionOptions *options,
                                                                 const paredown::ort::ApiBase *base) {
  using namespace paredown::ort;
  const Api *api = base->get_api(kApi);
  if (!api)  // the first function is the same since API 1
    return create_status(base->get_api(1), kFail, "paredown: onnxruntime is older than 1.17; update it");
  return register_operators(options, api);
}
