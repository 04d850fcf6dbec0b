/* The part of onnxruntime's C interface that this library uses, by hand, so that building it needs none of its headers.
 *
 * OrtApi is a table of functions that only grows, so a function is known by its place. Those below were looked up by
 * name in onnxruntime_c_api.h of API 21 (Debian's libonnxruntime-dev 1.21.0) and of API 29; the 285 places that both
 * have are the same. We ask for API 17, the first that has them all. Tests load the library in the installed
 * onnxruntime and in those that PAREDOWN_ORT_PYTHONS names; 1.20.1, 1.22.1, 1.24.4, 1.27.0 and 1.31.1 were tried.
 */
#ifndef PAREDOWN_ORT_ABI_H
#define PAREDOWN_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

namespace paredown::ort {

struct Api {
  void *function[1];
};

struct ApiBase {
  const Api *(*get_api)(uint32_t version);
  const char *(*version)();
};

struct Allocator {
  uint32_t version;
  void *(*allocate)(Allocator *self, size_t bytes); /* throws where there is no memory: `allocate` below does not */
  void (*release)(Allocator *self, void *pointer);
};

struct Context;
struct Domain;
struct Info;
struct InferContext;
struct MemoryInfo;
struct OpAttribute;
struct SessionOptions;
struct Shape; /* OrtTensorTypeAndShapeInfo */
struct Status;
struct TypeInfo;
struct Value;

enum Type : int32_t { kAny = 0, kFloat = 1, kUint8 = 2, kInt32 = 6, kInt64 = 7, kFloat16 = 10, kBfloat16 = 16 };
enum Code : int32_t { kFail = 1, kInvalidArgument = 2 };
enum AttributeType : int32_t { kIntAttribute = 1 };
enum MemoryType : int32_t { kHostInput = -2, kDefaultMemory = 0 };
enum Characteristic : int32_t { kRequired = 0 };

constexpr uint32_t kApi = 17;

template <int Place, typename Function>
struct Call;

template <int Place, typename Result, typename... Arguments>
struct Call<Place, Result(Arguments...)> {
  Result operator()(const Api *api, Arguments... arguments) const noexcept {
    return reinterpret_cast<Result (*)(Arguments...)>(api->function[Place])(arguments...);
  }
};

inline constexpr Call<0, Status *(Code, const char *message)> create_status;
inline constexpr Call<93, void(Status *)> release_status;

inline constexpr Call<26, Status *(const char *name, Domain **)> create_domain;
inline constexpr Call<27, Status *(Domain *, const struct Operator *)> add_operator;
inline constexpr Call<28, Status *(SessionOptions *, Domain *)> add_domain;

inline constexpr Call<86, Status *(const Info *, const char *name, int64_t *)> int_attribute;
inline constexpr Call<85, Status *(const Info *, const char *name, float *)> float_attribute;
inline constexpr Call<87, Status *(const Info *, const char *name, char *, size_t *size)> string_attribute;
inline constexpr Call<244, Status *(const Info *, char *, size_t *size)> node_name;
inline constexpr Call<234, Status *(const Info *, size_t index, TypeInfo **)> input_type;
inline constexpr Call<98, void(TypeInfo *)> release_type;
inline constexpr Call<55, Status *(const TypeInfo *, const Shape **)> tensor_type;
inline constexpr Call<249, Status *(const Info *, size_t index, int *is_constant, const Value **)> constant_input;
inline constexpr Call<278, Status *(const Info *, MemoryType, Allocator **)> create_allocator;
inline constexpr Call<132, void(Allocator *)> release_allocator;

inline constexpr Call<75, Status *(Allocator *, size_t bytes, void **)> allocate;
inline constexpr Call<77, Status *(const Allocator *, const MemoryInfo **)> allocator_memory;
inline constexpr Call<72, Status *(const MemoryInfo *, int *device)> memory_device;
inline constexpr Call<125, Status *(char ***names, int *count)> available_providers;
inline constexpr Call<126, Status *(char **names, int count)> release_providers;
inline constexpr Call<193, Status *(const Context *, void **)> gpu_stream;

inline constexpr Call<90, Status *(const Context *, size_t index, const Value **)> context_input;
inline constexpr Call<91, Status *(Context *, size_t index, const int64_t *sizes, size_t rank, Value **)>
    context_output;
inline constexpr Call<274, Status *(const Context *, void (*task)(void *, size_t), size_t count, size_t batches,
                                    void *argument)>
    parallel_for;

inline constexpr Call<51, Status *(Value *, void **)> tensor_data;
inline constexpr Call<65, Status *(const Value *, Shape **)> tensor_shape;
inline constexpr Call<99, void(Shape *)> release_shape;
inline constexpr Call<57, Status *(Shape **)> create_shape;
inline constexpr Call<58, Status *(Shape *, Type)> set_type;
inline constexpr Call<59, Status *(Shape *, const int64_t *sizes, size_t rank)> set_sizes;
inline constexpr Call<271, Status *(Shape *, const char **names, size_t rank)> set_names;
inline constexpr Call<60, Status *(const Shape *, Type *)> get_type;
inline constexpr Call<61, Status *(const Shape *, size_t *rank)> get_rank;
inline constexpr Call<62, Status *(const Shape *, int64_t *sizes, size_t rank)> get_sizes;
inline constexpr Call<63, Status *(const Shape *, const char **names, size_t rank)> get_names;

inline constexpr Call<268, Status *(const InferContext *, size_t index, Shape **)> inferred_input;
inline constexpr Call<270, Status *(const InferContext *, size_t index, const Shape *)> infer_output;
inline constexpr Call<269, Status *(const InferContext *, const char *name, const OpAttribute **)> infer_attribute;
inline constexpr Call<272, Status *(const OpAttribute *, AttributeType, void *, size_t size, size_t *used)>
    read_attribute;

/* OrtCustomOp. Members that are null ask for onnxruntime's default, or are read from versions above 17 only. */
struct Operator {
  uint32_t version;
  void *(*create_v1)(const Operator *, const Api *, const Info *);
  const char *(*name)(const Operator *);
  const char *(*provider)(const Operator *);
  Type (*input_type)(const Operator *, size_t index);
  size_t (*inputs)(const Operator *);
  Type (*output_type)(const Operator *, size_t index);
  size_t (*outputs)(const Operator *);
  void (*compute_v1)(void *kernel, Context *);
  void (*destroy)(void *kernel);
  Characteristic (*input_characteristic)(const Operator *, size_t index);
  Characteristic (*output_characteristic)(const Operator *, size_t index);
  MemoryType (*input_memory)(const Operator *, size_t index);
  int (*variadic_inputs)(const Operator *);
  int (*variadic_inputs_alike)(const Operator *);
  int (*variadic_outputs)(const Operator *);
  int (*variadic_outputs_alike)(const Operator *);
  Status *(*create)(const Operator *, const Api *, const Info *, void **kernel);
  Status *(*compute)(void *kernel, Context *);
  Status *(*infer)(const Operator *, InferContext *);
  int (*first_version)(const Operator *);
  int (*last_version)(const Operator *);
  size_t (*may_inplace)(int **, int **);
  void (*release_inplace)(int *, int *);
  size_t (*alias_map)(int **, int **);
  void (*release_alias)(int *, int *);
};
static_assert(sizeof(void *) != 8 || sizeof(Operator) == 208, "OrtCustomOp has 26 members");

}  // namespace paredown::ort

#endif
