/* LutLinearMma16: a linear layer in TensorRT 10.3 to 11 as an IPluginV3, started as on onnxruntime (../ort/cuda_linear.cpp).
 *
 *   y = act(x W^T + low_x low^T + bias)      inputs codes, table, scale, x, x_scale, bias, low, low_x
 *
 * x, bias, low, low_x and y are of one type, float16 or bfloat16. Codes in layout mma16, their table and their scales are
 * words of int32, as kernels/cuda/tables.py makes them; what is not there, as x_scale, is one number. The node's attributes are
 * `Layer`. Kernels are cubins or PTX beside this library, in cuda/cubin, by the driver: no CUDA compiler is needed, and
 * none of them was ever executed on a GPU. Rows of x have to be readable in place, which the exporter sees to.
 */
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <stdio.h>

#include <algorithm>
#include <array>
#include <exception>
#include <limits>
#include <memory>
#include <string>

#include "../ort/cuda_plan.h"

#define PAREDOWN_EXPORT extern "C" __attribute__((visibility("default")))

namespace paredown::tensorrt {

namespace cuda = ort::cuda;
using nvinfer1::DataType;

namespace {

constexpr char kName[] = "LutLinearMma16", kVersion[] = "1", kNamespace[] = "paredown";
constexpr char kAgain[] = "export the model again, with the paredown that this plugin is of";
enum Input { kCodes, kTable, kScale, kX, kXScale, kBias, kLow, kLowX, kInputs };
constexpr size_t kForms = sizeof cuda::kForms / sizeof *cuda::kForms;
/* The sums of a block of tile_*, in bytes: no more parts are computed at once than there are processors. */
constexpr size_t kBlockSums = 4 * 128 * 64;

/* Attributes of a node, named as in kernels/cuda/launch.py; `kind` counts as cuda::Kind. */
#define PAREDOWN_ATTRIBUTES(DO) \
  DO(n) DO(k) DO(bits) DO(group) DO(table_rows) DO(kind) DO(scale_type) DO(activation) DO(has_bias) DO(rank) \
  DO(unit_bits) DO(shift_bits)

struct Layer {
#define PAREDOWN_MEMBER(name) int32_t name = -1;
  PAREDOWN_ATTRIBUTES(PAREDOWN_MEMBER)
#undef PAREDOWN_MEMBER
};
#define PAREDOWN_COUNT(name) +1
constexpr size_t kAttributes = 0 PAREDOWN_ATTRIBUTES(PAREDOWN_COUNT);
#undef PAREDOWN_COUNT

/* The attributes of a layer as fields that point into it. */
std::array<nvinfer1::PluginField, kAttributes> fields_of(const Layer *layer) {
#define PAREDOWN_FIELD(name) \
  nvinfer1::PluginField(#name, layer ? &layer->name : nullptr, nvinfer1::PluginFieldType::kINT32, layer ? 1 : 0),
  return {PAREDOWN_ATTRIBUTES(PAREDOWN_FIELD)};
#undef PAREDOWN_FIELD
}

nvinfer1::ILoggerFinder *&logger_finder() {
  static nvinfer1::ILoggerFinder *finder = nullptr;
  return finder;
}

void report(const std::string &text) noexcept {
  nvinfer1::ILogger *logger = logger_finder() ? logger_finder()->findLogger() : nullptr;
  const std::string all = std::string(kName) + ": " + text;
  if (logger) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, all.c_str());
  } else {
    fprintf(stderr, "%s\n", all.c_str());
  }
}

/* Run what may throw, and tell TensorRT by a status. */
template <class Body>
int32_t guarded(const Body &body) noexcept {
  try {
    body();
    return 0;
  } catch (const cuda::Failure &failure) {
    report(failure.text);
  } catch (const std::exception &) {
    report("no memory");
  }
  return 1;
}

paredown_weight weight_of(const Layer &layer) {
  paredown_weight weight{};
  weight.n = layer.n, weight.k = layer.k, weight.group = layer.group, weight.table_rows = layer.table_rows;
  weight.bits = layer.bits, weight.scale_type = layer.scale_type;
  return weight;
}

const cuda::Unit &unit_of(const Layer &layer) {
  for (const cuda::Unit &unit : cuda::kUnits) {
    if (unit.kind == layer.kind && unit.bits == layer.bits && unit.kind != cuda::kS8) return unit;
  }
  throw cuda::Failure{"no kernel of kind " + std::to_string(layer.kind) + " has codes of " +
                      std::to_string(layer.bits) + " bits; " + kAgain};
}

/* Throw for a node that kernels would read beyond the end of. */
void check(const Layer &layer) {
  const bool whole = layer.n > 0 && layer.k > 0 && layer.group >= 0 && layer.rank >= 0 && layer.table_rows >= 0;
  const bool known = layer.scale_type >= PAREDOWN_F16 && layer.scale_type <= PAREDOWN_F32 &&
                     layer.activation >= PAREDOWN_NONE && layer.activation <= PAREDOWN_SILU;
  const bool flagged = layer.has_bias == 0 || layer.has_bias == 1;
  if (!whole || !known || !flagged || layer.table_rows % cuda::kRows != 0 || layer.k % 8 != 0 ||
      (layer.group != 0 && layer.group < layer.k && layer.group % cuda::kStep != 0))
    throw cuda::Failure{"an attribute is out of range; " + std::string(kAgain)};
  unit_of(layer);
}

DataType type_of(const Layer &layer) { return layer.kind == cuda::kBf16 ? DataType::kBF16 : DataType::kHALF; }

int64_t volume(const nvinfer1::Dims &dims) {
  int64_t count = 1;
  for (int32_t i = 0; i < dims.nbDims; ++i) count *= dims.d[i];
  return count;
}

/* The numbers that an input has to have; those of x and low_x are a matter of m. */
int64_t expected(const Layer &layer, int32_t input) {
  const cuda::Shape shape(weight_of(layer));
  const int64_t levels = int64_t{1} << layer.bits, columns = cuda::ceil_div(layer.rank, cuda::kStep) * cuda::kStep;
  const int64_t tables = layer.table_rows ? cuda::ceil_div(layer.n, layer.table_rows) : 1;
  switch (input) {
    case kCodes:
      return static_cast<int64_t>(shape.codes_bytes()) / 4;
    case kTable:
      return tables * levels * (layer.kind == cuda::kF16b ? 1 : 2) / 4;
    case kScale:
      return shape.blocks * shape.slots * cuda::kRows * (layer.scale_type == PAREDOWN_F32 ? 4 : 2) / 4;
    case kBias:
      return layer.has_bias ? layer.n : 1;
    default:
      return layer.rank ? layer.n * columns : 1;
  }
}

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit Plugin(const Layer &layer) : layer_(layer), fields_(fields_of(&layer_)) {}
  Plugin(const Plugin &other) : Plugin(other.layer_) {}

  nvinfer1::IPluginCapability *getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore *>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuild *>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime *>(this);
    }
    return nullptr;
  }
  nvinfer1::IPluginV3 *clone() noexcept override {
    Plugin *made = nullptr;
    guarded([&] { made = new Plugin(*this); });
    return made;
  }

  const char *getPluginName() const noexcept override { return kName; }
  const char *getPluginVersion() const noexcept override { return kVersion; }
  const char *getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputDataTypes(DataType *outputs, int32_t, const DataType *, int32_t) const noexcept override {
    outputs[0] = type_of(layer_);
    return 0;
  }
  int32_t getOutputShapes(const nvinfer1::DimsExprs *inputs, int32_t count, const nvinfer1::DimsExprs *, int32_t,
                          nvinfer1::DimsExprs *outputs, int32_t, nvinfer1::IExprBuilder &builder) noexcept override {
    return guarded([&] {
      if (count != kInputs || inputs[kX].nbDims < 1) throw cuda::Failure{"the node has other inputs"};
      outputs[0] = inputs[kX];
      outputs[0].d[outputs[0].nbDims - 1] = builder.constant(layer_.n);
    });
  }
  bool supportsFormatCombination(int32_t at, const nvinfer1::DynamicPluginTensorDesc *all, int32_t,
                                 int32_t) noexcept override {
    const bool words = at == kCodes || at == kTable || at == kScale;
    const nvinfer1::PluginTensorDesc &one = all[at].desc;
    return one.format == nvinfer1::TensorFormat::kLINEAR && one.type == (words ? DataType::kINT32 : type_of(layer_));
  }
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc *inputs, int32_t count,
                          const nvinfer1::DynamicPluginTensorDesc *, int32_t) noexcept override {
    return guarded([&] {
      if (count != kInputs) throw cuda::Failure{"the node has other inputs"};
      for (const int32_t i : {kCodes, kTable, kScale, kBias, kLow}) check_volume(inputs[i].desc.dims, i);
    });
  }
  /* Room for the parts of tile_*, which are computed where a product has too few blocks for all processors. */
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc *inputs, int32_t,
                          const nvinfer1::DynamicPluginTensorDesc *, int32_t) const noexcept override {
    size_t bytes = 0;
    guarded([&] {
      const bool tiles = volume(inputs[kX].max) / layer_.k > cuda::kGemvMost;
      if (tiles) bytes = static_cast<size_t>(current_device()->processors()) * kBlockSums;
    });
    return bytes;
  }

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc *inputs, int32_t count, const nvinfer1::PluginTensorDesc *,
                        int32_t) noexcept override {
    return guarded([&] {
      if (count != kInputs) throw cuda::Failure{"the node has other inputs"};
      for (const int32_t i : {kCodes, kTable, kScale, kBias, kLow}) check_volume(inputs[i].dims, i);
      const nvinfer1::Dims &x = inputs[kX].dims;
      if (x.nbDims < 1 || x.d[x.nbDims - 1] != layer_.k)
        throw cuda::Failure{"rows of x must have " + std::to_string(layer_.k) + " numbers"};
      if (volume(x) / layer_.k > std::numeric_limits<int32_t>::max()) throw cuda::Failure{"too many rows of x"};
    });
  }
  int32_t enqueue(const nvinfer1::PluginTensorDesc *descriptions, const nvinfer1::PluginTensorDesc *,
                  const void *const *inputs, void *const *outputs, void *workspace,
                  cudaStream_t stream) noexcept override {
    return guarded([&] { multiply(volume(descriptions[kX].dims) / layer_.k, inputs, outputs[0], workspace, stream); });
  }
  /* All code is loaded here, so that what a context runs can be captured in a CUDA graph. */
  nvinfer1::IPluginV3 *attachToContext(nvinfer1::IPluginResourceContext *) noexcept override {
    std::unique_ptr<Plugin> made;
    const int32_t status = guarded([&] {
      made = std::make_unique<Plugin>(*this);
      made->load();
    });
    return status ? nullptr : made.release();
  }
  const nvinfer1::PluginFieldCollection *getFieldsToSerialize() noexcept override {
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &collection_;
  }

 private:
  static std::shared_ptr<cuda::Device> current_device() {
    int number = 0;
    if (cudaGetDevice(&number) != cudaSuccess) throw cuda::Failure{"the CUDA runtime names no current GPU"};
    return cuda::Device::open(number);
  }

  void check_volume(const nvinfer1::Dims &dims, int32_t input) const {
    const int64_t have = volume(dims), want = expected(layer_, input);
    if (have != want)
      throw cuda::Failure{"input " + std::to_string(input) + " has " + std::to_string(have) + " numbers, must have " +
                          std::to_string(want) + "; " + kAgain};
  }

  void load() {
    device_ = current_device();
    const cuda::Unit &unit = unit_of(layer_);
    for (size_t i = 0; i < kForms; ++i) {
      const std::string name = std::string("paredown_") + cuda::kForms[i].name + "_" + unit.kind_name + "_b";
      linear_[i] = device_->function(unit, name + std::to_string(unit.bits), unit.shared[i]);
    }
    reduce_ = device_->function(cuda::kPrepare, "paredown_reduce", 0);
  }

  void multiply(int64_t m, const void *const *inputs, void *y, void *workspace, cudaStream_t stream) const {
    if (m == 0) return;
    if (!device_) throw cuda::Failure{"it is run without a context"};
    const cuda::Shape shape(weight_of(layer_));
    if (!cuda::reads_in_place(shape, inputs[kX])) throw cuda::Failure{"x does not begin at a multiple of 16 bytes"};
    const cuda::Plan plan(shape, m, device_->processors());
    const cuda::Current current = device_->current();
    const cuda::LinearArguments arguments = arguments_of(shape, m, inputs, plan.parts > 1 ? workspace : y);
    device_->launch(linear_[plan.form], plan.grid, arguments, stream);
    if (plan.parts > 1) reduce(arguments, plan.parts, y, stream);
  }

  cuda::LinearArguments arguments_of(const cuda::Shape &shape, int64_t m, const void *const *inputs, void *y) const {
    cuda::LinearArguments a;
    a.codes = inputs[kCodes], a.table = inputs[kTable], a.scale = inputs[kScale], a.x = inputs[kX];
    a.bias = inputs[kBias], a.low = inputs[kLow], a.low_x = inputs[kLowX];
    a.n = shape.n, a.m = m, a.k = shape.k, a.units = shape.units, a.slots = shape.slots;
    a.steps_per_slot = shape.steps_per_slot, a.units_per_slot = shape.units_per_slot;
    a.table_rows = shape.table_rows, a.x_stride = shape.k, a.y_stride = shape.n;
    a.scale_type = layer_.scale_type, a.y_type = number_type(), a.low_type = number_type();
    a.activation = layer_.activation, a.has_bias = layer_.has_bias;
    a.rank = layer_.rank, a.low_stride = layer_.rank;
    a.unit_bits = layer_.unit_bits, a.shift_bits = layer_.shift_bits, a.y = y;
    return a;
  }

  /* Add the parts of the product, and finish them. */
  void reduce(const cuda::LinearArguments &product, int64_t parts, void *y, cudaStream_t stream) const {
    cuda::ReduceArguments r;
    r.partial = product.y, r.bias = product.bias, r.n = product.n, r.m = product.m, r.splits = parts;
    r.y_stride = product.y_stride, r.y_type = product.y_type, r.activation = product.activation;
    r.has_bias = product.has_bias, r.y = y;
    const cuda::Grid grid{static_cast<unsigned>(product.m.bits),
                          static_cast<unsigned>(cuda::ceil_div(layer_.n, cuda::kThreads)), 1};
    device_->launch(reduce_, grid, r, stream);
  }

  int32_t number_type() const { return layer_.kind == cuda::kBf16 ? PAREDOWN_BF16 : PAREDOWN_F16; }

  const Layer layer_;
  const std::array<nvinfer1::PluginField, kAttributes> fields_;
  nvinfer1::PluginFieldCollection collection_{};
  std::shared_ptr<cuda::Device> device_;
  cuda::Function linear_[kForms], reduce_;
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() : fields_(fields_of(nullptr)), collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

  nvinfer1::IPluginV3 *createPlugin(const char *, const nvinfer1::PluginFieldCollection *given,
                                    nvinfer1::TensorRTPhase) noexcept override {
    nvinfer1::IPluginV3 *made = nullptr;
    guarded([&] {
      const Layer layer = read(*given);
      check(layer);
      made = new Plugin(layer);
    });
    return made;
  }
  const nvinfer1::PluginFieldCollection *getFieldNames() noexcept override { return &collection_; }
  const char *getPluginName() const noexcept override { return kName; }
  const char *getPluginVersion() const noexcept override { return kVersion; }
  const char *getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  static Layer read(const nvinfer1::PluginFieldCollection &given) {
    Layer layer;
    size_t found = 0;
    for (int32_t i = 0; i < given.nbFields; ++i) {
      const nvinfer1::PluginField &field = given.fields[i];
      if (field.type != nvinfer1::PluginFieldType::kINT32 || field.length != 1) continue;
      const int32_t value = *static_cast<const int32_t *>(field.data);
      const std::string name = field.name;
#define PAREDOWN_READ(member) \
  if (name == #member) layer.member = value, ++found;
      PAREDOWN_ATTRIBUTES(PAREDOWN_READ)
#undef PAREDOWN_READ
    }
    if (found != kAttributes) throw cuda::Failure{"an attribute is missing; " + std::string(kAgain)};
    return layer;
  }

  const std::array<nvinfer1::PluginField, kAttributes> fields_;
  const nvinfer1::PluginFieldCollection collection_;
};

}  // namespace

}  // namespace paredown::tensorrt

/* What IPluginRegistry::loadLibrary calls. */
PAREDOWN_EXPORT nvinfer1::IPluginCreatorInterface *const *getCreators(int32_t &count) {
  static paredown::tensorrt::Creator creator;
  static nvinfer1::IPluginCreatorInterface *const creators[] = {&creator};
  count = 1;
  return creators;
}

PAREDOWN_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder *finder) { paredown::tensorrt::logger_finder() = finder; }
