/* The kernel of the Lut...Linear... operators. */
#include "describe.h"
#include "linear_node.h"

namespace paredown::ort {

namespace {

/* Scratch up to this size is on the stack: enough for one row of 8192 inputs in int8 mode. */
constexpr size_t kOnStack = 16384;

class Linear {
 public:
  explicit Linear(const LinearOperator &described) noexcept : all_(described) {}
  ~Linear() {
    if (allocator_) release_allocator(all_.node.api(), allocator_);
  }

  Status *create(const Info *info) noexcept;
  Status *compute(Context *context) noexcept;

 private:
  Status *run(Context *context, paredown_linear *call) noexcept;

  LinearNode all_;
  Allocator *allocator_ = nullptr;
  Team team_;
};

Status *Linear::create(const Info *info) noexcept {
  PAREDOWN_TRY(all_.create(info));
  return create_allocator(all_.node.api(), info, kDefaultMemory, &allocator_);
}

Status *Linear::compute(Context *context) noexcept {
  LinearInputs inputs;
  PAREDOWN_TRY(all_.inputs(context, &inputs));
  if (inputs.m == 0) return nullptr;

  paredown_linear call = {};
  paredown_weight weight, left;
  call.weight = &all_.weight.value;
  if (!all_.weight.constant()) {
    PAREDOWN_TRY(all_.weight.take(all_.node, context, &weight));
    call.weight = &weight;
  }
  call.x = inputs.x, call.y = inputs.y;
  call.m = inputs.m, call.x_stride = call.weight->k, call.y_stride = call.weight->n;
  call.type = paredown_type_of(all_.described.type);
  call.mode = all_.described.int8 ? PAREDOWN_INT8 : PAREDOWN_EXACT;
  call.activation = all_.described.activation;
  call.bias = all_.bias;
  if (!all_.constant_bias) PAREDOWN_TRY(all_.take_bias(context, &call.bias));
  if (all_.described.low_rank) {
    call.low = &all_.left.value;
    if (!all_.left.constant()) {
      PAREDOWN_TRY(all_.left.take(all_.node, context, &left));
      call.low = &left;
    }
    call.low_x = inputs.t, call.low_stride = call.low->k;
  }
  return run(context, &call);
}

/* Give the call threads and scratch, and make it. */
Status *Linear::run(Context *context, paredown_linear *call) noexcept {
  Pool pool(all_.node.api(), context);
  call->threads = team_.size();
  if (call->threads > 1) call->parallel = Pool::run, call->parallel_context = &pool;
  call->scratch_bytes = paredown_scratch(call);
  alignas(64) unsigned char small[kOnStack];
  Scratch large(allocator_);
  call->scratch = small;
  if (call->scratch_bytes > sizeof small)
    PAREDOWN_TRY(large.take(all_.node, call->scratch_bytes, &call->scratch));
  const int32_t status = paredown_run_linear(call);
  if (status != PAREDOWN_OK) return all_.node.fail("%s", paredown_message(status));
  team_.saw(pool.threads());
  return nullptr;
}

}  // namespace

void make_linear(LinearOperator *made) noexcept {
  using Made = LinearOperator;
  describe<Linear>(made);
  made->inputs = [](const Operator *self) noexcept -> size_t {
    return static_cast<const Made *>(self)->low_rank ? 9 : 5;
  };
  made->input_type = [](const Operator *self, size_t index) noexcept -> Type {
    using N = LinearNode;
    if (index == N::kX || index == N::kBias || index == N::kT) return static_cast<const Made *>(self)->type;
    return index == N::kCodes || index == N::kLeft ? kUint8 : kAny;  // tables and scales have a type of their own
  };
  made->infer = [](const Operator *self, InferContext *context) noexcept -> Status * {
    infer_sizes(static_cast<const Made *>(self)->api, context, "n", 1);
    return nullptr;
  };
}

}  // namespace paredown::ort
