// Threads that wait for work: started on first use, never stopped, again started in a child after fork.
#include "pool.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace paredown {
namespace {

constexpr int32_t most_threads = 64;
constexpr int spins = 2000; /* before a thread sleeps: 50 us on Zen 5, so that it is awake for the next layer */

struct Job {
  paredown_task task;
  void *argument;
  size_t count;
  std::atomic<size_t> next{0};
};

void work(Job &job) {
  for (size_t i = job.next.fetch_add(1); i < job.count; i = job.next.fetch_add(1)) job.task(job.argument, i);
}

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  void run(int32_t threads, paredown_task task, void *argument, size_t count) {
    Job job{task, argument, count};
    const int32_t helpers = start(static_cast<int32_t>(static_cast<size_t>(threads) < count ? threads : count) - 1);
    if (helpers == 0) return work(job);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      wanted_ = helpers;
      running_.store(helpers, std::memory_order_relaxed);
      ticket_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(job);
    for (int spin = 0; running_.load(std::memory_order_acquire) != 0; ++spin) {
      if (spin < spins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  /* Have `wanted` threads; return how many there are (fewer where the system gives no more). */
  int32_t start(int32_t wanted) {
    if (wanted > most_threads) wanted = most_threads;
    try {
      for (; started_ < wanted; ++started_) {
        std::thread([this, place = started_, seen = ticket_.load()] { wait(place, seen); }).detach();
      }
    } catch (const std::system_error &) {
      return started_;
    }
    return wanted;
  }

  void wait(int32_t place, uint64_t seen) {
    for (;;) {
      for (int spin = 0; spin < spins && ticket_.load(std::memory_order_acquire) == seen; ++spin) pause();
      Job *job = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return ticket_.load(std::memory_order_relaxed) != seen; });
        seen = ticket_.load(std::memory_order_relaxed);
        if (place < wanted_) job = job_;
      }
      if (job == nullptr) continue;
      work(*job);
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int32_t> running_{0};
  Job *job_ = nullptr;
  int32_t wanted_ = 0;
  int32_t started_ = 0;
};

/* Threads do not survive a fork: the child makes a new pool and leaves the old one as it was. */
std::atomic<Pool *> the_pool{nullptr};
std::atomic<bool> busy{false};

void forget_pool() {
  the_pool.store(nullptr);
  busy.store(false);
}

Pool &pool() {
  Pool *found = the_pool.load();
  if (found == nullptr) {
    static std::once_flag registered;
    std::call_once(registered, [] { pthread_atfork(nullptr, nullptr, forget_pool); });
    found = new Pool();  // lives as long as its threads: until the process ends
    the_pool.store(found);
  }
  return *found;
}

}  // namespace

void run_in_pool(int32_t threads, paredown_task task, void *argument, size_t count) {
  if (threads < 2 || count < 2 || busy.exchange(true)) {
    for (size_t i = 0; i < count; ++i) task(argument, i);
    return;
  }
  pool().run(threads, task, argument, count);
  busy.store(false);
}

}  // namespace paredown
