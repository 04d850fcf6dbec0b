/* Names, forms and arguments of the CUDA kernels, and the digests of their sources.
 *
 * kernels/cuda/launch_header.py writes this file: change launch.py or the sources, then run
 * python -m paredown.kernels.cuda.launch_header.
 */
#ifndef PAREDOWN_ORT_CUDA_LAUNCH_H
#define PAREDOWN_ORT_CUDA_LAUNCH_H

#include "cuda_driver.h"

namespace paredown::ort::cuda {

constexpr int kThreads = 256, kWarps = 8, kGemvMost = 16;
constexpr int kTegra[] = {72, 87, 101, 110};
constexpr char kSingle = 'a';
constexpr char kVirtual[] = "compute_80";

struct Form {
  const char *name;
  int rows, tokens;
  bool tile;
};
constexpr Form kForms[] = {
    {"gemv_r16_m8", 16, 8, false},
    {"gemv_r16_m16", 16, 16, false},
    {"gemv_r32_m8", 32, 8, false},
    {"gemv_r32_m16", 32, 16, false},
    {"tile_r128_m32", 128, 32, true},
    {"tile_r128_m64", 128, 64, true},
};

enum Kind { kF16, kF16b, kBf16, kS8 };
struct Unit {
  Kind kind;
  int bits;
  const char *kind_name, *file, *digest;
  unsigned shared[6];
};
constexpr Unit kUnits[] = {
    {kF16, 2, "f16", "linear_f16_2.cu",
     "520bc049fa5f6b118e63fc55c81b3b1da965d5f33d93c33d6a0c5ce552ddfedc",
     {33280, 33280, 41280, 41280, 36864, 61440}},
    {kF16, 3, "f16", "linear_f16_3.cu",
     "1a14c1af63c0b4d5b1feef69715620423bdb16addc7a61aacf50e802127c94a6",
     {37248, 37248, 37056, 37056, 43008, 67584}},
    {kF16, 4, "f16", "linear_f16_4.cu",
     "8c1b263c020e97276531752fa2c04bf50bad377e5335497f5770e3c2a252862a",
     {41280, 41280, 32896, 32896, 49152, 73728}},
    {kBf16, 2, "bf16", "linear_bf16_2.cu",
     "c253f9012d2c4a3021b9e78e38b9b2f24ee4cd10ce631fd2d729d73781aaa4db",
     {33280, 33280, 41280, 41280, 36864, 61440}},
    {kBf16, 3, "bf16", "linear_bf16_3.cu",
     "66562f820194c7bf8dcfd6db22a4ae500b17a0526fd3d4ae752ee4d532e22a2f",
     {37248, 37248, 37056, 37056, 43008, 67584}},
    {kBf16, 4, "bf16", "linear_bf16_4.cu",
     "ffefed5da5b98e93ca025697cdc035933735232e5152bedd6be4dd1a01704b3f",
     {41280, 41280, 32896, 32896, 49152, 73728}},
    {kS8, 2, "s8", "linear_s8_2.cu",
     "7322a5ce27ee753d6f7067d2ea7553b1c47426a336214591be8b676e067e955c",
     {33280, 33280, 41280, 41280, 24576, 36864}},
    {kS8, 3, "s8", "linear_s8_3.cu",
     "8bab12dd1fe30a53bdfd094403d1d0307a44e42aa45ec1ae5281d7b85e1f0f15",
     {37248, 37248, 37056, 37056, 30720, 43008}},
    {kS8, 4, "s8", "linear_s8_4.cu",
     "8ff118a0c8defa49735871a2ff71385d33bb0ddba6f15b48fa0a091a92c5027c",
     {41280, 41280, 32896, 32896, 36864, 49152}},
    {kF16b, 4, "f16b", "linear_f16b_4.cu",
     "cdd5f65fb2eb516698b26df0e42f6d6784d432963771f9207bb9f80c9e76874b",
     {41280, 41280, 32896, 32896, 49152, 73728}},
};
constexpr Unit kPrepare = {kF16, 0, "", "prepare.cu",
    "47e237c24ea6c50dba9c0e294b9febb7e63ea52e241c8671c31f94361f8704b8", {}};

struct LinearArguments {
  Argument codes, table, scale, x, x_scale, bias, low, low_x, n, m, k, units, slots, steps_per_slot,
      units_per_slot, table_rows, x_stride, y_stride, scale_type, y_type, low_type, activation, has_bias,
      rank, low_stride, unit_bits, shift_bits, y;
};

struct ReduceArguments {
  Argument partial, bias, n, m, splits, y_stride, y_type, activation, has_bias, y;
};

struct QuantizeArguments {
  Argument x, m, k, group, group_steps, units, steps_per_slot, x_stride, x_type, q, q_scale;
};

struct PadArguments {
  Argument x, m, k, group, group_steps, units, x_stride, out;
};

struct DenseArguments {
  Argument codes, table, scale, n, k, bits, group, group_steps, units, slots, steps_per_slot, units_per_slot,
      table_rows, scale_type, w_type, w;
};

struct RepackArguments {
  Argument c16, n, bits, steps, units, codes;
};

}  // namespace paredown::ort::cuda

#endif
