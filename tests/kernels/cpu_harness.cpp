// Runs a file of calls (tests/kernels/cpu_cases.py writes it) with every instruction set of the library, or with those
// named, and writes each status and result. It exists so that another processor's library can be tested in an emulator.
//
//   harness CALLS RESULTS [ISA ...]
#include "harness.h"

namespace {

enum Kind { LINEAR = 0, GATHER = 1 };

struct Call {
  explicit Call(Reader &in)
      : kind(in.integer()),
        linear(),
        y_bytes(0),
        weight(in),
        low(in),
        x(rest(in)),
        bias(in.bytes()),
        low_x(in.bytes()) {
    linear.weight = &weight.value;
    linear.x = x.data();
    linear.bias = bias.or_null();
    linear.low = low.codes.size() == 0 ? nullptr : &low.value;
    linear.low_x = low_x.or_null();
    linear.low_stride = low.value.k;
  }
  int64_t kind;
  paredown_linear linear;
  size_t y_bytes;
  Weight weight, low;
  Guarded x, bias, low_x;

 private:
  Guarded rest(Reader &in) {
    linear.m = in.integer();
    linear.x_stride = in.integer();
    linear.y_stride = in.integer();
    linear.type = static_cast<int32_t>(in.integer());
    linear.mode = static_cast<int32_t>(in.integer());
    linear.activation = static_cast<int32_t>(in.integer());
    linear.threads = static_cast<int32_t>(in.integer());
    y_bytes = static_cast<size_t>(in.integer());
    return in.bytes();
  }
};

int32_t run(const Call &call, void *y) {
  if (call.kind == GATHER) {
    const auto *rows = reinterpret_cast<const int64_t *>(call.x.data());
    return paredown_gather(&call.weight.value, rows, call.linear.m, y, call.linear.type);
  }
  paredown_linear linear = call.linear;
  const size_t bytes = paredown_scratch(&linear);
  const Guarded scratch((bytes + 63) / 64 * 64);
  linear.y = y;
  linear.scratch = scratch.data();
  linear.scratch_bytes = bytes;
  return paredown_run_linear(&linear);
}

}  // namespace

int main(int count, char **arguments) { return run_file<Call>(count, arguments); }
