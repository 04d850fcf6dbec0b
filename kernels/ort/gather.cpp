/* The kernel of the LutGather... operators: rows of W, for embeddings. */
#include <algorithm>

#include "describe.h"

namespace paredown::ort {

namespace {

enum Input : size_t { kIndices = 0, kCodes = 1 };

/* Rows that a task decodes; their numbers are on its stack. */
constexpr int64_t kRows = 32;
/* Entries of W below which one thread decodes all: they take it 16 us (Zen 5, half a nanosecond each). */
constexpr int64_t kShared = 1 << 15;

class Gather {
 public:
  explicit Gather(const GatherOperator &described) noexcept
      : described_(described), node_(described.api, described.text) {}

  Status *create(const Info *info) noexcept;
  Status *compute(Context *context) noexcept;

 private:
  const GatherOperator &described_;
  Node node_;
  Weight weight_;
  Type index_type_ = kAny;
  Team team_;
};

struct Work {
  const paredown_weight *weight;
  const void *indices;
  bool wide;
  int64_t count;
  unsigned char *y;
  int64_t row_bytes;
  int32_t type;
  std::atomic<int32_t> status{PAREDOWN_OK};

  int64_t index(int64_t i) const noexcept {
    return wide ? static_cast<const int64_t *>(indices)[i] : static_cast<const int32_t *>(indices)[i];
  }
};

void decode(void *argument, size_t task) noexcept {
  Work &work = *static_cast<Work *>(argument);
  int64_t rows[kRows];
  const int64_t first = static_cast<int64_t>(task) * kRows, count = std::min(kRows, work.count - first);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = work.index(first + i);
    rows[i] = index < 0 ? index + work.weight->n : index;
  }
  const int32_t status = paredown_gather(work.weight, rows, count, work.y + first * work.row_bytes, work.type);
  if (status != PAREDOWN_OK) work.status.store(status, std::memory_order_relaxed);
}

Status *Gather::create(const Info *info) noexcept {
  node_.name_after(info);
  PAREDOWN_TRY(node_.check_layout(info));
  PAREDOWN_TRY(node_.read(info, "", "n", &weight_.value.n));
  PAREDOWN_TRY(node_.read(info, "", "k", &weight_.value.k));
  PAREDOWN_TRY(weight_.read(node_, info, "", kCodes));
  PAREDOWN_TRY(node_.input_type(info, kIndices, &index_type_));
  if (index_type_ != kInt32 && index_type_ != kInt64) return node_.fail("indices are neither int32 nor int64");
  return nullptr;
}

Status *Gather::compute(Context *context) noexcept {
  Tensor indices;
  PAREDOWN_TRY(node_.input(context, kIndices, &indices));
  paredown_weight weight;
  PAREDOWN_TRY(weight_.take(node_, context, &weight));
  Output y;
  PAREDOWN_TRY(node_.output(context, indices.sizes, indices.rank, weight.k, &y));
  Work work;
  work.weight = &weight, work.indices = indices.data, work.wide = index_type_ == kInt64, work.count = y.rows;
  work.y = static_cast<unsigned char *>(y.data), work.type = paredown_type_of(described_.type);
  work.row_bytes = weight.k * (described_.type == kFloat ? 4 : 2);
  for (int64_t i = 0; i < y.rows; ++i) {
    const int64_t index = work.index(i);
    if (index < -weight.n || index >= weight.n)
      return node_.fail("index %lld is out of range; W has %lld rows", static_cast<long long>(index),
                        static_cast<long long>(weight.n));
  }
  const size_t tasks = static_cast<size_t>((y.rows + kRows - 1) / kRows);
  if (tasks > 1 && y.rows * weight.k >= kShared && team_.size() > 1) {
    Pool pool(node_.api(), context);
    Pool::run(&pool, decode, &work, tasks);
    team_.saw(pool.threads());
  } else {
    for (size_t task = 0; task < tasks; ++task) decode(&work, task);
  }
  const int32_t status = work.status.load(std::memory_order_relaxed);
  return status == PAREDOWN_OK ? nullptr : node_.fail("%s", paredown_message(status));
}

}  // namespace

void make_gather(GatherOperator *made) noexcept {
  describe<Gather>(made);
  made->inputs = [](const Operator *) noexcept -> size_t { return 4; };
  made->input_type = [](const Operator *, size_t index) noexcept -> Type { return index == kCodes ? kUint8 : kAny; };
  made->infer = [](const Operator *self, InferContext *context) noexcept -> Status * {
    infer_sizes(static_cast<const GatherOperator *>(self)->api, context, "k", 0);
    return nullptr;
  };
}

}  // namespace paredown::ort
