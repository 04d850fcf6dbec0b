#include "cuda_device.h"

#include <algorithm>

#include "cuda_image.h"

namespace paredown::ort::cuda {

namespace {

/* CUdevice_attribute and CUfunction_attribute, as cuda.h numbers them. */
constexpr int kProcessors = 16, kMajor = 75, kMinor = 76, kMostDynamicShared = 8;
/* Shared memory of a block that a kernel has without asking (CUDA programming guide). */
constexpr unsigned kShared = 48 * 1024;
constexpr size_t kMostArguments = sizeof(LinearArguments) / sizeof(Argument);

}  // namespace

std::shared_ptr<Device> Device::open(int number) {
  static std::mutex mutex;
  static std::map<int, std::weak_ptr<Device>> *const devices = new std::map<int, std::weak_ptr<Device>>;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Device> found = (*devices)[number].lock();
  if (!found) {
    found.reset(new Device(number));
    (*devices)[number] = found;
  }
  return found;
}

Device::Device(int number) : driver_(Driver::get()) {
  driver_.check(driver_.cuDriverGetVersion(&version_), "cuDriverGetVersion");
  driver_.check(driver_.cuDeviceGet(&handle_, number), "cuDeviceGet", "GPU " + std::to_string(number));
  const auto attribute = [this](int which) {
    int value = 0;
    driver_.check(driver_.cuDeviceGetAttribute(&value, which, handle_), "cuDeviceGetAttribute");
    return value;
  };
  processors_ = attribute(kProcessors), capability_ = 10 * attribute(kMajor) + attribute(kMinor);
  driver_.check(driver_.cuDevicePrimaryCtxRetain(&context_, handle_), "cuDevicePrimaryCtxRetain");
}

Device::~Device() {
  try {
    const Current current(driver_, context_);
    scratch_.clear();
    for (const auto &[file, module] : modules_) driver_.cuModuleUnload(module);
  } catch (const Failure &) {  // at the end of a process the driver refuses: it frees all itself
  }
  driver_.cuDevicePrimaryCtxRelease_v2(handle_);
}

Function Device::function(const Unit &unit, const std::string &name, unsigned shared) {
  const Current current(driver_, context_);
  const std::lock_guard<std::mutex> lock(module_lock_);
  void *&module = modules_[unit.file];
  if (!module) {
    const std::string image = find_image(unit, capability_, version_);
    void *loaded = nullptr;
    driver_.check(driver_.cuModuleLoadData(&loaded, image.c_str()), "cuModuleLoadData", unit.file);
    module = loaded;
  }
  Function found{name, nullptr, shared};
  driver_.check(driver_.cuModuleGetFunction(&found.handle, module, name.c_str()), "cuModuleGetFunction", name);
  if (shared > kShared) {
    driver_.check(driver_.cuFuncSetAttribute(found.handle, kMostDynamicShared, static_cast<int>(shared)),
                  "cuFuncSetAttribute", name);
  }
  return found;
}

void Device::launch(const Function &function, const Grid &grid, Argument *arguments, size_t count, void *stream) const {
  void *places[kMostArguments];
  for (size_t i = 0; i < count; ++i) places[i] = arguments + i;
  const int status = driver_.cuLaunchKernel(function.handle, grid.x, grid.y, grid.z, kThreads, 1, 1, function.shared,
                                            stream, places, nullptr);
  driver_.check(status, "cuLaunchKernel", status ? function.name : std::string());
}

void Device::copy(uint64_t to, const void *from, size_t bytes) const {
  driver_.check(driver_.cuMemcpyHtoD_v2(to, from, bytes), "cuMemcpyHtoD");
}

void Device::wait(void *stream) const { driver_.check(driver_.cuStreamSynchronize(stream), "cuStreamSynchronize"); }

uint64_t Device::scratch(void *stream, size_t bytes) {
  std::vector<Memory> &pieces = scratch_[stream];
  if (pieces.empty() || pieces.back().bytes() < bytes) {
    // Twice the last at least, so that all that was ever kept is less than twice what is in use.
    pieces.emplace_back(std::max(bytes, pieces.empty() ? 0 : 2 * pieces.back().bytes()));
  }
  return pieces.back().address();
}

}  // namespace paredown::ort::cuda
