#include "node.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

namespace paredown::ort {

namespace {

constexpr const char *kParts[3] = {"codes", "table", "scale"};

/* An attribute's name: at most "left_table_rows". */
struct AttributeName {
  AttributeName(const char *prefix, const char *name) noexcept { snprintf(text, sizeof text, "%s%s", prefix, name); }
  char text[32];
};

size_t element_bytes(int32_t type) noexcept { return type == PAREDOWN_U8 ? 1 : type == PAREDOWN_F32 ? 4 : 2; }

}  // namespace

int32_t paredown_type_of(Type type) noexcept {
  switch (type) {
    case kUint8:
      return PAREDOWN_U8;
    case kFloat16:
      return PAREDOWN_F16;
    case kBfloat16:
      return PAREDOWN_BF16;
    case kFloat:
      return PAREDOWN_F32;
    default:
      return -1;
  }
}

int64_t Tensor::count() const noexcept {
  int64_t count = 1;
  for (size_t i = 0; i < rank; ++i) count *= sizes[i];
  return count;
}

void Node::name_after(const Info *info) noexcept {
  size_t size = sizeof name_;
  if (Status *status = node_name(api(), info, name_, &size)) {  // too long: errors name the operator alone
    release_status(api(), status);
    name_[0] = '\0';
  }
}

Status *Node::fail(const char *format, ...) const noexcept {
  char reason[384], text[640];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(reason, sizeof reason, format, arguments);
  va_end(arguments);
  snprintf(text, sizeof text, "paredown::%s \"%s\": %s", operator_, name_, reason);
  return create_status(api(), kInvalidArgument, text);
}

Status *Node::read(const Info *info, const char *prefix, const char *name, int64_t *value) const noexcept {
  const AttributeName attribute(prefix, name);
  Status *status = int_attribute(api(), info, attribute.text, value);
  if (!status) return nullptr;
  release_status(api(), status);
  return fail("the attribute %s (int) is missing", attribute.text);
}

Status *Node::read(const Info *info, const char *prefix, const char *name, float *value) const noexcept {
  const AttributeName attribute(prefix, name);
  Status *status = float_attribute(api(), info, attribute.text, value);
  if (!status) return nullptr;
  release_status(api(), status);
  return fail("the attribute %s (float) is missing", attribute.text);
}

Status *Node::check_layout(const Info *info) const noexcept {
  char layout[16] = "";
  size_t size = sizeof layout;
  Status *status = string_attribute(api(), info, "layout", layout, &size);
  if (!status && strcmp(layout, "c16") == 0) return nullptr;
  const bool missing = status != nullptr;
  if (status) release_status(api(), status);
  const char *again = "export the model again with this version of paredown";
  if (missing) return fail("the attribute layout is not \"c16\"; %s", again);
  return fail("layout \"%s\" has no kernel, \"c16\" has; %s", layout, again);
}

Status *Node::input_type(const Info *info, size_t index, Type *type) const noexcept {
  TypeInfo *described = nullptr;
  PAREDOWN_TRY(ort::input_type(api(), info, index, &described));
  const Shape *shape = nullptr;
  *type = kAny;
  Status *status = tensor_type(api(), described, &shape);
  if (!status && shape) status = get_type(api(), shape, type);
  release_type(api(), described);
  return status;
}

Status *Node::input(const Context *context, size_t index, Tensor *tensor) const noexcept {
  const Value *value = nullptr;
  PAREDOWN_TRY(context_input(api(), context, index, &value));
  if (!value) return fail("input %zu is missing", index);
  return view(value, tensor);
}

Status *Node::view(const Value *value, Tensor *tensor) const noexcept {
  void *data = nullptr;
  PAREDOWN_TRY(tensor_data(api_, const_cast<Value *>(value), &data));
  tensor->data = data;
  Shape *shape = nullptr;
  PAREDOWN_TRY(tensor_shape(api_, value, &shape));
  Status *status = get_rank(api_, shape, &tensor->rank);
  if (!status && tensor->rank > kMostRank)
    status = fail("a tensor of rank %zu; at most %zu is handled", tensor->rank, kMostRank);
  if (!status) status = get_sizes(api_, shape, tensor->sizes, tensor->rank);
  release_shape(api_, shape);
  return status;
}

Status *Node::output(Context *context, const int64_t *sizes, size_t rank, int64_t width, Output *made) const noexcept {
  int64_t all[kMostRank + 1];
  made->rows = 1;
  for (size_t i = 0; i < rank; ++i) made->rows *= all[i] = sizes[i];
  all[rank] = width;
  Value *value = nullptr;
  PAREDOWN_TRY(context_output(api(), context, 0, all, rank + 1, &value));
  return tensor_data(api(), value, &made->data);
}

Status *Weight::read(const Node &node, const Info *info, const char *prefix, size_t first_input) noexcept {
  prefix_ = prefix, first_ = first_input;
  int64_t bits = 0;
  PAREDOWN_TRY(node.read(info, prefix, "bits", &bits));
  PAREDOWN_TRY(node.read(info, prefix, "group", &value.group));
  PAREDOWN_TRY(node.read(info, prefix, "table_rows", &value.table_rows));
  PAREDOWN_TRY(node.read(info, prefix, "zero", &value.zero));
  PAREDOWN_TRY(node.read(info, prefix, "unit", &value.unit));
  if (bits < 1 || bits > 8) return node.fail("%sbits=%lld is out of 1 to 8", prefix, static_cast<long long>(bits));
  value.bits = static_cast<int32_t>(bits);

  Type types[3];
  for (size_t part = 0; part < 3; ++part) PAREDOWN_TRY(node.input_type(info, first_ + part, &types[part]));
  value.table_type = paredown_type_of(types[1]), value.scale_type = paredown_type_of(types[2]);
  if (value.table_type != PAREDOWN_U8 && value.table_type != PAREDOWN_F16)
    return node.fail("%stable is neither uint8 nor float16", prefix);
  if (value.scale_type < PAREDOWN_F16) return node.fail("%sscale is not float16, bfloat16 or float32", prefix);
  if (paredown_codes_bytes(&value) == 0)
    return node.fail("n=%lld, k=%lld, %sbits=%d, group=%lld, table_rows=%lld is no weight of layout c16",
                     static_cast<long long>(value.n), static_cast<long long>(value.k), prefix, value.bits,
                     static_cast<long long>(value.group), static_cast<long long>(value.table_rows));

  for (int part = 0; part < 3; ++part) {
    int is_constant = 0;
    const Value *tensor = nullptr;
    PAREDOWN_TRY(constant_input(node.api(), info, first_ + static_cast<size_t>(part), &is_constant, &tensor));
    constant_[part] = is_constant && tensor;
    if (!constant_[part]) continue;
    Tensor seen;
    PAREDOWN_TRY(node.view(tensor, &seen));
    PAREDOWN_TRY(attach(node, part, seen, &value));
  }
  return nullptr;
}

Status *Weight::read_base(const Node &node, const Info *info, bool planes, size_t first_input) noexcept {
  PAREDOWN_TRY(node.check_layout(info));
  PAREDOWN_TRY(node.read(info, "", "n", &value.n));
  PAREDOWN_TRY(node.read(info, "", "k", &value.k));
  int64_t bits = 0;
  PAREDOWN_TRY(node.read(info, "", "bits", &bits));
  if (planes != (bits == 3))
    return node.fail("bits=%lld; this operator is for %s", static_cast<long long>(bits),
                     planes ? "3 bits" : "1, 2, 4 and 8 bits");
  return read(node, info, "", first_input);
}

Status *Weight::take(const Node &node, const Context *context, paredown_weight *taken) const noexcept {
  *taken = value;
  for (int part = 0; part < 3; ++part) {
    if (constant_[part]) continue;
    Tensor seen;
    PAREDOWN_TRY(node.input(context, first_ + static_cast<size_t>(part), &seen));
    PAREDOWN_TRY(attach(node, part, seen, taken));
  }
  return nullptr;
}

Status *Weight::attach(const Node &node, int part, const Tensor &tensor, paredown_weight *weight) const noexcept {
  const int64_t tables = value.table_rows ? (value.n + value.table_rows - 1) / value.table_rows : 1;
  const int64_t want = part == 0   ? static_cast<int64_t>(paredown_codes_bytes(&value))
                       : part == 1 ? tables << value.bits
                                   : static_cast<int64_t>(paredown_scale_count(&value));
  if (tensor.count() != want)
    return node.fail("%s%s has %lld elements, a weight (%lld, %lld) of %d bits has %lld", prefix_, kParts[part],
                     static_cast<long long>(tensor.count()), static_cast<long long>(value.n),
                     static_cast<long long>(value.k), value.bits, static_cast<long long>(want));
  const int32_t type = part == 1 ? value.table_type : value.scale_type;
  if (part > 0 && reinterpret_cast<uintptr_t>(tensor.data) % element_bytes(type) != 0)
    return node.fail("%s%s does not start at a multiple of its element size; align the external data", prefix_,
                     kParts[part]);
  (part == 0 ? weight->codes : part == 1 ? weight->table : weight->scale) = tensor.data;
  return nullptr;
}

Status *Scratch::take(const Node &node, size_t bytes, void **start) noexcept {
  constexpr size_t aligned = 64;
  if (Status *status = allocate(node.api(), allocator_, bytes + aligned, &memory_)) {
    release_status(node.api(), status);
    memory_ = nullptr;
  }
  if (!memory_) return node.fail("no memory for %zu bytes of scratch", bytes);
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory_);
  *start = reinterpret_cast<void *>((address + aligned - 1) / aligned * aligned);
  return nullptr;
}

void infer_sizes(const Api *api, InferContext *context, const char *width, size_t dropped) noexcept {
  // onnxruntime drops what this returns, and a shape that is missing is no error: sizes are known when the node runs.
  static std::atomic<uint64_t> unnamed{0};
  struct Guard {
    const Api *api;
    Shape *made = nullptr;
    bool failed(Status *status) const noexcept {
      if (status) release_status(api, status);
      return status != nullptr;
    }
    ~Guard() {
      if (made) release_shape(api, made);
    }
  } guard{api};
  const OpAttribute *attribute = nullptr;
  int64_t last = 0;
  size_t used = 0, rank = 0;
  Shape *shape = nullptr;
  if (guard.failed(infer_attribute(api, context, width, &attribute))) return;
  if (guard.failed(read_attribute(api, attribute, kIntAttribute, &last, sizeof last, &used))) return;
  if (guard.failed(inferred_input(api, context, 0, &shape)) || guard.failed(get_rank(api, shape, &rank))) return;
  if (rank == 0 || rank > kMostRank) return;  // 0 also means that the rank is unknown

  int64_t sizes[kMostRank + 1];
  const char *names[kMostRank + 1];
  char made_up[kMostRank][40];
  if (guard.failed(get_sizes(api, shape, sizes, rank)) || guard.failed(get_names(api, shape, names, rank))) return;
  rank -= dropped;
  for (size_t i = 0; i < rank; ++i) {
    if (sizes[i] >= 0 || names[i][0] != '\0') continue;
    // A size without value or name would become the number -1; so it gets a name that nothing else has.
    const unsigned long long number = unnamed.fetch_add(1, std::memory_order_relaxed);
    snprintf(made_up[i], sizeof made_up[i], "paredown_unnamed_%llu", number);
    names[i] = made_up[i];
  }
  sizes[rank] = last, names[rank] = "";
  Type type = kAny;
  if (guard.failed(create_shape(api, &guard.made)) || guard.failed(get_type(api, shape, &type))) return;
  if (guard.failed(set_type(api, guard.made, type))) return;
  if (guard.failed(set_sizes(api, guard.made, sizes, rank + 1))) return;
  if (guard.failed(set_names(api, guard.made, names, rank + 1))) return;
  guard.failed(infer_output(api, context, 0, guard.made));
}

}  // namespace paredown::ort
