// paredown_run_linear: checks a call, cuts scratch and work into parts, and has the instruction set in use do them.
#include <cmath>
#include <cstdint>

#include "isa.h"
#include "pool.h"
#include "weight.h"

namespace paredown {
namespace {

/* Bytes of codes that make a task, for four tokens in int8: about 5 us of work where it was measured (110 GB/s, one
 * thread). In exact mode one or two tokens take four times as long. */
constexpr int64_t task_bytes = 512 * 1024;
/* More tasks than threads, so that a thread that starts late does less. */
constexpr int64_t tasks_per_thread = 4;

/* Where the parts of scratch are. */
struct Scratch {
  size_t x, scale, correction, low_x, bytes;
};

size_t place(size_t &bytes, int64_t count, int64_t size) {
  const size_t at = bytes;
  bytes += (static_cast<size_t>(count) * static_cast<size_t>(size) + 63) / 64 * 64;
  return at;
}

Scratch lay_out(const paredown_linear &call, const Weight &weight, const Weight *low) {
  const bool int8 = call.mode == PAREDOWN_INT8;
  Scratch scratch{};
  scratch.x = place(scratch.bytes, call.m * weight.steps * STEP, int8 ? 1 : 4);
  scratch.scale = place(scratch.bytes, int8 ? call.m * weight.runs : 0, 4);
  scratch.correction = place(scratch.bytes, int8 ? call.m * weight.runs : 0, 4);
  scratch.low_x = place(scratch.bytes, low == nullptr ? 0 : call.m * low->steps * STEP, 4);
  return scratch;
}

/* Whether the inputs of m rows are so few that no count of their bytes overflows. */
bool fits_scratch(int64_t m, const Weight &weight) { return m <= (int64_t{1} << 48) / (weight.steps * STEP); }

bool is_whole_byte(float zero) { return zero >= 0.0f && zero <= 255.0f && std::floor(zero) == zero; }

int32_t read_call(const paredown_linear &call, Linear &out) {
  out.call = &call;
  if (!read_weight(call.weight, out.weight)) return PAREDOWN_BAD_WEIGHT;
  if (call.mode != PAREDOWN_EXACT && call.mode != PAREDOWN_INT8) return PAREDOWN_BAD_CALL;
  if (call.mode == PAREDOWN_INT8 && (call.weight->table_type != PAREDOWN_U8 || !is_whole_byte(call.weight->zero)))
    return PAREDOWN_BAD_WEIGHT;
  if (call.activation < PAREDOWN_NONE || call.activation > PAREDOWN_SILU) return PAREDOWN_BAD_CALL;
  if (call.type != PAREDOWN_F32 && call.type != PAREDOWN_F16 && call.type != PAREDOWN_BF16) return PAREDOWN_BAD_CALL;
  if (call.m < 0 || (call.m > 0 && (call.x == nullptr || call.y == nullptr))) return PAREDOWN_BAD_CALL;
  if (!fits_scratch(call.m, out.weight)) return PAREDOWN_BAD_CALL;
  if (call.m > 1 && (call.x_stride < 0 || call.y_stride < call.weight->n)) return PAREDOWN_BAD_CALL;
  out.low.given.n = 0;
  if (call.low == nullptr) return call.low_x == nullptr ? PAREDOWN_OK : PAREDOWN_BAD_CALL;
  if (!read_weight(call.low, out.low)) return PAREDOWN_BAD_WEIGHT;
  if (call.low->n != call.weight->n) return PAREDOWN_BAD_WEIGHT;
  if (!fits_scratch(call.m, out.low)) return PAREDOWN_BAD_CALL;
  return call.m > 0 && (call.low_x == nullptr || call.low_stride < 0) ? PAREDOWN_BAD_CALL : PAREDOWN_OK;
}

/* The product, cut into `count` tasks: over tokens in spans of whole tiles, and over rows in pairs of blocks. */
struct Work {
  const Isa &isa;
  const Linear &linear;
  int64_t span_tiles, spans; /* tiles of a task, and how many such spans */
  int64_t block_tasks;

  void run(size_t task) const {
    const int64_t span = static_cast<int64_t>(task) / block_tasks, part = static_cast<int64_t>(task) % block_tasks;
    const int64_t pairs = ceil_div(linear.weight.blocks, 2);
    const int64_t first = part * pairs / block_tasks * 2, end = (part + 1) * pairs / block_tasks * 2;
    const int64_t tile = span * span_tiles, last_tile = min_of(tile + span_tiles, linear.tiles.count);
    isa.multiply(linear, first, min_of(end, linear.weight.blocks), tile, last_tile);
  }
};

void run_part(void *work, size_t task) { static_cast<const Work *>(work)->run(task); }

struct Packing {
  const Isa &isa;
  const Linear &linear;
};

void pack_tile(void *packing, size_t tile) {
  const Packing &self = *static_cast<const Packing *>(packing);
  self.isa.pack(self.linear, static_cast<int64_t>(tile), static_cast<int64_t>(tile) + 1);
}

void run_tasks(const paredown_linear &call, paredown_task task, void *argument, size_t count) {
  if (call.threads > 1 && count > 1) {
    if (call.parallel != nullptr) return call.parallel(call.parallel_context, task, argument, count);
    return run_in_pool(call.threads, task, argument, count);
  }
  for (size_t i = 0; i < count; ++i) task(argument, i);
}

Tiles cut_tokens(int64_t m, int64_t widest) {
  const int64_t count = ceil_div(m, widest);
  return {count, m / count, m % count};
}

Work cut_work(const Isa &isa, const Linear &linear) {
  const Tiles &tiles = linear.tiles;
  const int64_t threads = linear.call->threads, widest = tiles.width + (tiles.wide > 0);
  const int64_t span_tiles = min_of(tiles.count, isa.tokens / widest), spans = ceil_div(tiles.count, span_tiles);
  Work work{isa, linear, ceil_div(tiles.count, spans), 0, 1};
  work.spans = ceil_div(tiles.count, work.span_tiles);
  if (threads < 2) return work;
  const int64_t m = linear.call->m, times = linear.call->mode == PAREDOWN_EXACT ? 4 * ceil_div(m, 2) : ceil_div(m, 4);
  const int64_t effort = linear.weight.blocks * linear.weight.block_bytes * times;
  const int64_t worth = effort / task_bytes, wanted = ceil_div(threads * tasks_per_thread, work.spans);
  const int64_t tasks = min_of(ceil_div(linear.weight.blocks, 2), min_of(wanted, ceil_div(worth, work.spans)));
  work.block_tasks = tasks > 1 ? tasks : 1;
  return work;
}

int64_t widest_tile(const Isa &isa, const Linear &linear) {
  const int32_t mode = linear.call->mode;
  const bool narrow = may_decode_by_tile(mode, bits_of(linear.weight)) && linear.call->m <= isa.narrow_tokens;
  return narrow ? isa.narrow_tile : isa.tile[mode];
}

void pack_inputs(const Isa &isa, Linear &linear, const Scratch &scratch) {
  const paredown_linear &call = *linear.call;
  char *base = static_cast<char *>(call.scratch);
  linear.x = {base + scratch.x, reinterpret_cast<float *>(base + scratch.scale),
              reinterpret_cast<int32_t *>(base + scratch.correction)};
  linear.low_x = {base + scratch.low_x, nullptr, nullptr};
  linear.tiles = cut_tokens(call.m, widest_tile(isa, linear));
  Packing packing{isa, linear};
  run_tasks(call, pack_tile, &packing, static_cast<size_t>(linear.tiles.count));
}

/* Pack the inputs, and multiply by them `times` times. */
int32_t run(const paredown_linear *call, int64_t times) {
  if (call == nullptr) return PAREDOWN_BAD_CALL;
  Linear linear;
  const int32_t status = read_call(*call, linear);
  if (status != PAREDOWN_OK || call->m == 0) return status;
  const Scratch scratch = lay_out(*call, linear.weight, linear.low.given.n == 0 ? nullptr : &linear.low);
  if (call->scratch == nullptr || call->scratch_bytes < scratch.bytes) return PAREDOWN_BAD_CALL;
  if (reinterpret_cast<uintptr_t>(call->scratch) % 64 != 0) return PAREDOWN_BAD_CALL;
  const Isa &isa = isa_in_use();
  pack_inputs(isa, linear, scratch);
  Work work = cut_work(isa, linear);
  for (; times > 0; --times) run_tasks(*call, run_part, &work, static_cast<size_t>(work.spans * work.block_tasks));
  return PAREDOWN_OK;
}

}  // namespace
}  // namespace paredown

extern "C" {

int32_t paredown_abi(void) { return PAREDOWN_ABI; }

const char *paredown_message(int32_t status) {
  switch (status) {
    case PAREDOWN_OK: return "success";
    case PAREDOWN_BAD_WEIGHT: return "layout c16 or this mode does not allow these sizes, bits, group, table or scale";
    case PAREDOWN_BAD_CALL: return "a type, stride or count of x and y, a row index, or the scratch does not fit";
    case PAREDOWN_NO_ISA: return "this instruction set was not built in, or the processor has it not";
    default: return "unknown status";
  }
}

size_t paredown_scratch(const paredown_linear *call) {
  paredown::Weight weight, low;
  if (call == nullptr || call->m < 1 || !paredown::read_sizes(call->weight, weight)) return 0;
  const bool has_low = call->low != nullptr;
  if (has_low && !paredown::read_sizes(call->low, low)) return 0;
  if (!paredown::fits_scratch(call->m, weight) || (has_low && !paredown::fits_scratch(call->m, low))) return 0;
  return paredown::lay_out(*call, weight, has_low ? &low : nullptr).bytes;
}

int32_t paredown_run_linear(const paredown_linear *call) { return paredown::run(call, 1); }
int32_t paredown_repeat_linear(const paredown_linear *call, int64_t times) { return paredown::run(call, times); }
int64_t paredown_multiply_bytes(int64_t count) { return paredown::isa_in_use().multiply_bytes(count); }

}  // extern "C"
