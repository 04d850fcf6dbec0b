#include "cuda_driver.h"

#include <dlfcn.h>

#include <utility>

namespace paredown::ort::cuda {

Driver::Driver() {
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) throw Failure{std::string("there is no CUDA driver here: ") + dlerror()};
#define PAREDOWN_CUDA_FIND(name, ...)                                   \
  name = reinterpret_cast<int (*)(__VA_ARGS__)>(dlsym(library, #name)); \
  if (!name) throw Failure{"the CUDA driver is too old: it has no " #name};
  PAREDOWN_CUDA_FUNCTIONS(PAREDOWN_CUDA_FIND)
#undef PAREDOWN_CUDA_FIND
  check(cuInit(0), "cuInit");
}

const Driver &Driver::get() {
  static const Driver driver;
  return driver;
}

void Driver::check(int status, const char *function, const std::string &detail) const {
  if (status == 0) return;
  const char *name = "", *text = "";
  const bool known = !cuGetErrorName(status, &name) && !cuGetErrorString(status, &text);
  throw Failure{function + (detail.empty() ? "" : " of " + detail) + ": " +
                (known ? std::string(name) + ", " + text : "status " + std::to_string(status))};
}

Current::Current(const Driver &driver, void *context) : driver_(driver) {
  void *now = nullptr;
  driver.check(driver.cuCtxGetCurrent(&now), "cuCtxGetCurrent");
  if (now == context) return;
  driver.check(driver.cuCtxPushCurrent_v2(context), "cuCtxPushCurrent");
  pushed_ = true;
}

Current::~Current() {
  void *popped = nullptr;
  if (pushed_) driver_.cuCtxPopCurrent_v2(&popped);
}

Memory::Memory(size_t bytes) : bytes_(bytes) {
  const Driver &driver = Driver::get();
  if (bytes) driver.check(driver.cuMemAlloc_v2(&address_, bytes), "cuMemAlloc", std::to_string(bytes) + " bytes");
}

Memory &Memory::operator=(Memory &&other) noexcept {
  std::swap(address_, other.address_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Memory::~Memory() {
  if (address_) Driver::get().cuMemFree_v2(address_);  // at the end of a process the driver refuses: it frees all itself
}

}  // namespace paredown::ort::cuda
