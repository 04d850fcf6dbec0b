/* The kernel for many rows of x: see linear.cuh. */
#ifndef PAREDOWN_CUDA_TILE_CUH
#define PAREDOWN_CUDA_TILE_CUH

#include "linear.cuh"

namespace paredown {

/* One unit of inputs in shared memory: x of NT x 8 tokens, then the weights of the 8 warps. */
template <class K, int BITS, int NT>
struct Stage {
  static constexpr int X = NT * 8 * UNIT * K::X_BYTES, BYTES = X + WARPS * UNIT_BYTES<BITS>;
  /* 3 stages of halves and 4 bits, 64 tokens: 72 KB, which every GPU has, and most twice. */
  static constexpr int COUNT = 3;
};

/* Where the 8 halves of a token in a chunk of 16 bytes lie. Rows are 256 bytes, which would put tokens g and g + 1 in
 * the same banks: in odd rows the halves of 128 bytes change places. */
PD_DEVICE int place_of_halves(int token, int chunk) { return token * 256 + ((chunk ^ ((token & 1) << 2)) * 16); }

/* Copies x of a unit, then of the next: a thread has the same 16 bytes of every so manyth token (halves) or tile (bytes). */
template <class K, int NT>
struct XCopy {
  static constexpr int COUNT = NT * 8 * UNIT * K::X_BYTES / (16 * THREADS), APART = K::X_BYTES == 1 ? 4 : 16;
  const unsigned char *next;
  int64_t apart;
  int to, row, rows, column;

  PD_DEVICE XCopy(const Linear &p, int first, int first_token) {
    const int thread = thread_index();
    if constexpr (K::X_BYTES == 1) {
      row = first_token / 8 + thread / 64, rows = (p.m + 7) / 8, column = 0;
      next = p.x + (static_cast<int64_t>(row) * p.units + first) * 1024 + thread % 64 * 16;
      apart = static_cast<int64_t>(APART) * p.units * 1024, to = thread * 16;
    } else {
      row = first_token + thread / 16, rows = p.m, column = first * UNIT + thread % 16 * 8;
      next = p.x + (static_cast<int64_t>(row) * p.x_stride + column) * 2;
      apart = static_cast<int64_t>(APART) * p.x_stride * 2, to = place_of_halves(thread / 16, thread % 16);
    }
  }
  PD_DEVICE void start(const Linear &p, unsigned char *stage) {
    const bool inside = column < p.k;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      copy16(stage + to + i * 16 * THREADS, next + i * apart, inside && row + i * APART < rows);
    }
    next += K::X_BYTES == 1 ? 1024 : 2 * UNIT;
    if constexpr (K::X_BYTES == 2) column += UNIT;
  }
};

/* x of a unit where `Stage` put it. */
template <class K, bool WHOLE>
struct StagedX {
  const unsigned char *stage;
  const Linear &p;
  const Lane &lane;
  int unit, first_tile;

  template <int SIZE>
  PD_DEVICE void operator()(int nt, int step, uint32_t (&b)[SIZE]) const {
    if constexpr (K::X_BYTES == 1) {
      const uint2 half =
          *reinterpret_cast<const uint2 *>(stage + nt * 1024 + step / 2 * 512 + lane.index * 16 + step % 2 * 8);
      b[0] = half.x, b[1] = half.y;
    } else {
      const int token = nt * 8 + lane.g;
      const uint4 one = *reinterpret_cast<const uint4 *>(stage + place_of_halves(token, 4 * step + lane.t));
      b[0] = one.x, b[1] = one.y, b[2] = one.z, b[3] = one.w;
    }
  }
  PD_DEVICE void scales(TokenScales &tokens, int nt, int step) const {
    const int slot = WHOLE ? unit : (UNIT_STEPS * unit + step) >> (p.steps_per_slot >> 1);
    tokens.read(p, slot, first_tile + nt, lane);
  }
};

/* The sums of one warp over units `first` to `last`; all warps of the block come along. */
template <class K, int BITS, int NT, bool WHOLE>
PD_DEVICE void sum_stages(const Linear &p, Total<1, NT> &total, unsigned char *stages, int block, int first, int last,
                          int first_token, const Lane &lane) {
  using Stage = Stage<K, BITS, NT>;
  const int own = Stage::X + warp_index() * UNIT_BYTES<BITS>;
  const unsigned char *codes = p.codes + (static_cast<int64_t>(block) * p.units + first) * UNIT_BYTES<BITS>;
  const uint64_t policy = evict_first();
  XCopy<K, NT> x_copy(p, first, first_token);
  const auto start = [&](int slot) {
    x_copy.start(p, stages + slot * Stage::BYTES);
    copy_own<BITS>(stages + slot * Stage::BYTES + own, codes, lane.index, policy);
    codes += UNIT_BYTES<BITS>;
  };
#pragma unroll
  for (int i = 0; i < Stage::COUNT - 1; ++i) {
    if (first + i < last) start(i);
    close_copies();
  }

  typename K::template Table<BITS> table;
  read_table(table, p, block);
  Slots<WHOLE> slots(p, block, first, lane);
  int read = 0, write = Stage::COUNT - 1;
#pragma unroll 1
  for (int unit = first; unit < last; ++unit, slots.next(p)) {
    RowScales whole;
    if constexpr (WHOLE) whole = slots.read(p, 0);
    wait_copies<Stage::COUNT - 2>();
    sync_threads();  // all copies of this unit are here, and nobody reads the stage that is written next
    if (unit + Stage::COUNT - 1 < last) start(write);
    close_copies();
    const unsigned char *stage = stages + read * Stage::BYTES;
    Words<BITS> words;
    words.read(stage + own, lane.index);
    const StagedX<K, WHOLE> x{stage, p, lane, unit, first_token / 8};
    multiply<K, BITS, NT, WHOLE>(p, total.sum[0], words, table, x, whole, slots);
    read = read + 1 == Stage::COUNT ? 0 : read + 1;
    write = write + 1 == Stage::COUNT ? 0 : write + 1;
  }
}

template <class K, int BITS, int NT>
PD_DEVICE void run_tile(const Linear &p, const Output &out) {
  constexpr int ROWS = WARPS * BLOCK_ROWS, TOKENS = NT * 8;
  const int warp = warp_index(), first_row = block_index_x() * ROWS, first_token = block_index_y() * TOKENS;
  const Lane lane(thread_index());
  const int part = block_index_z(), parts = grid_size_z();
  const int first = p.units * part / parts, last = p.units * (part + 1) / parts;
  unsigned char *stages = shared_memory();

  // Warps beyond the last row do the last block again and write nothing: all must meet at the barriers.
  const int blocks = (p.n + BLOCK_ROWS - 1) / BLOCK_ROWS, at = block_index_x() * WARPS + warp;
  const int block = at < blocks ? at : blocks - 1;
  Total<1, NT> total;
  if (p.steps_per_slot == UNIT_STEPS && p.scale_type == PD_F16) {
    sum_stages<K, BITS, NT, true>(p, total, stages, block, first, last, first_token, lane);
  } else {
    sum_stages<K, BITS, NT, false>(p, total, stages, block, first, last, first_token, lane);
  }
  scale_by_unit(p, total);
  if (part == 0) add_low_rank(p, total, block * BLOCK_ROWS, first_token, 0, 1, lane);

  float *sums = reinterpret_cast<float *>(stages);
  sync_threads();  // the stages are read out, and their memory is free
  spread<ROWS>(sums, total, warp * BLOCK_ROWS, lane);
  sync_threads();
  write_sums<ROWS, TOKENS, 1>(sums, p, out, first_row, first_token);
}

}  // namespace paredown
#endif
