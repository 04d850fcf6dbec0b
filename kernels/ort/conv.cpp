/* The kernel of the Lut...ConvInt8... operators. */
#include <string.h>

#include "describe.h"

namespace paredown::ort {

namespace {

enum Input : size_t { kX = 0, kCodes = 1, kBias = 4 };

class Conv {
 public:
  explicit Conv(const ConvOperator &described) noexcept
      : described_(described), node_(described.api, described.text) {}
  ~Conv() {
    if (allocator_) release_allocator(node_.api(), allocator_);
  }

  Status *create(const Info *info) noexcept;
  Status *compute(Context *context) noexcept;

 private:
  Status *read_geometry(const Info *info) noexcept;
  Status *read_bias(Context *context, const void **values) const noexcept;
  Status *run(Context *context, paredown_conv *call) noexcept;

  const ConvOperator &described_;
  Node node_;
  Weight weight_;
  paredown_conv geometry_ = {};
  Allocator *allocator_ = nullptr;
  Team team_;
};

Status *Conv::create(const Info *info) noexcept {
  node_.name_after(info);
  PAREDOWN_TRY(weight_.read_base(node_, info, described_.planes, kCodes));
  PAREDOWN_TRY(read_geometry(info));
  geometry_.batch = 1;
  geometry_.weight = &weight_.value;
  paredown_conv probe = geometry_; /* of one output at least */
  probe.height = (probe.kernel[0] - 1) * probe.dilation[0] + 1;
  probe.width = (probe.kernel[1] - 1) * probe.dilation[1] + 1;
  if (paredown_conv_scratch(&probe) == 0)
    return node_.fail("%s", "its weight, channels, kernel, strides, dilations or pads are none of an int8 convolution");
  return create_allocator(node_.api(), info, kDefaultMemory, &allocator_);
}

Status *Conv::read_geometry(const Info *info) noexcept {
  PAREDOWN_TRY(node_.read(info, "", "channels", &geometry_.channels));
  PAREDOWN_TRY(node_.read(info, "", "kernel_h", &geometry_.kernel[0]));
  PAREDOWN_TRY(node_.read(info, "", "kernel_w", &geometry_.kernel[1]));
  PAREDOWN_TRY(node_.read(info, "", "stride_h", &geometry_.stride[0]));
  PAREDOWN_TRY(node_.read(info, "", "stride_w", &geometry_.stride[1]));
  PAREDOWN_TRY(node_.read(info, "", "dilation_h", &geometry_.dilation[0]));
  PAREDOWN_TRY(node_.read(info, "", "dilation_w", &geometry_.dilation[1]));
  PAREDOWN_TRY(node_.read(info, "", "pad_top", &geometry_.pad[0]));
  PAREDOWN_TRY(node_.read(info, "", "pad_left", &geometry_.pad[1]));
  PAREDOWN_TRY(node_.read(info, "", "pad_bottom", &geometry_.pad[2]));
  return node_.read(info, "", "pad_right", &geometry_.pad[3]);
}

/* One value where there are more outputs stands for no bias. */
Status *Conv::read_bias(Context *context, const void **values) const noexcept {
  Tensor bias;
  PAREDOWN_TRY(node_.input(context, kBias, &bias));
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

Status *Conv::compute(Context *context) noexcept {
  Tensor x;
  PAREDOWN_TRY(node_.input(context, kX, &x));
  if (x.rank != 4 || x.sizes[1] != geometry_.channels)
    return node_.fail("x has rank %zu and %lld channels; images of %lld are needed", x.rank,
                      static_cast<long long>(x.rank > 1 ? x.sizes[1] : 0), static_cast<long long>(geometry_.channels));
  paredown_conv call = geometry_;
  paredown_weight weight;
  if (!weight_.constant()) {
    PAREDOWN_TRY(weight_.take(node_, context, &weight));
    call.weight = &weight;
  }
  call.batch = x.sizes[0], call.height = x.sizes[2], call.width = x.sizes[3];
  const int64_t sizes[3] = {call.batch, weight_.value.n, paredown_conv_outputs(&call, 0)};
  const int64_t width = paredown_conv_outputs(&call, 1);
  if (sizes[2] < 1 || width < 1)
    return node_.fail("an image of %lld x %lld is smaller than the kernel", static_cast<long long>(call.height),
                      static_cast<long long>(call.width));
  Output y;
  PAREDOWN_TRY(node_.output(context, sizes, 3, width, &y));
  if (call.batch == 0) return nullptr;
  call.x = x.data, call.y = y.data;
  call.type = paredown_type_of(described_.type);
  call.activation = described_.activation;
  PAREDOWN_TRY(read_bias(context, &call.bias));
  return run(context, &call);
}

/* Give the call threads and scratch, and make it. */
Status *Conv::run(Context *context, paredown_conv *call) noexcept {
  Pool pool(node_.api(), context);
  call->threads = team_.size();
  if (call->threads > 1) call->parallel = Pool::run, call->parallel_context = &pool;
  call->scratch_bytes = paredown_conv_scratch(call);
  Scratch memory(allocator_);
  PAREDOWN_TRY(memory.take(node_, call->scratch_bytes, &call->scratch));
  const int32_t status = paredown_run_conv(call);
  if (status != PAREDOWN_OK) return node_.fail("%s", paredown_message(status));
  team_.saw(pool.threads());
  return nullptr;
}

}  // namespace

void make_conv(ConvOperator *made) noexcept {
  describe<Conv>(made);
  made->inputs = [](const Operator *) noexcept -> size_t { return 5; };
  made->input_type = [](const Operator *self, size_t index) noexcept -> Type {
    if (index == kX || index == kBias) return static_cast<const ConvOperator *>(self)->type;
    return index == kCodes ? kUint8 : kAny;  // tables and scales have a type of their own
  };
  // The sizes of outputs are known when the node runs.
  made->infer = [](const Operator *, InferContext *) noexcept -> Status * { return nullptr; };
}

}  // namespace paredown::ort
