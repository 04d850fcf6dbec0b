/* Calls our plugin as TensorRT does, for tests: shapes (-1 ends them), fields and pointers come from Python. */
#include <NvInferRuntime.h>

#include <stdio.h>

#include <memory>
#include <string>

using namespace nvinfer1;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT IPluginCreatorInterface *const *getCreators(int32_t &count);
EXPORT void setLoggerFinder(ILoggerFinder *finder);

extern "C" __attribute__((visibility("default"))) cudaError_t cudaGetDevice(int *device) {
  *device = 1;
  return cudaSuccess;
}

namespace {

constexpr int kInputs = 8;
std::string said;

class Logger : public ILogger {
  void log(Severity, const char *message) noexcept override { said = message; }
};

class Finder : public ILoggerFinder {
 public:
  ILogger *findLogger() override { return &logger_; }

 private:
  Logger logger_;
};

struct Constant : IDimensionExpr {
  int64_t value = 0;
};

class Builder : public IExprBuilder {
 public:
  const IDimensionExpr *constant(int64_t value) noexcept override {
    made.value = value;
    return &made;
  }
  Constant made;
};

Dims dims_of(const int64_t *sizes) {
  Dims dims{};
  for (; sizes[dims.nbDims] >= 0; ++dims.nbDims) dims.d[dims.nbDims] = sizes[dims.nbDims];
  return dims;
}

IPluginCreatorV3One *creator() {
  static Finder finder;
  setLoggerFinder(&finder);
  int32_t count = 0;
  IPluginCreatorInterface *const *found = getCreators(count);
  return count == 1 ? static_cast<IPluginCreatorV3One *>(found[0]) : nullptr;
}

template <class Capability>
Capability *as(IPluginV3 *plugin, PluginCapabilityType type) {
  return static_cast<Capability *>(plugin->getCapabilityInterface(type));
}

}  // namespace

EXPORT const char *harness_said() { return said.c_str(); }
EXPORT const char *harness_field(int32_t at) {
  const PluginFieldCollection *all = creator()->getFieldNames();
  return at < all->nbFields ? all->fields[at].name : nullptr;
}

/* Create, serialize, create from that at run time, and return what the run time has; null with a message. */
EXPORT IPluginV3 *harness_create(const char **names, const int32_t *values, int32_t count) {
  said.clear();
  auto fields = std::make_unique<PluginField[]>(static_cast<size_t>(count));
  for (int32_t i = 0; i < count; ++i) fields[static_cast<size_t>(i)] = {names[i], values + i, PluginFieldType::kINT32, 1};
  const PluginFieldCollection given{count, fields.get()};
  std::unique_ptr<IPluginV3> built(creator()->createPlugin("layer", &given, TensorRTPhase::kBUILD));
  if (!built) return nullptr;
  std::unique_ptr<IPluginV3> cloned(built->clone());
  auto *runtime = as<IPluginV3OneRuntime>(cloned.get(), PluginCapabilityType::kRUNTIME);
  return creator()->createPlugin("layer", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
}

EXPORT void harness_destroy(IPluginV3 *plugin) { delete plugin; }
EXPORT IPluginV3 *harness_attach(IPluginV3 *plugin) {
  return as<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr);
}

/* Whether a tensor may have this type and format. */
EXPORT int32_t harness_supports(IPluginV3 *plugin, int32_t at, int32_t type, int32_t format) {
  DynamicPluginTensorDesc all[kInputs + 1] = {};
  all[at].desc.type = static_cast<DataType>(type), all[at].desc.format = static_cast<TensorFormat>(format);
  auto *build = as<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  return build->supportsFormatCombination(at, all, kInputs, 1);
}

/* Configure for inputs of these shapes; the rank and last size of the output, and the workspace, or -1. */
EXPORT int64_t harness_configure(IPluginV3 *plugin, const int64_t *const *shapes, int64_t *rank, int64_t *last) {
  DynamicPluginTensorDesc in[kInputs] = {}, out[1] = {};
  DimsExprs inputs[kInputs] = {}, outputs[1] = {};
  for (int i = 0; i < kInputs; ++i) {
    in[i].desc.dims = in[i].max = dims_of(shapes[i]);
    inputs[i].nbDims = in[i].max.nbDims;
  }
  auto *build = as<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  Builder builder;
  if (build->getOutputShapes(inputs, kInputs, nullptr, 0, outputs, 1, builder)) return -1;
  *rank = outputs[0].nbDims, *last = builder.made.value;
  if (build->configurePlugin(in, kInputs, out, 1)) return -1;
  return static_cast<int64_t>(build->getWorkspaceSize(in, kInputs, out, 1));
}

EXPORT int32_t harness_run(IPluginV3 *plugin, const int64_t *const *shapes, const void *const *inputs, void *y,
                           void *workspace, void *stream) {
  PluginTensorDesc in[kInputs] = {}, out[1] = {};
  for (int i = 0; i < kInputs; ++i) in[i].dims = dims_of(shapes[i]);
  auto *runtime = as<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  if (runtime->onShapeChange(in, kInputs, out, 1)) return 1;
  void *outputs[1] = {y};
  return runtime->enqueue(in, out, inputs, outputs, workspace, stream);
}
