#include "cuda_weight.h"

#include <string.h>

#include <algorithm>
#include <array>

#include "../cpu/convert.h"

namespace paredown::ort::cuda {

namespace {

using Bytes = std::vector<unsigned char>;

constexpr size_t kAligned = 256;
/* Rows of the left factor that are decoded at a time. */
constexpr int64_t kLeftRows = 64;

size_t aligned(size_t bytes) { return (bytes + kAligned - 1) / kAligned * kAligned; }

/* Add zeros up to the next aligned place, then `bytes` more, and return where those begin. */
size_t extend(Bytes *all, size_t bytes) {
  const size_t begin = aligned(all->size());
  all->resize(begin + bytes);
  return begin;
}

/* tables.device_table: bytes, or all low bytes of halves and then the high ones. */
size_t add_table(const paredown_weight &weight, Kind kind, Bytes *all) {
  const int64_t levels = int64_t{1} << weight.bits;
  const int64_t tables = weight.table_rows ? ceil_div(weight.n, weight.table_rows) : 1;
  const bool octets = kind == kS8 || kind == kF16b;
  const size_t begin = extend(all, static_cast<size_t>(tables * levels * (octets ? 1 : 2)));
  unsigned char *to = all->data() + begin;
  const uint8_t *from = static_cast<const uint8_t *>(weight.table);
  for (int64_t i = 0; i < tables * levels; ++i) {
    if (octets) {
      to[i] = kind == kS8 ? from[i] ^ 128 : from[i];
      continue;
    }
    const float entry =
        weight.table_type == PAREDOWN_U8 ? static_cast<float>(from[i]) : load_as_float(weight.table, PAREDOWN_F16, i);
    const float value = entry - weight.zero;
    const uint16_t half = kind == kF16 ? float_to_half(value) : float_to_bfloat16(value);
    unsigned char *low = to + i / levels * 2 * levels + i % levels;
    low[0] = static_cast<unsigned char>(half), low[levels] = static_cast<unsigned char>(half >> 8);
  }
  return begin;
}

/* tables.device_scale: whether every scale is a float16. */
bool are_halves(const paredown_weight &weight, int64_t count) {
  if (weight.scale_type == PAREDOWN_F16) return true;
  for (int64_t i = 0; i < count; ++i) {
    const float value = load_as_float(weight.scale, weight.scale_type, i);
    if (!(half_to_float(float_to_half(value)) == value)) return false;
  }
  return true;
}

/* layout_mma16.pack_scale, from the scales of layout c16. */
size_t add_scale(const paredown_weight &weight, const Shape &shape, int32_t type, Bytes *all) {
  const size_t begin = extend(all, static_cast<size_t>(shape.blocks * shape.slots * kRows * (type == PAREDOWN_F32 ? 4 : 2)));
  void *to = all->data() + begin;
  const bool whole = shape.steps_per_slot == kUnitSteps;
  const int64_t used = whole ? shape.slots : ceil_div(shape.steps, shape.steps_per_slot);
  for (int64_t block = 0; block < shape.blocks; ++block) {
    for (int64_t slot = 0; slot < used; ++slot) {
      const int64_t group = whole ? slot : slot * shape.steps_per_slot / shape.group_steps;
      for (int64_t row = 0; row < kRows; ++row) {
        const float value = load_as_float(weight.scale, weight.scale_type, (block * shape.groups + group) * kRows + row);
        store_float_as(to, type, (block * shape.slots + slot) * kRows + row, value);
      }
    }
  }
  return begin;
}

/* The left factor decoded to `type`, each row filled up to whole 32 columns. */
size_t add_left(const paredown_weight &left, int32_t type, Bytes *all) {
  const size_t row = static_cast<size_t>(2 * ceil_div(left.k, kStep) * kStep), used = static_cast<size_t>(2 * left.k);
  const size_t begin = extend(all, static_cast<size_t>(left.n) * row);
  Bytes decoded(static_cast<size_t>(kLeftRows) * used);
  std::array<int64_t, kLeftRows> rows;
  for (int64_t first = 0; first < left.n; first += kLeftRows) {
    const int64_t count = std::min(kLeftRows, left.n - first);
    for (int64_t i = 0; i < count; ++i) rows[static_cast<size_t>(i)] = first + i;
    const int32_t status = paredown_gather(&left, rows.data(), count, decoded.data(), type);
    if (status != PAREDOWN_OK) throw Failure{paredown_message(status)};
    for (int64_t i = 0; i < count; ++i) {
      memcpy(all->data() + begin + static_cast<size_t>(first + i) * row, decoded.data() + static_cast<size_t>(i) * used,
             used);
    }
  }
  return begin;
}

/* tables.shift_bits. */
int32_t shift_bits(const paredown_weight &weight, Kind kind) {
  if (kind == kS8) return static_cast<int32_t>(bits_of_float(weight.zero - 128));
  const uint32_t half = kind == kF16b ? float_to_half(1024 + weight.zero) : 0;
  return static_cast<int32_t>(half | half << 16);
}

/* Codes of layout c16 to mma16, by way of the device. */
void repack(Device &device, const paredown_weight &weight, const Shape &shape, uint64_t codes) {
  const size_t bytes = paredown_codes_bytes(&weight);
  const Memory c16(bytes);
  device.copy(c16.address(), weight.codes, bytes);
  RepackArguments arguments;
  arguments.c16 = c16.address(), arguments.n = shape.n, arguments.bits = shape.bits;
  arguments.steps = shape.steps, arguments.units = shape.units, arguments.codes = codes;
  const Grid grid{static_cast<unsigned>(ceil_div(shape.units * 64 * shape.bits, kThreads)),
                  static_cast<unsigned>(shape.blocks), 1};
  device.launch(device.function(kPrepare, "paredown_repack", 0), grid, arguments, nullptr);
  device.wait(nullptr);  // the stream of a run does not wait for this one
}

}  // namespace

DeviceWeight::DeviceWeight(Device &device, const HostWeight &host)
    : shape_(*host.weight), unit_(unit_for(*host.weight, host.type, host.int8)) {
  const paredown_weight &weight = *host.weight;
  const int32_t scale_type = are_halves(weight, shape_.blocks * shape_.groups * kRows) ? PAREDOWN_F16 : weight.scale_type;
  Bytes all;
  const size_t table = add_table(weight, unit_.kind, &all), scale = add_scale(weight, shape_, scale_type, &all);
  const size_t low = host.left ? add_left(*host.left, host.type, &all) : 0;
  size_t bias = 0;
  if (host.bias) {
    const size_t bytes = static_cast<size_t>(weight.n) * (host.type == PAREDOWN_F32 ? 4 : 2);
    bias = extend(&all, bytes);
    memcpy(all.data() + bias, host.bias, bytes);
  }

  const Current current = device.current();
  const size_t first = aligned(shape_.codes_bytes());
  memory_ = Memory(first + all.size());
  const uint64_t rest = memory_.address() + first;
  device.copy(rest, all.data(), all.size());
  repack(device, weight, shape_, memory_.address());

  LinearArguments &a = arguments_;
  a.codes = memory_.address(), a.table = rest + table, a.scale = rest + scale;
  if (host.left) a.low = rest + low;
  if (host.bias) a.bias = rest + bias;
  a.n = shape_.n, a.k = shape_.k, a.units = shape_.units, a.slots = shape_.slots;
  a.steps_per_slot = shape_.steps_per_slot, a.units_per_slot = shape_.units_per_slot;
  a.table_rows = shape_.table_rows, a.y_stride = shape_.n;
  a.scale_type = scale_type, a.y_type = host.type, a.low_type = host.type, a.has_bias = host.bias ? 1 : 0;
  a.rank = host.left ? host.left->k : 0, a.low_stride = a.rank;
  a.unit_bits = static_cast<int32_t>(bits_of_float(weight.unit)), a.shift_bits = shift_bits(weight, unit_.kind);
}

}  // namespace paredown::ort::cuda
