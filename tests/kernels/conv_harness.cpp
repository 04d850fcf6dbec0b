// Runs a file of convolutions (tests/kernels/conv_cases.py writes it) with every instruction set of the library, or with
// those named, and writes each status and result.
//
//   harness CALLS RESULTS [ISA ...]
#include "harness.h"

namespace {

struct Call {
  explicit Call(Reader &in) : conv(), y_bytes(0), weight(in), x(numbers(in)), bias(in.bytes()) {
    conv.weight = &weight.value;
    conv.x = x.data();
    conv.bias = bias.or_null();
  }
  paredown_conv conv;
  size_t y_bytes;
  Weight weight;
  Guarded x, bias;

 private:
  Guarded numbers(Reader &in) {
    for (int64_t *number : {&conv.batch, &conv.channels, &conv.height, &conv.width}) *number = in.integer();
    for (int64_t &number : conv.kernel) number = in.integer();
    for (int64_t &number : conv.stride) number = in.integer();
    for (int64_t &number : conv.dilation) number = in.integer();
    for (int64_t &number : conv.pad) number = in.integer();
    conv.type = static_cast<int32_t>(in.integer());
    conv.activation = static_cast<int32_t>(in.integer());
    conv.threads = static_cast<int32_t>(in.integer());
    y_bytes = static_cast<size_t>(in.integer());
    return in.bytes();
  }
};

int32_t run(const Call &call, void *y) {
  paredown_conv conv = call.conv;
  const size_t bytes = paredown_conv_scratch(&conv);
  const Guarded scratch((bytes + 63) / 64 * 64);
  std::memset(scratch.data(), 0x7F, scratch.size());  // what an earlier call may have left
  conv.y = y;
  conv.scratch = scratch.data();
  conv.scratch_bytes = bytes;
  return paredown_run_conv(&conv);
}

}  // namespace

int main(int count, char **arguments) { return run_file<Call>(count, arguments); }
