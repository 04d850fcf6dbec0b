// Sizes of layout c16, and rows of W decoded one by one.
#include "weight.h"

#include "../lut_decode.h"
#include "convert.h"

namespace paredown {
namespace {

/* Sizes above this could overflow a count of bytes. */
constexpr int64_t most = int64_t{1} << 40;

bool is_float(int32_t type) { return type == PAREDOWN_F16 || type == PAREDOWN_BF16 || type == PAREDOWN_F32; }

bool is_identity(const paredown_weight &weight) {
  if (weight.bits != 8 || weight.table_type != PAREDOWN_U8 || weight.table == nullptr) return false;
  const uint8_t *table = static_cast<const uint8_t *>(weight.table);
  const int64_t tables = weight.table_rows == 0 ? 1 : ceil_div(weight.n, weight.table_rows);
  for (int64_t i = 0; i < tables * 256; ++i) {
    if (table[i] != i % 256) return false;
  }
  return true;
}

void table_of_row(const paredown_weight &weight, int64_t row, float *out) {
  const int64_t size = int64_t{1} << weight.bits;
  const int64_t first = weight.table_rows == 0 ? 0 : row / weight.table_rows * size;
  for (int64_t i = 0; i < size; ++i) {
    const float entry = weight.table_type == PAREDOWN_U8
                            ? static_cast<float>(static_cast<const uint8_t *>(weight.table)[first + i])
                            : half_to_float(static_cast<const uint16_t *>(weight.table)[first + i]);
    out[i] = (entry - weight.zero) * weight.unit;
  }
}

template <int BITS>
void decode_row(const Weight &weight, int64_t row, const float *table, void *y, int32_t type) {
  const paredown_weight &given = weight.given;
  const int64_t block = row / ROWS, lane = row % ROWS;
  const char *codes = static_cast<const char *>(given.codes) + block * weight.block_bytes;
  const uint32_t *words = reinterpret_cast<const uint32_t *>(codes) + lane;
  for (int64_t group = 0, column = 0; group < weight.groups; ++group) {
    const float scale = load_as_float(given.scale, given.scale_type, (block * weight.groups + group) * ROWS + lane);
    const int64_t end = column + group_inputs(weight, group);
    for (; column < end; words += BITS * ROWS) {
      for (int quad = 0; quad < QUADS && column < end; ++quad) {
        uint32_t four = four_codes<BITS>(words, quad, ROWS);
        for (int i = 0; i < 4 && column < end; ++i, ++column, four >>= 8) {
          store_float_as(y, type, column, table[four & 0xFFu] * scale);
        }
      }
    }
  }
}

using DecodeRow = decltype(&decode_row<1>);
constexpr DecodeRow decode_row_of[] = {decode_row<1>, decode_row<2>, decode_row<3>, decode_row<4>,
                                       decode_row<5>, decode_row<6>, decode_row<7>, decode_row<8>};

}  // namespace

bool read_sizes(const paredown_weight *given, Weight &out) {
  if (given == nullptr) return false;
  const paredown_weight &w = *given;
  if (w.n < 1 || w.k < 1 || w.n > most / w.k) return false;
  if (w.group < 0) return false;
  if (w.table_rows < 0 || w.table_rows > most || w.table_rows % ROWS != 0) return false;
  if (w.bits < 1 || w.bits > 8 || !is_float(w.scale_type)) return false;
  if (w.table_type != PAREDOWN_U8 && w.table_type != PAREDOWN_F16) return false;
  out.given = w;
  out.group = w.group == 0 || w.group > w.k ? w.k : w.group;
  out.groups = ceil_div(w.k, out.group);
  out.blocks = ceil_div(w.n, ROWS);
  const int64_t group_steps = ceil_div(out.group, STEP), last_steps = ceil_div(group_inputs(out, out.groups - 1), STEP);
  out.steps = (out.groups - 1) * group_steps + last_steps;
  out.runs = (out.groups - 1) * ceil_div(group_steps, RUN_STEPS) + ceil_div(last_steps, RUN_STEPS);
  out.block_bytes = out.steps * w.bits * UNIT_BYTES;
  out.identity = false;
  return true;
}

bool read_weight(const paredown_weight *given, Weight &out) {
  if (!read_sizes(given, out)) return false;
  out.identity = is_identity(*given);
  return given->codes != nullptr && given->table != nullptr && given->scale != nullptr;
}

}  // namespace paredown

extern "C" {

size_t paredown_codes_bytes(const paredown_weight *weight) {
  paredown::Weight w;
  return paredown::read_sizes(weight, w) ? static_cast<size_t>(w.blocks * w.block_bytes) : 0;
}

size_t paredown_scale_count(const paredown_weight *weight) {
  paredown::Weight w;
  return paredown::read_sizes(weight, w) ? static_cast<size_t>(w.blocks * w.groups * paredown::ROWS) : 0;
}

int32_t paredown_gather(const paredown_weight *weight, const int64_t *rows, int64_t count, void *y, int32_t type) {
  paredown::Weight w;
  if (!paredown::read_weight(weight, w)) return PAREDOWN_BAD_WEIGHT;
  if (count < 0 || !paredown::is_float(type)) return PAREDOWN_BAD_CALL;
  if (count > 0 && (rows == nullptr || y == nullptr)) return PAREDOWN_BAD_CALL;
  for (int64_t i = 0; i < count; ++i) {
    if (rows[i] < 0 || rows[i] >= w.given.n) return PAREDOWN_BAD_CALL;
  }
  float table[256];
  int64_t table_row = -1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t kept = w.given.table_rows == 0 ? 0 : rows[i] / w.given.table_rows;
    if (kept != table_row) paredown::table_of_row(w.given, rows[i], table);
    table_row = kept;
    char *to = static_cast<char *>(y) + i * w.given.k * (type == PAREDOWN_F32 ? 4 : 2);
    paredown::decode_row_of[w.given.bits - 1](w, rows[i], table, to, type);
  }
  return PAREDOWN_OK;
}

}  // extern "C"
