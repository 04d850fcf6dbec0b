/* The CUDA driver, opened when the first kernel is made: nothing is linked, so the library loads where there is none.
 *
 * Functions of the files cuda_* throw Failure; the operators (cuda_linear.cpp) turn it into a status. All work in the
 * primary context of a device, which onnxruntime uses too.
 */
#ifndef PAREDOWN_ORT_CUDA_DRIVER_H
#define PAREDOWN_ORT_CUDA_DRIVER_H

#include <stddef.h>
#include <stdint.h>

#include <string>

namespace paredown::ort::cuda {

/* What was wrong, and what to do. */
struct Failure {
  std::string text;
};

/* The functions of libcuda.so.1 that are used, each returning 0 for success, with their parameters as in cuda.h. */
#define PAREDOWN_CUDA_FUNCTIONS(DO)                                                                                   \
  DO(cuInit, unsigned)                                                                                                \
  DO(cuDriverGetVersion, int *)                                                                                       \
  DO(cuDeviceGet, int *, int)                                                                                         \
  DO(cuDeviceGetAttribute, int *, int, int)                                                                           \
  DO(cuDevicePrimaryCtxRetain, void **, int)                                                                          \
  DO(cuDevicePrimaryCtxRelease_v2, int)                                                                               \
  DO(cuCtxGetCurrent, void **)                                                                                        \
  DO(cuCtxPushCurrent_v2, void *)                                                                                     \
  DO(cuCtxPopCurrent_v2, void **)                                                                                     \
  DO(cuModuleLoadData, void **, const void *)                                                                         \
  DO(cuModuleUnload, void *)                                                                                          \
  DO(cuModuleGetFunction, void **, void *, const char *)                                                              \
  DO(cuFuncSetAttribute, void *, int, int)                                                                            \
  DO(cuMemAlloc_v2, uint64_t *, size_t)                                                                               \
  DO(cuMemFree_v2, uint64_t)                                                                                          \
  DO(cuMemcpyHtoD_v2, uint64_t, const void *, size_t)                                                                 \
  DO(cuStreamSynchronize, void *)                                                                                     \
  DO(cuLaunchKernel, void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **,   \
     void **)                                                                                                         \
  DO(cuGetErrorName, int, const char **)                                                                              \
  DO(cuGetErrorString, int, const char **)

struct Driver {
#define PAREDOWN_CUDA_MEMBER(name, ...) int (*name)(__VA_ARGS__);
  PAREDOWN_CUDA_FUNCTIONS(PAREDOWN_CUDA_MEMBER)
#undef PAREDOWN_CUDA_MEMBER

  /* The driver of this process; a Failure where there is none, and then it is looked for again at the next call. */
  static const Driver &get();
  /* Throw if `status` of the function is none of success. */
  void check(int status, const char *function, const std::string &detail = "") const;

 private:
  Driver();
};

/* An argument of a kernel: a device pointer or an int32. The driver takes as many of the 8 bytes as it needs. */
struct Argument {
  Argument() = default;
  Argument(const void *pointer) : bits(reinterpret_cast<uintptr_t>(pointer)) {}
  Argument(uint64_t pointer) : bits(pointer) {}
  Argument(int64_t number) : bits(static_cast<uint64_t>(number)) {}
  Argument(int32_t number) : bits(static_cast<uint64_t>(static_cast<int64_t>(number))) {}

  uint64_t bits = 0;
};
static_assert(sizeof(Argument) == 8, "arguments are read from an array of 8 bytes each");

/* Makes a context the current one of this thread while it lives. */
class Current {
 public:
  Current(const Driver &driver, void *context);
  ~Current();
  Current(const Current &) = delete;

 private:
  const Driver &driver_;
  bool pushed_ = false;
};

/* Memory on the device of the current context. It is freed in whatever context is current then, as CUDA allows. */
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes);
  Memory(Memory &&other) noexcept : address_(other.address_), bytes_(other.bytes_) { other.address_ = 0; }
  Memory &operator=(Memory &&other) noexcept;
  ~Memory();

  uint64_t address() const noexcept { return address_; }
  size_t bytes() const noexcept { return bytes_; }

 private:
  uint64_t address_ = 0;
  size_t bytes_ = 0;
};

}  // namespace paredown::ort::cuda

#endif
