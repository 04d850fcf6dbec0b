#include <sched.h>
#include <unistd.h>

#include <algorithm>

#include "node.h"

namespace paredown::ort {

namespace {

constexpr uint32_t kCounted = 16, kEvery = 256;

int32_t processors() noexcept {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return static_cast<int32_t>(std::max(1L, sysconf(_SC_NPROCESSORS_ONLN)));  // more processors than the set has bits
}

/* The last Pool that counted this thread. */
thread_local uint64_t counted_by = 0;
std::atomic<uint64_t> pools{0};

}  // namespace

Team::Team() noexcept : processors_(processors()) {}

int32_t Team::size() noexcept {
  if (processors_ < 2) return 1;
  const bool counted = runs_.fetch_add(1, std::memory_order_relaxed) % kEvery < kCounted;
  return counted ? processors_ : most_.load(std::memory_order_relaxed);
}

void Team::saw(int32_t threads) noexcept {
  int32_t most = most_.load(std::memory_order_relaxed);
  while (threads > most && !most_.compare_exchange_weak(most, threads, std::memory_order_relaxed)) {
  }
}

Pool::Pool(const Api *api, const Context *context) noexcept
    : api_(api), context_(context), number_(pools.fetch_add(1, std::memory_order_relaxed) + 1) {}

void Pool::run(void *pool, paredown_task task, void *argument, size_t count) noexcept {
  Pool *self = static_cast<Pool *>(pool);
  self->task_ = task, self->argument_ = argument;
  if (Status *status = parallel_for(self->api_, self->context_, step, count, count, self)) {
    release_status(self->api_, status);  // it refuses before it starts, never half way
    for (size_t i = 0; i < count; ++i) task(argument, i);
  }
}

void Pool::step(void *pool, size_t i) noexcept {
  Pool *self = static_cast<Pool *>(pool);
  if (counted_by != self->number_) {
    counted_by = self->number_;
    self->threads_.fetch_add(1, std::memory_order_relaxed);
  }
  self->task_(self->argument_, i);
}

}  // namespace paredown::ort
