// How fast this machine reads memory: the bound that the kernels' speed is held against.
#include "pool.h"

namespace paredown {
namespace {

typedef uint64_t Line __attribute__((vector_size(64), aligned(8), may_alias));

struct Part {
  const char *data;
  size_t bytes, parts;
  uint64_t *sums;
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
uint64_t sum_of(const char *data, size_t bytes) {
  Line a = {}, b = {}, c = {}, d = {};
  for (size_t at = 0; at + 4 * sizeof(Line) <= bytes; at += 4 * sizeof(Line)) {
    const Line *line = reinterpret_cast<const Line *>(data + at);
    a ^= line[0];
    b ^= line[1];
    c ^= line[2];
    d ^= line[3];
  }
  const Line all = a ^ b ^ c ^ d;
  return all[0] ^ all[1] ^ all[2] ^ all[3] ^ all[4] ^ all[5] ^ all[6] ^ all[7];
}

void read_part(void *argument, size_t i) {
  const Part &part = *static_cast<const Part *>(argument);
  const size_t each = part.bytes / part.parts;
  part.sums[i] = sum_of(part.data + i * each, each);
}

}  // namespace
}  // namespace paredown

extern "C" uint64_t paredown_read(const void *data, size_t bytes, int32_t threads) {
  constexpr int32_t most = 64;
  uint64_t sums[most] = {};
  const int32_t parts = threads < 1 ? 1 : threads > most ? most : threads;
  paredown::Part part{static_cast<const char *>(data), bytes, static_cast<size_t>(parts), sums};
  paredown::run_in_pool(parts, paredown::read_part, &part, static_cast<size_t>(parts));
  uint64_t sum = 0;
  for (int32_t i = 0; i < parts; ++i) sum ^= sums[i];
  return sum;
}
