/* A GPU while kernels of a session use it: its context, the loaded code, and scratch memory for each stream. */
#ifndef PAREDOWN_ORT_CUDA_DEVICE_H
#define PAREDOWN_ORT_CUDA_DEVICE_H

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cuda_launch.h"

namespace paredown::ort::cuda {

struct Function {
  std::string name;
  void *handle;
  unsigned shared;
};

struct Grid {
  unsigned x, y, z;
};

class Device {
 public:
  /* The device that onnxruntime numbers so, shared by all kernels on it; the last one to go frees its memory. */
  static std::shared_ptr<Device> open(int number);
  ~Device();
  Device(const Device &) = delete;

  int processors() const noexcept { return processors_; }
  Current current() const { return Current(driver_, context_); }

  /* A kernel of a unit, with leave to use that much shared memory. Loads the unit when it is first asked for. */
  Function function(const Unit &unit, const std::string &name, unsigned shared);
  template <class Arguments>
  void launch(const Function &function, const Grid &grid, Arguments arguments, void *stream) const {
    launch(function, grid, reinterpret_cast<Argument *>(&arguments), sizeof arguments / sizeof(Argument), stream);
  }
  void copy(uint64_t to, const void *from, size_t bytes) const;
  void wait(void *stream) const;

  /* Hold this lock while scratch is asked for and until what uses it was launched: what is launched on a stream runs in
   * that order, so one piece of memory serves all kernels on it. A piece that became too small is kept too, since work
   * that is under way, or a captured graph, may still use it. */
  std::unique_lock<std::mutex> lock() { return std::unique_lock<std::mutex>(scratch_lock_); }
  uint64_t scratch(void *stream, size_t bytes);

 private:
  explicit Device(int number);
  void launch(const Function &function, const Grid &grid, Argument *arguments, size_t count, void *stream) const;

  const Driver &driver_;
  int handle_ = 0, processors_ = 0, capability_ = 0, version_ = 0;
  void *context_ = nullptr;
  std::mutex module_lock_, scratch_lock_;
  std::map<std::string, void *> modules_;
  std::map<void *, std::vector<Memory>> scratch_;
};

}  // namespace paredown::ort::cuda

#endif
