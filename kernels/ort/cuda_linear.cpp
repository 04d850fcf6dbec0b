/* The kernel of the Lut...Linear... operators on onnxruntime's CUDA provider. It was never executed on a GPU: tests run
 * it with a driver of their own, whose kernels run in emulation.
 *
 * The weight, its left factor and bias are asked for in host memory, and must be constant; what the kernels need of them
 * is on the device from then on. All code is loaded then too, so that a run only launches, and may be captured in a CUDA
 * graph once a run of that size has made room for its scratch. More than 128 rows, for which torch decodes W and calls
 * cuBLAS, are multiplied by tile_* all the same: its grid covers any number of rows.
 */
#include <algorithm>
#include <exception>
#include <limits>
#include <optional>

#include "cuda_weight.h"
#include "describe.h"
#include "linear_node.h"

namespace paredown::ort {

namespace {

using cuda::ceil_div;
using cuda::Device;
using cuda::DeviceWeight;
using cuda::Failure;
using cuda::Function;
using cuda::Grid;
using cuda::LinearArguments;
using cuda::Plan;
using cuda::Shape;

constexpr size_t kForms = sizeof cuda::kForms / sizeof *cuda::kForms;
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

int64_t aligned(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

unsigned blocks_of(int64_t count, int64_t each) { return static_cast<unsigned>(ceil_div(count, each)); }

class CudaLinear {
 public:
  explicit CudaLinear(const LinearOperator &described) noexcept : all_(described) {}

  Status *create(const Info *info) noexcept;
  Status *compute(Context *context) noexcept;

 private:
  /* Scratch of a run, as addresses from its start. */
  struct Scratch {
    int64_t x = 0, x_scale = 0, partial = 0, bytes = 0;
  };

  Status *device_number(const Info *info, int *number) const noexcept;
  void load();
  void multiply(const LinearInputs &inputs, void *stream);
  Scratch scratch_of(const LinearInputs &inputs, const Plan &plan) const;
  void quantize(const LinearInputs &inputs, LinearArguments *arguments, void *stream) const;
  void pad(const LinearInputs &inputs, LinearArguments *arguments, void *stream) const;
  void reduce(const LinearInputs &inputs, const LinearArguments &arguments, int64_t parts, void *stream) const;
  bool in_place(const LinearInputs &inputs) const { return cuda::reads_in_place(weight_->shape(), inputs.x); }

  LinearNode all_;
  std::shared_ptr<Device> device_;
  std::optional<DeviceWeight> weight_;
  Function linear_[kForms], prepare_, reduce_;
};

Status *CudaLinear::create(const Info *info) noexcept {
  PAREDOWN_TRY(all_.create(info));
  const bool constant = all_.weight.constant() && (!all_.described.low_rank || all_.left.constant());
  if (!constant || !all_.constant_bias)
    return all_.node.fail("the CUDA kernels take codes, tables, scales and bias that are constants of the same graph");
  if (std::max(all_.weight.value.n, all_.weight.value.k) > kMost)
    return all_.node.fail("W is larger than the CUDA kernels count");
  int number = 0;
  PAREDOWN_TRY(device_number(info, &number));
  try {
    device_ = Device::open(number);
    const cuda::HostWeight host{&all_.weight.value, all_.described.low_rank ? &all_.left.value : nullptr, all_.bias,
                                paredown_type_of(all_.described.type), all_.described.int8};
    weight_.emplace(*device_, host);
    load();
  } catch (const Failure &failure) {
    return all_.node.fail("%s", failure.text.c_str());
  } catch (const std::exception &) {
    return all_.node.fail("no memory for a kernel");
  }
  return nullptr;
}

/* The GPU on which onnxruntime runs this node: that of the memory which it gives to it. */
Status *CudaLinear::device_number(const Info *info, int *number) const noexcept {
  const Api *api = all_.node.api();
  Allocator *allocator = nullptr;
  const MemoryInfo *memory = nullptr;
  PAREDOWN_TRY(create_allocator(api, info, kDefaultMemory, &allocator));
  Status *status = allocator_memory(api, allocator, &memory);
  if (!status) status = memory_device(api, memory, number);
  release_allocator(api, allocator);
  return status;
}

void CudaLinear::load() {
  const cuda::Unit &unit = weight_->unit();
  for (size_t i = 0; i < kForms; ++i) {
    const std::string name =
        std::string("paredown_") + cuda::kForms[i].name + "_" + unit.kind_name + "_b" + std::to_string(unit.bits);
    linear_[i] = device_->function(unit, name, unit.shared[i]);
  }
  prepare_ = device_->function(cuda::kPrepare, all_.described.int8 ? "paredown_quantize" : "paredown_pad", 0);
  reduce_ = device_->function(cuda::kPrepare, "paredown_reduce", 0);
}

Status *CudaLinear::compute(Context *context) noexcept {
  LinearInputs inputs;
  PAREDOWN_TRY(all_.inputs(context, &inputs));
  if (inputs.m == 0) return nullptr;
  if (inputs.m > kMost) return all_.node.fail("%lld rows are too many", static_cast<long long>(inputs.m));
  void *stream = nullptr;
  PAREDOWN_TRY(gpu_stream(all_.node.api(), context, &stream));
  try {
    multiply(inputs, stream);
  } catch (const Failure &failure) {
    return all_.node.fail("%s", failure.text.c_str());
  } catch (const std::exception &) {
    return all_.node.fail("no memory for a run");
  }
  return nullptr;
}

void CudaLinear::multiply(const LinearInputs &inputs, void *stream) {
  const cuda::Current current = device_->current();
  const Shape &shape = weight_->shape();
  const Plan plan(shape, inputs.m, device_->processors());
  LinearArguments arguments = weight_->arguments();
  arguments.x = inputs.x, arguments.low_x = inputs.t, arguments.m = inputs.m, arguments.x_stride = shape.k;
  arguments.activation = all_.described.activation, arguments.y = inputs.y;

  std::unique_lock<std::mutex> lock;
  const Scratch scratch = scratch_of(inputs, plan);
  if (scratch.bytes) {
    lock = device_->lock();
    const uint64_t address = device_->scratch(stream, static_cast<size_t>(scratch.bytes));
    const auto at = [address](int64_t offset) { return address + static_cast<uint64_t>(offset); };
    if (all_.described.int8) {
      arguments.x = at(scratch.x), arguments.x_scale = at(scratch.x_scale);
      quantize(inputs, &arguments, stream);
    } else if (!in_place(inputs)) {
      arguments.x = at(scratch.x);
      pad(inputs, &arguments, stream);
    }
    if (plan.parts > 1) arguments.y = at(scratch.partial);
  }
  device_->launch(linear_[plan.form], plan.grid, arguments, stream);
  if (plan.parts > 1) reduce(inputs, arguments, plan.parts, stream);
}

/* launch.quantized_sizes, launch.padded_columns, and the parts of tile_*. */
CudaLinear::Scratch CudaLinear::scratch_of(const LinearInputs &inputs, const Plan &plan) const {
  const Shape &shape = weight_->shape();
  Scratch scratch;
  if (all_.described.int8) {
    const int64_t rows = ceil_div(inputs.m, 8) * 8, slots = shape.units * cuda::kUnitSteps / shape.steps_per_slot;
    scratch.x_scale = aligned(rows * shape.units * cuda::kUnitInputs);
    scratch.bytes = scratch.x_scale + 2 * rows * slots * 4;
  } else if (!in_place(inputs)) {
    scratch.bytes = inputs.m * shape.units * cuda::kUnitInputs * 2;
  }
  if (plan.parts > 1) {
    scratch.partial = aligned(scratch.bytes);
    scratch.bytes = scratch.partial + plan.parts * inputs.m * shape.n * 4;
  }
  return scratch;
}

/* Round x to bytes: a warp for each run of up to 128 inputs. */
void CudaLinear::quantize(const LinearInputs &inputs, LinearArguments *arguments, void *stream) const {
  const Shape &shape = weight_->shape();
  cuda::QuantizeArguments q;
  q.x = inputs.x, q.m = inputs.m, q.k = shape.k, q.group = shape.group, q.group_steps = shape.group_steps;
  q.units = shape.units, q.steps_per_slot = shape.steps_per_slot, q.x_stride = shape.k;
  q.x_type = paredown_type_of(all_.described.type), q.q = arguments->x, q.q_scale = arguments->x_scale;
  const int64_t runs = shape.groups * ceil_div(shape.group_steps, cuda::kUnitSteps);
  device_->launch(prepare_, Grid{static_cast<unsigned>(inputs.m), blocks_of(runs, cuda::kWarps), 1}, q, stream);
  arguments->x_stride = 0;
}

/* Copy halves to where the layout has their codes. */
void CudaLinear::pad(const LinearInputs &inputs, LinearArguments *arguments, void *stream) const {
  const Shape &shape = weight_->shape();
  const int64_t columns = shape.units * cuda::kUnitInputs;
  cuda::PadArguments p;
  p.x = inputs.x, p.m = inputs.m, p.k = shape.k, p.group = shape.group, p.group_steps = shape.group_steps;
  p.units = shape.units, p.x_stride = shape.k, p.out = arguments->x;
  device_->launch(prepare_, Grid{static_cast<unsigned>(inputs.m), blocks_of(columns, cuda::kThreads), 1}, p, stream);
  arguments->k = columns, arguments->x_stride = columns;
}

/* Add the parts of the product, and finish them. */
void CudaLinear::reduce(const LinearInputs &inputs, const LinearArguments &arguments, int64_t parts,
                        void *stream) const {
  cuda::ReduceArguments r;
  r.partial = arguments.y, r.bias = arguments.bias, r.n = arguments.n, r.m = inputs.m, r.splits = parts;
  r.y_stride = arguments.y_stride, r.y_type = arguments.y_type, r.activation = arguments.activation;
  r.has_bias = arguments.has_bias, r.y = inputs.y;
  const int64_t n = weight_->shape().n;
  device_->launch(reduce_, Grid{static_cast<unsigned>(inputs.m), blocks_of(n, cuda::kThreads), 1}, r, stream);
}

}  // namespace

/* Products of float32 are rounded to bytes or not there at all, and the low-rank term is of halves. */
bool runs_on_cuda(const LinearOperator &described) noexcept {
  return described.type != kFloat || (described.int8 && !described.low_rank);
}

void make_cuda_linear(LinearOperator *made) noexcept {
  make_linear(made);
  made->provider = [](const Operator *) noexcept -> const char * { return "CUDAExecutionProvider"; };
  made->input_memory = [](const Operator *, size_t index) noexcept {
    return index == LinearNode::kX || index == LinearNode::kT ? kDefaultMemory : kHostInput;
  };
  compute_by<CudaLinear>(made);
}

}  // namespace paredown::ort
