// paredown_run_conv: checks a call, cuts scratch and work into parts, and has the instruction set in use do them.
#include "conv.h"

#include <cmath>
#include <cstdint>

#include "pool.h"
#include "weight.h"

namespace paredown {
namespace {

/* Bytes that a task of the first two steps reads at least, and multiply-adds of one of the third: some 10 us, against
 * the 1 to 2 us that starting a task costs. */
constexpr int64_t task_bytes = 64 * 1024, task_products = 1024 * 1024;
constexpr int64_t tasks_per_thread = 4;
/* Sums of a byte and a signed byte, 255 x 127 each, over so many inputs are int32. */
constexpr int64_t most_inputs = 65536;
/* An image of up to so many outputs is one row where the kernel has one tap: short rows make narrow tiles. */
constexpr int64_t short_image = 1024;

int64_t element_bytes(int32_t type) { return type == PAREDOWN_F32 ? 4 : 2; }
int64_t extent(const paredown_conv &call, int axis) { return (call.kernel[axis] - 1) * call.dilation[axis] + 1; }

/* A call whose image is one row, where rows mean nothing to it. */
paredown_conv flattened(const paredown_conv &call) {
  paredown_conv flat = call;
  bool alone = call.height * call.width <= short_image;
  for (int axis = 0; axis < 2; ++axis) alone = alone && call.kernel[axis] == 1 && call.stride[axis] == 1;
  for (const int64_t pad : call.pad) alone = alone && pad == 0;
  if (alone) flat.width = call.height * call.width, flat.height = 1;
  return flat;
}

/* How the work is cut, and where the parts of scratch are. */
struct Cut {
  int64_t parts, row_tasks, spans, block_tasks;
  size_t image, sums, largest, scale, place, word, buffer, correction, bytes;
  int64_t buffer_bytes, correction_words;
};

size_t place(size_t &bytes, int64_t count, int64_t size) {
  const size_t at = bytes;
  bytes += (static_cast<size_t>(count) * static_cast<size_t>(size) + 63) / 64 * 64;
  return at;
}

/* Up to a few tasks for each thread, of at least `least` of `work` each. */
int64_t tasks_for(int64_t threads, int64_t work, int64_t least, int64_t most) {
  if (threads < 2) return 1;
  return min_of(most, min_of(threads * tasks_per_thread, 1 + work / least));
}

void measure(const paredown_conv &call, Conv &out) {
  out.call = &call;
  out.out_height = paredown_conv_outputs(&call, 0);
  out.out_width = paredown_conv_outputs(&call, 1);
  const int64_t columns = (out.out_width - 1) * call.stride[1] + extent(call, 1);
  out.rows = (out.out_height - 1) * call.stride[0] + extent(call, 0);
  out.phase_words = ceil_div(columns, call.stride[1]);
  out.row_words = out.phase_words * call.stride[1];
  if (call.stride[1] == 1) {
    /* Whole vectors of columns are written. */
    const int64_t written = call.pad[1] + ceil_div(call.width, ROWS) * ROWS;
    out.row_words = written > columns ? written : columns;
  }
  out.image_words = out.rows * out.row_words;
  out.taps.count = call.kernel[0] * call.kernel[1];
  out.taps.quads = ceil_div(call.channels, 4);
  out.taps.quad_bytes = out.row_words * 4;
}

Cut cut(const paredown_conv &call, const Conv &conv) {
  const int64_t image_inputs = call.channels * call.height * call.width, out_rows = call.batch * conv.out_height;
  const int64_t pairs = ceil_div(conv.weight.blocks, 2);
  Cut made{};
  made.parts = tasks_for(call.threads, image_inputs * element_bytes(call.type), task_bytes, call.channels);
  made.row_tasks = tasks_for(call.threads, call.batch * image_inputs, task_bytes, call.batch * conv.rows);
  const int64_t products = conv.weight.given.n * conv.weight.given.k * out_rows * conv.out_width;
  const int64_t tasks = tasks_for(call.threads, products, task_products, pairs * out_rows);
  made.block_tasks = min_of(tasks, pairs);
  made.spans = min_of(ceil_div(tasks, made.block_tasks), out_rows);
  made.buffer_bytes = conv.weight.steps * QUADS * 2 * UNIT_BYTES;
  made.correction_words = ceil_div(conv.out_width, ROWS) * ROWS;
  const int64_t multiplying = made.spans * made.block_tasks;
  made.image = place(made.bytes, call.batch * conv.image_words * conv.taps.quads, 4);
  made.sums = place(made.bytes, call.batch * conv.image_words, 4);
  made.largest = place(made.bytes, call.batch * made.parts, 4);
  made.scale = place(made.bytes, call.batch, 4);
  made.place = place(made.bytes, conv.taps.count, 8);
  made.word = place(made.bytes, conv.taps.count, 8);
  made.buffer = place(made.bytes, multiplying * made.buffer_bytes, 1);
  made.correction = place(made.bytes, multiplying * made.correction_words, 4);
  return made;
}

struct Work {
  const Convolution &isa;
  Conv conv;
  Cut cut;

  void find_largest(size_t task) const {
    const paredown_conv &call = *conv.call;
    const int64_t image = static_cast<int64_t>(task) / cut.parts, part = static_cast<int64_t>(task) % cut.parts;
    const int64_t count = call.channels * call.height * call.width;
    const int64_t first = part * count / cut.parts, last = (part + 1) * count / cut.parts;
    const char *x = static_cast<const char *>(call.x) + (image * count + first) * element_bytes(call.type);
    conv.largest[task] = isa.largest(x, call.type, last - first);
  }
  void round_rows(size_t task) const {
    const int64_t all = conv.call->batch * conv.rows, number = static_cast<int64_t>(task);
    const int64_t last = (number + 1) * all / cut.row_tasks;
    for (int64_t at = number * all / cut.row_tasks; at < last; ++at) isa.round_row(conv, at / conv.rows, at % conv.rows);
  }
  void multiply(size_t task) const {
    const int64_t number = static_cast<int64_t>(task), span = number / cut.block_tasks, part = number % cut.block_tasks;
    const int64_t pairs = ceil_div(conv.weight.blocks, 2), rows = conv.call->batch * conv.out_height;
    const int64_t first = part * pairs / cut.block_tasks * 2, last = (part + 1) * pairs / cut.block_tasks * 2;
    char *base = static_cast<char *>(conv.call->scratch);
    uint8_t *buffer = reinterpret_cast<uint8_t *>(base + cut.buffer) + number * cut.buffer_bytes;
    int32_t *correction = reinterpret_cast<int32_t *>(base + cut.correction) + number * cut.correction_words;
    const ConvPart mine{span * rows / cut.spans, (span + 1) * rows / cut.spans, buffer, correction};
    isa.convolve(conv, first, min_of(last, conv.weight.blocks), mine);
  }
};

template <void (Work::*STEP_OF)(size_t) const>
void run_tasks(const Work &work, int64_t count) {
  const paredown_conv &call = *work.conv.call;
  const paredown_task task = [](void *self, size_t i) { (static_cast<const Work *>(self)->*STEP_OF)(i); };
  void *self = const_cast<Work *>(&work);
  if (call.threads > 1 && count > 1) {
    if (call.parallel != nullptr) return call.parallel(call.parallel_context, task, self, static_cast<size_t>(count));
    return run_in_pool(call.threads, task, self, static_cast<size_t>(count));
  }
  for (int64_t i = 0; i < count; ++i) task(self, static_cast<size_t>(i));
}

/* The scale of each image, from the largest inputs of its parts. */
void reduce(const Work &work) {
  for (int64_t image = 0; image < work.conv.call->batch; ++image) {
    float *part = work.conv.largest + image * work.cut.parts;
    for (int64_t i = 1; i < work.cut.parts; ++i) part[0] = part[i] > part[0] ? part[i] : part[0];
    const bool nothing = !(127.0f / part[0] <= 3.4028235e38f); /* zeros, or nearly */
    work.conv.scale[image] = nothing ? 0.0f : part[0] / 127.0f;
  }
}

void find_taps(const Conv &conv, int64_t *place, int64_t *word) {
  const paredown_conv &call = *conv.call;
  for (int64_t tap = 0; tap < conv.taps.count; ++tap) {
    const int64_t row = tap / call.kernel[1] * call.dilation[0], column = tap % call.kernel[1] * call.dilation[1];
    const int64_t at = column % call.stride[1] * conv.phase_words + column / call.stride[1];
    place[tap] = (row * conv.row_words * conv.taps.quads + at) * 4;
    word[tap] = row * conv.row_words + at;
  }
}

void run(Work &work) {
  Conv &conv = work.conv;
  char *base = static_cast<char *>(conv.call->scratch);
  conv.image = reinterpret_cast<int8_t *>(base + work.cut.image);
  conv.sums = reinterpret_cast<int32_t *>(base + work.cut.sums);
  conv.largest = reinterpret_cast<float *>(base + work.cut.largest);
  conv.parts = work.cut.parts;
  conv.scale = reinterpret_cast<float *>(base + work.cut.scale);
  int64_t *place = reinterpret_cast<int64_t *>(base + work.cut.place);
  int64_t *word = reinterpret_cast<int64_t *>(base + work.cut.word);
  find_taps(conv, place, word);
  conv.taps.place = place;
  conv.taps.word = word;
  const int64_t tiles = ceil_div(conv.out_width, work.isa.tile);
  conv.tiles = {tiles, conv.out_width / tiles, conv.out_width % tiles};
  conv.must_correct = static_cast<float>(work.isa.offset) != conv.weight.given.zero;
  run_tasks<&Work::find_largest>(work, conv.call->batch * work.cut.parts);
  reduce(work);
  run_tasks<&Work::round_rows>(work, work.cut.row_tasks);
  run_tasks<&Work::multiply>(work, work.cut.spans * work.cut.block_tasks);
}

bool is_float(int32_t type) { return type == PAREDOWN_F16 || type == PAREDOWN_BF16 || type == PAREDOWN_F32; }

/* Whether sizes are such that no product of them overflows. */
bool is_sane(const paredown_conv &call) {
  constexpr int64_t most = int64_t{1} << 31;
  const int64_t sizes[] = {call.batch, call.channels, call.height, call.width};
  int64_t all = 1;
  for (const int64_t size : sizes) {
    if (size < 0 || size > most || (size > 0 && all > (int64_t{1} << 44) / size)) return false;
    all *= size > 0 ? size : 1;
  }
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t least = call.kernel[axis] < call.stride[axis] ? call.kernel[axis] : call.stride[axis];
    if (least < 1 || call.dilation[axis] < 1) return false;
    if (call.kernel[axis] > most_inputs || call.stride[axis] > most || call.dilation[axis] > most) return false;
  }
  for (const int64_t pad : call.pad) {
    if (pad < 0 || pad > most) return false;
  }
  return call.channels > 0;
}

/* Whether the images with their pads, which scratch holds, are so small that no count of their bytes overflows. */
bool fits_scratch(const paredown_conv &call) {
  const int64_t rows = call.height + call.pad[0] + call.pad[2];
  const int64_t columns = call.width + call.pad[1] + call.pad[3] + call.stride[1] + ROWS;
  return rows <= (int64_t{1} << 44) / (call.batch + 1) / (call.channels + 3) / columns;
}

int32_t read_sizes_of(const paredown_conv &call, Weight &out) {
  if (!is_sane(call) || !fits_scratch(call)) return PAREDOWN_BAD_CALL;
  if (!read_sizes(call.weight, out)) return PAREDOWN_BAD_WEIGHT;
  const int64_t taps = call.kernel[0] * call.kernel[1];
  if (out.groups != 1 || out.given.k > most_inputs || out.given.k != taps * ceil_div(call.channels, 4) * 4)
    return PAREDOWN_BAD_WEIGHT;
  const float zero = out.given.zero;
  const bool whole = zero >= 0.0f && zero <= 255.0f && std::floor(zero) == zero;
  return out.given.table_type == PAREDOWN_U8 && whole ? PAREDOWN_OK : PAREDOWN_BAD_WEIGHT;
}

bool is_empty(const paredown_conv &call) {
  return call.batch == 0 || paredown_conv_outputs(&call, 0) < 1 || paredown_conv_outputs(&call, 1) < 1;
}

}  // namespace
}  // namespace paredown

extern "C" {

int64_t paredown_conv_outputs(const paredown_conv *call, int32_t axis) {
  const int64_t size = axis == 0 ? call->height : call->width;
  const int64_t room = size + call->pad[axis] + call->pad[axis + 2] - paredown::extent(*call, axis);
  return room < 0 ? 0 : room / call->stride[axis] + 1;
}

size_t paredown_conv_scratch(const paredown_conv *call) {
  paredown::Conv conv{};
  if (call == nullptr || paredown::read_sizes_of(*call, conv.weight) != PAREDOWN_OK) return 0;
  if (paredown::is_empty(*call)) return 0;
  const paredown_conv flat = paredown::flattened(*call);
  paredown::measure(flat, conv);
  return paredown::cut(flat, conv).bytes;
}

int32_t paredown_run_conv(const paredown_conv *call) {
  if (call == nullptr) return PAREDOWN_BAD_CALL;
  paredown::Work work{*paredown::isa_in_use().convolution, {}, {}};
  const int32_t status = paredown::read_sizes_of(*call, work.conv.weight);
  if (status != PAREDOWN_OK) return status;
  if (!paredown::read_weight(call->weight, work.conv.weight)) return PAREDOWN_BAD_WEIGHT;
  if (call->activation != PAREDOWN_NONE && call->activation != PAREDOWN_RELU) return PAREDOWN_BAD_CALL;
  if (!paredown::is_float(call->type)) return PAREDOWN_BAD_CALL;
  if (paredown::is_empty(*call)) return PAREDOWN_OK;
  const paredown_conv flat = paredown::flattened(*call);
  paredown::measure(flat, work.conv);
  work.cut = paredown::cut(flat, work.conv);
  if (call->x == nullptr || call->y == nullptr || call->scratch == nullptr) return PAREDOWN_BAD_CALL;
  if (call->scratch_bytes < work.cut.bytes || reinterpret_cast<uintptr_t>(call->scratch) % 64 != 0)
    return PAREDOWN_BAD_CALL;
  paredown::run(work);
  return PAREDOWN_OK;
}

}  // extern "C"
