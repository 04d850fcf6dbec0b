/* The kernel of the Lut...Linear... operators. */
#include <string.h>

#include <new>

#include "operators.h"

namespace paredown::ort {

namespace {

/* x, codes, table, scale, bias, and with a low-rank term t, left_codes, left_table, left_scale. */
enum Input : size_t { kX = 0, kCodes = 1, kBias = 4, kT = 5, kLeft = 6 };

/* Scratch up to this size is on the stack: enough for one row of 8192 inputs in int8 mode. */
constexpr size_t kOnStack = 16384;
constexpr size_t kAligned = 64;

class Linear {
 public:
  explicit Linear(const LinearOperator &described) noexcept
      : described_(described), node_(described.api, described.text) {}
  ~Linear() {
    if (allocator_) release_allocator(node_.api(), allocator_);
  }

  Status *create(const Info *info) noexcept;
  Status *compute(Context *context) noexcept;

 private:
  Status *read_bias(const Tensor &bias, const void **values) const noexcept;
  Status *run(Context *context, paredown_linear *call) noexcept;

  const LinearOperator &described_;
  Node node_;
  Weight weight_, left_;
  bool constant_bias_ = false;
  const void *bias_ = nullptr;
  Allocator *allocator_ = nullptr;
  Team team_;
};

Status *Linear::create(const Info *info) noexcept {
  node_.name_after(info);
  PAREDOWN_TRY(node_.check_layout(info));
  PAREDOWN_TRY(node_.read(info, "", "n", &weight_.value.n));
  PAREDOWN_TRY(node_.read(info, "", "k", &weight_.value.k));
  int64_t bits = 0;
  PAREDOWN_TRY(node_.read(info, "", "bits", &bits));
  if (described_.planes != (bits == 3))
    return node_.fail("bits=%lld; this operator is for %s", static_cast<long long>(bits),
                      described_.planes ? "3 bits" : "1, 2, 4 and 8 bits");
  PAREDOWN_TRY(weight_.read(node_, info, "", kCodes));
  const float zero = weight_.value.zero;
  const bool whole = zero >= 0 && zero <= 255 && zero == static_cast<float>(static_cast<int>(zero));
  if (described_.int8 && (weight_.value.table_type != PAREDOWN_U8 || !whole))
    return node_.fail("int8 inputs need a uint8 table and a whole zero in 0..255 (zero=%g)", static_cast<double>(zero));
  if (described_.low_rank) {
    left_.value.n = weight_.value.n;
    PAREDOWN_TRY(node_.read(info, "", "rank", &left_.value.k));
    PAREDOWN_TRY(left_.read(node_, info, "left_", kLeft));
  }
  int is_constant = 0;
  const Value *bias = nullptr;
  PAREDOWN_TRY(constant_input(node_.api(), info, kBias, &is_constant, &bias));
  constant_bias_ = is_constant && bias;
  if (constant_bias_) {
    Tensor seen;
    PAREDOWN_TRY(node_.view(bias, &seen));
    PAREDOWN_TRY(read_bias(seen, &bias_));
  }
  return create_allocator(node_.api(), info, kDefaultMemory, &allocator_);
}

/* One value where there are more outputs stands for no bias. */
Status *Linear::read_bias(const Tensor &bias, const void **values) const noexcept {
  const int64_t n = weight_.value.n, count = bias.count();
  *values = bias.data;
  if (count == n) return nullptr;
  if (count != 1)
    return node_.fail("bias has %lld values, W has %lld rows", static_cast<long long>(count),
                      static_cast<long long>(n));
  uint32_t bits = 0;
  memcpy(&bits, bias.data, described_.type == kFloat ? 4 : 2);
  if (bits << (described_.type == kFloat ? 1 : 17))
    return node_.fail("a bias of one value is 0 where W has %lld rows", static_cast<long long>(n));
  *values = nullptr;
  return nullptr;
}

Status *Linear::compute(Context *context) noexcept {
  Tensor x;
  PAREDOWN_TRY(node_.input(context, kX, &x));
  const int64_t k = weight_.value.k, n = weight_.value.n;
  if (x.rank == 0) return node_.fail("x is a scalar; W takes %lld inputs", static_cast<long long>(k));
  if (x.sizes[x.rank - 1] != k)
    return node_.fail("the last size of x is %lld, W takes %lld inputs", static_cast<long long>(x.sizes[x.rank - 1]),
                      static_cast<long long>(k));
  Output y;
  PAREDOWN_TRY(node_.output(context, x.sizes, x.rank - 1, n, &y));
  if (y.rows == 0) return nullptr;

  paredown_linear call = {};
  paredown_weight weight, left;
  call.weight = &weight_.value;
  if (!weight_.constant()) {
    PAREDOWN_TRY(weight_.take(node_, context, &weight));
    call.weight = &weight;
  }
  call.x = x.data, call.y = y.data;
  call.m = y.rows, call.x_stride = k, call.y_stride = n;
  call.type = paredown_type_of(described_.type);
  call.mode = described_.int8 ? PAREDOWN_INT8 : PAREDOWN_EXACT;
  call.activation = described_.activation;
  call.bias = bias_;
  if (!constant_bias_) {
    Tensor bias;
    PAREDOWN_TRY(node_.input(context, kBias, &bias));
    PAREDOWN_TRY(read_bias(bias, &call.bias));
  }
  if (described_.low_rank) {
    Tensor t;
    PAREDOWN_TRY(node_.input(context, kT, &t));
    const int64_t rank = left_.value.k;
    if (t.rank == 0 || t.sizes[t.rank - 1] != rank || t.count() != y.rows * rank)
      return node_.fail("t has %lld elements; %lld rows of rank %lld are needed", static_cast<long long>(t.count()),
                        static_cast<long long>(y.rows), static_cast<long long>(rank));
    call.low = &left_.value;
    if (!left_.constant()) {
      PAREDOWN_TRY(left_.take(node_, context, &left));
      call.low = &left;
    }
    call.low_x = t.data, call.low_stride = rank;
  }
  return run(context, &call);
}

/* Give the call threads and scratch, and make it. */
Status *Linear::run(Context *context, paredown_linear *call) noexcept {
  Pool pool(node_.api(), context);
  call->threads = team_.size();
  if (call->threads > 1) call->parallel = Pool::run, call->parallel_context = &pool;
  call->scratch_bytes = paredown_scratch(call);
  alignas(kAligned) unsigned char small[kOnStack];
  void *large = nullptr;
  call->scratch = small;
  if (call->scratch_bytes > sizeof small) {
    large = allocator_->allocate(allocator_, call->scratch_bytes + kAligned);
    if (!large) return node_.fail("no memory for %zu bytes of scratch", call->scratch_bytes);
    const uintptr_t address = reinterpret_cast<uintptr_t>(large);
    call->scratch = reinterpret_cast<void *>((address + kAligned - 1) / kAligned * kAligned);
  }
  const int32_t status = paredown_run_linear(call);
  if (large) allocator_->release(allocator_, large);
  if (status != PAREDOWN_OK) return node_.fail("%s", paredown_message(status));
  team_.saw(pool.threads());
  return nullptr;
}

}  // namespace

void make_linear(LinearOperator *made) noexcept {
  using Made = LinearOperator;
  made->version = kApi;
  made->name = [](const Operator *self) noexcept -> const char * { return static_cast<const Made *>(self)->text; };
  made->provider = [](const Operator *) noexcept -> const char * { return nullptr; };
  made->inputs = [](const Operator *self) noexcept -> size_t {
    return static_cast<const Made *>(self)->low_rank ? 9 : 5;
  };
  made->input_type = [](const Operator *self, size_t index) noexcept -> Type {
    if (index == kX || index == kBias || index == kT) return static_cast<const Made *>(self)->type;
    return index == kCodes || index == kLeft ? kUint8 : kAny;  // tables and scales have a type of their own
  };
  made->outputs = [](const Operator *) noexcept -> size_t { return 1; };
  made->output_type = [](const Operator *self, size_t) noexcept { return static_cast<const Made *>(self)->type; };
  made->input_characteristic = [](const Operator *, size_t) noexcept { return kRequired; };
  made->output_characteristic = [](const Operator *, size_t) noexcept { return kRequired; };
  made->input_memory = [](const Operator *, size_t) noexcept { return kDefaultMemory; };
  made->infer = [](const Operator *self, InferContext *context) noexcept -> Status * {
    infer_sizes(static_cast<const Made *>(self)->api, context, "n", 1);
    return nullptr;
  };
  made->create = [](const Operator *self, const Api *api, const Info *info, void **kernel) noexcept -> Status * {
    Linear *linear = new (std::nothrow) Linear(*static_cast<const Made *>(self));
    if (!linear) return create_status(api, kFail, "paredown: no memory for a kernel");
    Status *status = linear->create(info);
    if (status) delete linear;
    *kernel = status ? nullptr : linear;
    return status;
  };
  made->compute = [](void *kernel, Context *context) noexcept {
    return static_cast<Linear *>(kernel)->compute(context);
  };
  made->destroy = [](void *kernel) noexcept { delete static_cast<Linear *>(kernel); };
}

}  // namespace paredown::ort
