/* The instructions of kernels/cuda/intrinsics.cuh for a CPU, so that g++ compiles the CUDA kernels and a test runs them.
 *
 * Every thread of a block is a coroutine. It runs until it must wait: for its warp (mma, shuffles), for its block, or for
 * copies; who runs next is drawn from a seed. What the hardware does not promise is made to hurt: copies to shared
 * memory arrive only when they are waited for, and leave poison until then; shared memory starts as poison and ends at
 * a page that may not be touched; a read of global memory must be aligned and within a buffer of the test; a lane that
 * misses an mma is a deadlock. Fragments of mma are as the PTX ISA defines them (9.7.14, "Matrix Fragments").
 */
#ifndef PAREDOWN_EMULATED_H
#define PAREDOWN_EMULATED_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define PD_DEVICE inline __attribute__((always_inline))
#define PD_KERNEL extern "C" void
#define PD_THREADS(count, blocks)
#ifndef PD_BULK
#define PD_BULK 0
#endif

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

namespace paredown {

struct Copy {
  void *to;
  const void *from;
  int bytes;
  uint64_t *barrier;
};

struct Thread {
  ucontext_t context;
  int index = 0;
  bool done = false;
  std::vector<std::vector<Copy>> groups;  // closed ones, then the open one
  std::vector<char> stack = std::vector<char>(64 * 1024);
};

/* Where a number of threads meet; what they brought is combined by the last. */
struct Meeting {
  int arrived = 0, generation = 0;
  void *brought[32] = {};
};

struct Buffer {
  const char *begin;
  int64_t bytes;
};

struct Machine {
  std::vector<Thread> threads;
  Meeting warps[32], block;
  int current = 0, count = 0, moves = 0;
  int block_index[3] = {}, grid[3] = {};
  ucontext_t scheduler;
  unsigned char *shared = nullptr;
  std::vector<Copy> bulk;
  std::vector<Buffer> readable;
  std::mt19937 random;
  std::string error;
};

inline Machine &machine() {
  static Machine only;
  return only;
}

inline Thread &self() { return machine().threads[machine().current]; }
inline void pause() { swapcontext(&self().context, &machine().scheduler); }

/* End the run: the block is abandoned where it stands. */
inline void fail(const char *what) {
  Machine &m = machine();
  char place[80];
  snprintf(place, sizeof(place), " (block %d %d %d, thread %d)", m.block_index[0], m.block_index[1], m.block_index[2],
           m.current);
  m.error = std::string(what) + place;
  for (;;) pause();
}

/* Wait for `count` threads; the last of them runs `combine` on what all brought. */
template <class Combine>
void meet(Meeting &at, int count, int place, void *mine, Combine combine) {
  const int generation = at.generation;
  at.brought[place % 32] = mine;
  ++machine().moves;
  if (++at.arrived == count) {
    combine(at.brought);
    at.arrived = 0;
    ++at.generation;
    return;
  }
  while (at.generation == generation) pause();
}

template <class Combine>
void meet_warp(void *mine, Combine combine) {
  meet(machine().warps[self().index / 32], 32, self().index % 32, mine, combine);
}

inline int thread_index() { return self().index; }
inline int block_index_x() { return machine().block_index[0]; }
inline int block_index_y() { return machine().block_index[1]; }
inline int block_index_z() { return machine().block_index[2]; }
inline int grid_size_z() { return machine().grid[2]; }
inline int warp_index() { return self().index / 32; }
inline void sync_threads() {
  meet(machine().block, machine().count, 0, nullptr, [](void **) {});
}
inline void sync_warp() {
  meet_warp(nullptr, [](void **) {});
}
inline unsigned char *shared_memory() { return machine().shared; }

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  if (selector & 0x8888u) fail("a selector of PRMT above 7 copies a sign");
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(both >> (8 * ((selector >> (4 * i)) & 7)) & 255) << (8 * i);
  return out;
}

inline float from_f16(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                                    : std::ldexp(static_cast<float>(exponent ? mantissa + 1024 : mantissa),
                                                 (exponent ? exponent : 1) - 25);
  return half >> 15 ? -size : size;
}
inline float from_bf16(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }
inline uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline uint16_t to_f16(float value) {
  const uint16_t sign = bits_of(value) >> 31 << 15;
  const float size = std::fabs(value);
  if (value != value) return 0x7FFF;
  if (size >= 65520.0f) return sign | 0x7C00;
  int exponent;
  std::frexp(size, &exponent);
  exponent = exponent - 1 < -14 ? -14 : exponent - 1;
  const int mantissa = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));  // 1024 .. 2048, or less
  return static_cast<uint16_t>(sign | (mantissa < 1024 ? mantissa : ((exponent + 15) << 10) + mantissa - 1024));
}
inline uint32_t subtract_f16(uint32_t a, uint32_t b) {
  const auto part = [](uint32_t a, uint32_t b) {
    return static_cast<uint32_t>(to_f16(from_f16(static_cast<uint16_t>(a)) - from_f16(static_cast<uint16_t>(b))));
  };
  return part(a, b) | part(a >> 16, b >> 16) << 16;
}
inline int round_to_int(float value) {
  if (value != value) return 0;
  return static_cast<int>(std::nearbyint(std::fmin(std::fmax(value, -2147483648.0f), 2147483520.0f)));
}

inline float divide(float a, float b) { return a / b; }
inline float erf_of(float value) { return std::erf(value); }
inline float exp_of(float value) { return std::exp(value); }
inline float tanh_of(float value) { return std::tanh(value); }

template <class T, class Combine>
T shuffle(T value, int lane_xor, Combine combine) {
  struct Place {
    T in, out;
    int lane_xor;
  } place{value, value, lane_xor};
  meet_warp(&place, [&](void **brought) {
    for (int lane = 0; lane < 32; ++lane) {
      Place &one = *static_cast<Place *>(brought[lane]);
      one.out = combine(one.in, static_cast<Place *>(brought[lane ^ one.lane_xor])->in);
    }
  });
  return place.out;
}
inline float max_across(float value, int lane_xor) {
  return shuffle(value, lane_xor, [](float a, float b) { return std::fmax(a, b); });
}
inline int add_across(int value, int lane_xor) {
  return shuffle(value, lane_xor, [](int a, int b) { return a + b; });
}

inline void check_readable(const void *from, int bytes) {
  const char *begin = static_cast<const char *>(from);
  if (reinterpret_cast<uintptr_t>(from) % bytes) fail("a read of global memory is not aligned");
  for (const Buffer &buffer : machine().readable) {
    if (begin >= buffer.begin && begin + bytes <= buffer.begin + buffer.bytes) return;
  }
  fail("a read of global memory is outside of every buffer");
}
template <class T>
T load(const void *from) {
  check_readable(from, sizeof(T));
  T value;
  memcpy(&value, from, sizeof(T));
  return value;
}
inline uint4 load16(const void *from) { return load<uint4>(from); }
inline uint32_t load4(const void *from) { return load<uint32_t>(from); }
inline uint16_t load2(const void *from) { return load<uint16_t>(from); }
inline uint4 zero16() { return {0, 0, 0, 0}; }

template <class D>
struct Fragments {
  D *d;
  const uint32_t *a;
  uint32_t b[2];
};

/* D += A B for A 16 x K and B K x 8, whose elements are SIZE bytes, 16 / SIZE of K in a register pair of A. */
template <int SIZE, class D, class Number>
void mma(D (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Number number) {
  constexpr int EACH = 4 / SIZE, K = 8 * EACH;
  Fragments<D> mine{d, a, {b0, b1}};
  meet_warp(&mine, [&](void **brought) {
    double left[16][K], right[K][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Fragments<D> &f = *static_cast<Fragments<D> *>(brought[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < EACH; ++i) {
        for (int r = 0; r < 4; ++r) left[g + 8 * (r % 2)][EACH * t + i + K / 2 * (r / 2)] = number(f.a[r] >> (8 * SIZE * i));
        for (int r = 0; r < 2; ++r) right[EACH * t + i + K / 2 * r][g] = number(f.b[r] >> (8 * SIZE * i));
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const Fragments<D> &f = *static_cast<Fragments<D> *>(brought[lane]);
      for (int i = 0; i < 4; ++i) {
        double sum = f.d[i];
        for (int k = 0; k < K; ++k) sum += left[lane / 4 + 8 * (i / 2)][k] * right[k][lane % 4 * 2 + i % 2];
        f.d[i] = static_cast<D>(sum);
      }
    }
  });
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<2>(d, a, b0, b1, [](uint32_t bits) { return static_cast<double>(from_f16(static_cast<uint16_t>(bits))); });
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<2>(d, a, b0, b1, [](uint32_t bits) { return static_cast<double>(from_bf16(static_cast<uint16_t>(bits))); });
}
inline void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<1>(d, a, b0, b1, [](uint32_t bits) { return static_cast<double>(static_cast<int8_t>(bits)); });
}

inline uint64_t evict_first() { return 0; }

inline void start_copy(void *to, const void *from, int bytes, bool wanted) {
  if (wanted) check_readable(from, bytes);
  if (reinterpret_cast<uintptr_t>(to) % bytes) fail("a copy to shared memory is not aligned");
  memset(to, 0xFE, bytes);
  std::vector<std::vector<Copy>> &groups = self().groups;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({to, wanted ? from : nullptr, bytes, nullptr});
}
inline void copy16(void *to, const void *from, bool wanted) { start_copy(to, from, 16, wanted); }
inline void copy16_once(void *to, const void *from, uint64_t) { start_copy(to, from, 16, true); }
inline void copy8_once(void *to, const void *from, uint64_t) { start_copy(to, from, 8, true); }
inline void close_copies() {
  if (self().groups.empty()) self().groups.emplace_back();
  self().groups.emplace_back();
}
inline void arrive(const Copy &copy) {
  if (copy.from) memcpy(copy.to, copy.from, copy.bytes);
  if (!copy.from) memset(copy.to, 0, copy.bytes);
}
template <int PENDING>
void wait_copies() {
  std::vector<std::vector<Copy>> &groups = self().groups;
  while (static_cast<int>(groups.size()) - 1 > PENDING) {
    for (const Copy &copy : groups.front()) arrive(copy);
    groups.erase(groups.begin());
  }
}

/* A barrier of one arrival: the number of its phase, whether it may still arrive, and bytes that are to come. */
struct Barrier {
  uint16_t phase, open;
  int32_t bytes;
};
inline Barrier &barrier_of(uint64_t *barrier) { return *reinterpret_cast<Barrier *>(barrier); }
inline void end_phase(Barrier &barrier) {
  if (!barrier.open && barrier.bytes == 0) ++barrier.phase, barrier.open = 1;
}
inline void barrier_start(uint64_t *barrier) { barrier_of(barrier) = {0, 1, 0}; }
inline void barrier_publish() {}
inline void barrier_expect(uint64_t *barrier, int bytes) {
  if (!barrier_of(barrier).open) fail("a barrier expects bytes twice in a phase");
  barrier_of(barrier).bytes += bytes;
  barrier_of(barrier).open = 0;
  end_phase(barrier_of(barrier));
}
inline void copy_bulk(void *to, const void *from, int bytes, uint64_t *barrier, uint64_t) {
  for (int i = 0; i < bytes; i += 16) check_readable(static_cast<const char *>(from) + i, 16);
  if (reinterpret_cast<uintptr_t>(to) % 16 || bytes % 16) fail("a bulk copy is not aligned");
  memset(to, 0xFE, bytes);
  machine().bulk.push_back({to, from, bytes, barrier});
}
inline void barrier_wait(uint64_t *barrier, uint32_t parity) {
  while ((barrier_of(barrier).phase & 1u) == parity) {
    std::vector<Copy> &bulk = machine().bulk;
    if (!bulk.empty()) {  // any copy may be the next to arrive
      const size_t next = machine().random() % bulk.size();
      const Copy copy = bulk[next];
      bulk.erase(bulk.begin() + static_cast<int64_t>(next));
      arrive(copy);
      barrier_of(copy.barrier).bytes -= copy.bytes;
      end_phase(barrier_of(copy.barrier));
      ++machine().moves;
    }
    pause();
  }
}

using Kernel = void (*)();
struct Call {
  Kernel kernel;
  const int64_t *arguments;
  int count;
};
inline Call &call() {
  static Call only;
  return only;
}

template <int>
using Number = int64_t;
template <int... I>
void invoke(std::integer_sequence<int, I...>) {
  // Pointers and int32 each take one register or stack slot of 8 bytes, on x86-64 and aarch64 Linux.
  reinterpret_cast<void (*)(Number<I>...)>(call().kernel)(call().arguments[I]...);
}
template <int MOST>
void invoke_with(int count) {
  if (count == MOST) return invoke(std::make_integer_sequence<int, MOST>());
  if constexpr (MOST > 1) return invoke_with<MOST - 1>(count);
}
inline void run_thread() {
  invoke_with<32>(call().count);
  self().done = true;
  ++machine().moves;
  pause();
}

inline void run_block(int threads, int64_t shared) {
  Machine &m = machine();
  memset(m.shared, 0xFF, static_cast<size_t>(shared));
  m.bulk.clear();
  m.block = {};
  for (Meeting &warp : m.warps) warp = {};
  for (int i = 0; i < threads; ++i) {
    Thread &thread = m.threads[i];
    thread.index = i;
    thread.done = false;
    thread.groups.clear();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
  }
  for (int left = threads; left;) {
    const int start = static_cast<int>(m.random() % threads), moves = m.moves;
    left = 0;
    for (int i = 0; i < threads; ++i) {
      m.current = (start + i) % threads;
      if (m.threads[m.current].done) continue;
      swapcontext(&m.scheduler, &m.threads[m.current].context);
      if (!m.error.empty()) return;
      left += !m.threads[m.current].done;
    }
    if (left && m.moves == moves) {
      m.error = "every thread waits";
      return;
    }
  }
  if (!m.bulk.empty()) m.error = "a block ended before its copies did";
}

}  // namespace paredown

/* Run a kernel and return what went wrong, "" if nothing did. `sizes` are the grid, the threads of a block and the bytes of
 * its shared memory; `buffers` the addresses and sizes of what it may read. */
extern "C" inline __attribute__((used)) const char *emulate(void (*kernel)(), const int64_t *arguments, int count,
                                                            const int64_t *sizes, const int64_t *buffers,
                                                            int buffer_count, unsigned seed) {
  using namespace paredown;
  Machine &m = machine();
  m.error.clear();
  call() = {kernel, arguments, count};
  m.random.seed(seed);
  m.count = static_cast<int>(sizes[3]);
  if (static_cast<int>(m.threads.size()) < m.count) m.threads.resize(m.count);
  m.readable.clear();
  for (int i = 0; i < buffer_count; ++i) {
    m.readable.push_back({reinterpret_cast<const char *>(buffers[2 * i]), buffers[2 * i + 1]});
  }
  const int64_t page = sysconf(_SC_PAGESIZE), shared = (sizes[4] + 15) / 16 * 16;
  const int64_t pages = (shared + page - 1) / page * page;
  char *memory = static_cast<char *>(
      mmap(nullptr, static_cast<size_t>(pages + page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(memory + pages, static_cast<size_t>(page), PROT_NONE);
  m.shared = reinterpret_cast<unsigned char *>(memory + pages - shared);
  for (int i = 0; i < 3; ++i) m.grid[i] = static_cast<int>(sizes[i]);
  for (int z = 0; z < m.grid[2]; ++z) {
    for (int y = 0; y < m.grid[1]; ++y) {
      for (int x = 0; x < m.grid[0]; ++x) {
        m.block_index[0] = x, m.block_index[1] = y, m.block_index[2] = z;
        if (m.error.empty()) run_block(m.count, shared);
      }
    }
  }
  munmap(memory, static_cast<size_t>(pages + page));
  return m.error.c_str();
}
#endif
