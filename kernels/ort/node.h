/* What the kernels for onnxruntime share: a node's name in errors, attributes, weights, threads of the pool. */
#ifndef PAREDOWN_ORT_NODE_H
#define PAREDOWN_ORT_NODE_H

#include <atomic>

#include "../cpu/paredown.h"
#include "abi.h"

/* Functions here return null or the status that says what is wrong, and throw nothing. */
#define PAREDOWN_TRY(expression) \
  if (Status *status_ = (expression)) return status_

namespace paredown::ort {

constexpr size_t kMostRank = 16;

struct Tensor {
  const void *data;
  int64_t sizes[kMostRank];
  size_t rank;

  int64_t count() const noexcept;
};

struct Output {
  void *data;
  int64_t rows; /* product of all sizes but the last */
};

/* A node while its kernel exists. */
class Node {
 public:
  Node(const Api *api, const char *operator_name) noexcept : api_(api), operator_(operator_name) {}

  void name_after(const Info *info) noexcept;
  const Api *api() const noexcept { return api_; }
  Status *fail(const char *format, ...) const noexcept __attribute__((format(printf, 2, 3)));

  Status *read(const Info *info, const char *prefix, const char *name, int64_t *value) const noexcept;
  Status *read(const Info *info, const char *prefix, const char *name, float *value) const noexcept;
  Status *check_layout(const Info *info) const noexcept;
  Status *input_type(const Info *info, size_t index, Type *type) const noexcept;

  /* Look at an input of this run, or at a constant one when the kernel is made. */
  Status *input(const Context *context, size_t index, Tensor *tensor) const noexcept;
  Status *view(const Value *value, Tensor *tensor) const noexcept;
  /* Make output 0: `sizes` and one more of `width`. */
  Status *output(Context *context, const int64_t *sizes, size_t rank, int64_t width, Output *made) const noexcept;

 private:
  const Api *api_;
  const char *operator_;
  char name_[128] = "";
};

/* The inputs codes, table, scale of a node and the attributes that describe them. */
class Weight {
 public:
  /* Read the attributes `prefix`bits, `prefix`group, ...; n and k are known. Inputs that are constant are taken in
   * place here and now: onnxruntime keeps them, or the file that they are mapped from, as long as the kernel. */
  Status *read(const Node &node, const Info *info, const char *prefix, size_t first_input) noexcept;
  /* The same for the weight that an operator is named after: its layout, n and k, then 3 bits or none of them. */
  Status *read_base(const Node &node, const Info *info, bool planes, size_t first_input) noexcept;
  /* Take the inputs that are not constant from this run. */
  Status *take(const Node &node, const Context *context, paredown_weight *taken) const noexcept;

  paredown_weight value = {};
  bool constant() const noexcept { return constant_[0] && constant_[1] && constant_[2]; }

 private:
  Status *attach(const Node &node, int part, const Tensor &tensor, paredown_weight *weight) const noexcept;

  const char *prefix_ = "";
  size_t first_ = 0;
  bool constant_[3] = {};
};

/* How many threads of the session's pool to cut the work of a kernel for.
 *
 * onnxruntime tells no kernel how large its pool is (1.31), so we count who comes: 16 of every 256 runs are cut for all
 * processors, the others for the most threads that ever took part in one. A pool of one thread thus soon costs nothing.
 * Several runs in a row, because threads that sleep when the first begins are awake for the second. Which work is too
 * little to share, the kernel decides. */
class Team {
 public:
  Team() noexcept;
  int32_t size() noexcept;
  void saw(int32_t threads) noexcept;

 private:
  const int32_t processors_;
  std::atomic<uint32_t> runs_{0};
  std::atomic<int32_t> most_{1};
};

/* One run of a kernel on the pool of its session; `run` is a paredown_parallel, its context a Pool. */
class Pool {
 public:
  Pool(const Api *api, const Context *context) noexcept;
  static void run(void *pool, paredown_task task, void *argument, size_t count) noexcept;
  int32_t threads() const noexcept { return threads_.load(std::memory_order_relaxed); }

 private:
  static void step(void *pool, size_t i) noexcept;

  const Api *api_;
  const Context *context_;
  const uint64_t number_;
  std::atomic<int32_t> threads_{0};
  paredown_task task_ = nullptr;
  void *argument_ = nullptr;
};

/* Memory for one run, aligned to 64 bytes. */
class Scratch {
 public:
  explicit Scratch(Allocator *allocator) noexcept : allocator_(allocator) {}
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  ~Scratch() {
    if (memory_) allocator_->release(allocator_, memory_);
  }
  Status *take(const Node &node, size_t bytes, void **start) noexcept;

 private:
  Allocator *const allocator_;
  void *memory_ = nullptr;
};

/* paredown's number of a type, -1 where it has none. */
int32_t paredown_type_of(Type type) noexcept;

/* Infer an output's sizes: those of input 0 but the last `dropped`, then the attribute named `width`. */
void infer_sizes(const Api *api, InferContext *context, const char *width, size_t dropped) noexcept;

}  // namespace paredown::ort

#endif
