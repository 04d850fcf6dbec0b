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

int main(int count, char **arguments) {
  if (count == 1) {  // for the test to see what this processor runs
    std::printf("%s\n", paredown_isas());
    return 0;
  }
  if (count < 3) fail("usage: harness CALLS RESULTS [ISA ...]");
  std::vector<std::string> names(arguments + 3, arguments + count);
  if (names.empty()) names = built();
  Reader in(arguments[1]);
  std::list<Call> calls;  // a call holds pointers into itself
  while (in.more()) calls.emplace_back(in);
  std::ofstream out(arguments[2], std::ios::binary);
  for (const std::string &name : names) {
    if (paredown_use_isa(name.c_str()) != PAREDOWN_OK) fail("no instruction set " + name);
    for (const Call &call : calls) {
      const Guarded y(call.y_bytes);
      std::memset(y.data(), 0xFF, y.size());  // undefined values, which may not stay where a result belongs
      const int32_t status = run(call, y.data());
      out.write(reinterpret_cast<const char *>(&status), sizeof status);
      out.write(y.data(), static_cast<std::streamsize>(y.size()));
    }
  }
  return out ? 0 : 1;
}
