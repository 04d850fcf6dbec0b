/* The kernel for few rows of x: see linear.cuh. */
#ifndef PAREDOWN_CUDA_GEMV_CUH
#define PAREDOWN_CUDA_GEMV_CUH

#include "linear.cuh"

namespace paredown {

/* Units of RB blocks of rows on their way to one warp, in a ring of shared memory that no other warp touches. */
template <int BITS, int RB>
struct Ring {
  static constexpr int SLOT = RB * UNIT_BYTES<BITS>;
  /* As many as fit in 40 KB for 8 warps: below 48 KB no kernel needs leave, and an SM holds 2 blocks or more. */
  static constexpr int FIT = 40960 / (WARPS * SLOT);
  static constexpr int STAGES = FIT > 8 ? 8 : FIT;
  static constexpr int BYTES = WARPS * STAGES * SLOT;
  static_assert(STAGES >= 2, "the next unit travels while one is multiplied");

  unsigned char *slots;
  uint64_t *barriers, policy;
  int read_slot = 0, write_slot = 0;
  uint32_t parity = 0;
  Lane lane;

  PD_DEVICE Ring(unsigned char *shared, int warp, const Lane &where) : lane(where) {
    slots = shared + warp * STAGES * SLOT;
    barriers = reinterpret_cast<uint64_t *>(shared + BYTES) + warp * STAGES;
    policy = evict_first();
#if PD_BULK
    if (lane.index == 0) {
      for (int i = 0; i < STAGES; ++i) barrier_start(barriers + i);
      barrier_publish();
    }
    sync_warp();
#endif
  }

  /* Start copying the next unit of each block, or pass. Every lane must have read what the slot held. */
  PD_DEVICE void start(const unsigned char *(&next)[RB], bool wanted) {
    unsigned char *slot = slots + write_slot * SLOT;
#if PD_BULK
    if (wanted && lane.index == 0) {
      barrier_expect(barriers + write_slot, SLOT);
#pragma unroll
      for (int rb = 0; rb < RB; ++rb) {
        copy_bulk(slot + rb * UNIT_BYTES<BITS>, next[rb], UNIT_BYTES<BITS>, barriers + write_slot, policy);
      }
    }
#else
    if (wanted) {
#pragma unroll
      for (int rb = 0; rb < RB; ++rb) copy_own<BITS>(slot + rb * UNIT_BYTES<BITS>, next[rb], lane.index, policy);
    }
    close_copies();
#endif
#pragma unroll
    for (int rb = 0; rb < RB; ++rb) next[rb] += UNIT_BYTES<BITS>;
    write_slot = write_slot + 1 == STAGES ? 0 : write_slot + 1;
  }

  /* Wait for the oldest unit that was started and return it; then its slot is the next but STAGES - 1 to be written. */
  PD_DEVICE const unsigned char *wait() {
    const unsigned char *slot = slots + read_slot * SLOT;
#if PD_BULK
    barrier_wait(barriers + read_slot, parity);
#else
    wait_copies<STAGES - 1>();
#endif
    if (++read_slot == STAGES) read_slot = 0, parity ^= 1;
    return slot;
  }
};

/* x for NT tiles, in registers, a unit at a time. */
template <class K, int NT, bool WHOLE>
struct UnitX {
  static constexpr int LOADS = 2 * K::X_BYTES, STRIDE = K::X_BYTES == 1 ? 1024 : 2 * UNIT;
  uint4 part[NT][LOADS];
  TokenScales whole[NT];
  const unsigned char *next[NT];
  int column[NT], unit;
  const Linear &p;
  const Lane &lane;

  PD_DEVICE UnitX(const Linear &linear, int first, const Lane &where) : unit(first), p(linear), lane(where) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const int token = 8 * nt + lane.g;
      const int64_t at = K::X_BYTES == 1 ? (static_cast<int64_t>(nt) * p.units + unit) * STRIDE + 16 * lane.index
                                         : static_cast<int64_t>(token) * p.x_stride * 2 + unit * STRIDE + 16 * lane.t;
      next[nt] = p.x + at;
      // Of a token that is not there every column is beyond the last.
      column[nt] = token < p.m ? (K::X_BYTES == 1 ? 0 : unit * UNIT + 8 * lane.t) : p.k;
    }
  }
  PD_DEVICE void read() {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int i = 0; i < LOADS; ++i) {
        const bool wanted = K::X_BYTES == 1 ? column[nt] == 0 : column[nt] < p.k - i * STEP;
        part[nt][i] = wanted ? load16(next[nt] + i * (K::X_BYTES == 1 ? 512 : 2 * STEP)) : zero16();
      }
      if constexpr (K::X_BYTES == 1 && WHOLE) whole[nt].read(p, unit, nt, lane);
      next[nt] += STRIDE;
      if constexpr (K::X_BYTES == 2) column[nt] += UNIT;
    }
    ++unit;
  }
  template <int SIZE>
  PD_DEVICE void operator()(int nt, int step, uint32_t (&b)[SIZE]) const {
    if constexpr (K::X_BYTES == 1) {
      const uint4 two = part[nt][step / 2];
      b[0] = step % 2 ? two.z : two.x, b[1] = step % 2 ? two.w : two.y;
    } else {
      const uint4 one = part[nt][step];
      b[0] = one.x, b[1] = one.y, b[2] = one.z, b[3] = one.w;
    }
  }
  PD_DEVICE void scales(TokenScales &tokens, int nt, int step) const {
    if constexpr (WHOLE) {
      tokens = whole[nt];
    } else {
      tokens.read(p, (UNIT_STEPS * (unit - 1) + step) >> (p.steps_per_slot >> 1), nt, lane);
    }
  }
};

/* The sums of one warp over its units. */
template <class K, int BITS, int RB, int NT, bool WHOLE>
PD_DEVICE void sum_units(const Linear &p, Total<RB, NT> &total, Ring<BITS, RB> &ring, const unsigned char *(&next)[RB],
                         const int (&block)[RB], int first, int last, const Lane &lane) {
  // Blocks of 32 rows are chosen only where both halves have the same table.
  typename K::template Table<BITS> table;
  read_table(table, p, block[0]);
  UnitX<K, NT, WHOLE> x(p, first, lane);
  Slots<WHOLE> lower(p, block[0], first, lane), upper(p, block[RB - 1], first, lane);
#pragma unroll 1
  for (int unit = first; unit < last; ++unit) {
    sync_warp();
    ring.start(next, unit + Ring<BITS, RB>::STAGES - 1 < last);
    x.read();
    RowScales whole[RB];
    if constexpr (WHOLE) {
#pragma unroll
      for (int rb = 0; rb < RB; ++rb) whole[rb] = (rb ? upper : lower).read(p, 0);
    }
    const unsigned char *arrived = ring.wait();
#pragma unroll
    for (int rb = 0; rb < RB; ++rb) {
      Words<BITS> words;
      words.read(arrived + rb * UNIT_BYTES<BITS>, lane.index);
      multiply<K, BITS, NT, WHOLE>(p, total.sum[rb], words, table, x, whole[rb], rb ? upper : lower);
    }
    lower.next(p);
    if constexpr (RB > 1) upper.next(p);
  }
}

template <class K, int BITS, int RB, int NT>
PD_DEVICE void run_gemv(const Linear &p, const Output &out) {
  static_assert(RB <= 2, "`sum_units` walks through two blocks");
  constexpr int ROWS = RB * BLOCK_ROWS, TOKENS = NT * 8;
  const int warp = warp_index(), first_row = block_index_x() * ROWS;
  const Lane lane(thread_index());
  const int first = static_cast<int>(static_cast<int64_t>(p.units) * warp / WARPS);
  const int last = static_cast<int>(static_cast<int64_t>(p.units) * (warp + 1) / WARPS);

  // A last block without its second half reads the first one twice, and writes it once.
  int block[RB];
  const unsigned char *next[RB];
#pragma unroll
  for (int rb = 0; rb < RB; ++rb) {
    const int at = block_index_x() * RB + rb;
    block[rb] = at * BLOCK_ROWS < p.n ? at : at - 1;
    next[rb] = p.codes + (static_cast<int64_t>(block[rb]) * p.units + first) * UNIT_BYTES<BITS>;
  }
  Ring<BITS, RB> ring(shared_memory(), warp, lane);
#pragma unroll
  for (int i = 0; i < Ring<BITS, RB>::STAGES - 1; ++i) ring.start(next, first + i < last);

  Total<RB, NT> total;
  if (p.steps_per_slot == UNIT_STEPS && p.scale_type == PD_F16) {
    sum_units<K, BITS, RB, NT, true>(p, total, ring, next, block, first, last, lane);
  } else {
    sum_units<K, BITS, RB, NT, false>(p, total, ring, next, block, first, last, lane);
  }
  scale_by_unit(p, total);
  add_low_rank(p, total, first_row, 0, warp, WARPS, lane);

  float *sums = reinterpret_cast<float *>(shared_memory());
  sync_threads();  // the rings are read out, and their memory is free
  spread<ROWS>(sums + warp * TOKENS * (ROWS + 4), total, 0, lane);
  sync_threads();
  write_sums<ROWS, TOKENS, WARPS>(sums, p, out, first_row, 0);
}

}  // namespace paredown
#endif
