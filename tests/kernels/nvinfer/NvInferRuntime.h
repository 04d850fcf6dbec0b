/* Of TensorRT's C++ interface, the classes that our plugin uses, as 10.3 declares them; written for tests.
 *
 * Only names, types and the order of members are as there: it is compiled against, never linked to the library.
 */
#ifndef PAREDOWN_TEST_NVINFER_RUNTIME_H
#define PAREDOWN_TEST_NVINFER_RUNTIME_H

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

namespace nvinfer1 {

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kBOOL = 4, kUINT8 = 5, kFP8 = 6, kBF16 = 7 };
enum class TensorFormat : int32_t { kLINEAR = 0, kCHW2 = 1 };
enum class PluginFieldType : int32_t { kFLOAT32 = 1, kINT32 = 5, kCHAR = 6, kUNKNOWN = 8 };
enum class PluginCapabilityType : int32_t { kCORE = 0, kBUILD = 1, kRUNTIME = 2 };
enum class TensorRTPhase : int32_t { kBUILD = 0, kRUNTIME = 1 };

struct Dims {
  static constexpr int32_t MAX_DIMS = 8;
  int32_t nbDims;
  int64_t d[MAX_DIMS];
};

struct PluginTensorDesc {
  Dims dims;
  DataType type;
  TensorFormat format;
  float scale;
};

struct DynamicPluginTensorDesc {
  PluginTensorDesc desc;
  Dims min, max, opt;
};

class IDimensionExpr {
 public:
  virtual ~IDimensionExpr() noexcept = default;
};

struct DimsExprs {
  int32_t nbDims;
  const IDimensionExpr *d[Dims::MAX_DIMS];
};

class IExprBuilder {
 public:
  virtual ~IExprBuilder() noexcept = default;
  virtual const IDimensionExpr *constant(int64_t value) noexcept = 0;
};

struct PluginField {
  const char *name;
  const void *data;
  PluginFieldType type;
  int32_t length;
  PluginField(const char *name_ = nullptr, const void *data_ = nullptr,
              PluginFieldType type_ = PluginFieldType::kUNKNOWN, int32_t length_ = 0) noexcept
      : name(name_), data(data_), type(type_), length(length_) {}
};

struct PluginFieldCollection {
  int32_t nbFields;
  const PluginField *fields;
};

class ILogger {
 public:
  enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2 };
  virtual void log(Severity severity, const char *message) noexcept = 0;
  virtual ~ILogger() = default;
};

class ILoggerFinder {
 public:
  virtual ILogger *findLogger() = 0;

 protected:
  virtual ~ILoggerFinder() = default;
};

class IVersionedInterface {
 public:
  virtual ~IVersionedInterface() noexcept = default;
};

class IPluginCapability : public IVersionedInterface {};
class IPluginResourceContext;

class IPluginV3 : public IVersionedInterface {
 public:
  virtual IPluginCapability *getCapabilityInterface(PluginCapabilityType type) noexcept = 0;
  virtual IPluginV3 *clone() noexcept = 0;
};

class IPluginV3OneCore : public IPluginCapability {
 public:
  virtual const char *getPluginName() const noexcept = 0;
  virtual const char *getPluginVersion() const noexcept = 0;
  virtual const char *getPluginNamespace() const noexcept = 0;
};

class IPluginV3OneBuild : public IPluginCapability {
 public:
  virtual int32_t configurePlugin(const DynamicPluginTensorDesc *in, int32_t inputs, const DynamicPluginTensorDesc *out,
                                  int32_t outputs) noexcept = 0;
  virtual int32_t getOutputDataTypes(DataType *types, int32_t outputs, const DataType *given,
                                     int32_t inputs) const noexcept = 0;
  virtual int32_t getOutputShapes(const DimsExprs *inputs, int32_t count, const DimsExprs *shapes, int32_t shape_count,
                                  DimsExprs *outputs, int32_t output_count, IExprBuilder &builder) noexcept = 0;
  virtual bool supportsFormatCombination(int32_t at, const DynamicPluginTensorDesc *all, int32_t inputs,
                                         int32_t outputs) noexcept = 0;
  virtual int32_t getNbOutputs() const noexcept = 0;
  virtual size_t getWorkspaceSize(const DynamicPluginTensorDesc *, int32_t, const DynamicPluginTensorDesc *,
                                  int32_t) const noexcept {
    return 0;
  }
};

class IPluginV3OneRuntime : public IPluginCapability {
 public:
  virtual int32_t setTactic(int32_t) noexcept { return 0; }
  virtual int32_t onShapeChange(const PluginTensorDesc *in, int32_t inputs, const PluginTensorDesc *out,
                                int32_t outputs) noexcept = 0;
  virtual int32_t enqueue(const PluginTensorDesc *in, const PluginTensorDesc *out, const void *const *inputs,
                          void *const *outputs, void *workspace, cudaStream_t stream) noexcept = 0;
  virtual IPluginV3 *attachToContext(IPluginResourceContext *context) noexcept = 0;
  virtual const PluginFieldCollection *getFieldsToSerialize() noexcept = 0;
};

class IPluginCreatorInterface : public IVersionedInterface {};

class IPluginCreatorV3One : public IPluginCreatorInterface {
 public:
  virtual IPluginV3 *createPlugin(const char *name, const PluginFieldCollection *fields, TensorRTPhase phase) noexcept = 0;
  virtual const PluginFieldCollection *getFieldNames() noexcept = 0;
  virtual const char *getPluginName() const noexcept = 0;
  virtual const char *getPluginVersion() const noexcept = 0;
  virtual const char *getPluginNamespace() const noexcept = 0;
};

}  // namespace nvinfer1

#endif
