/* The C interface of the CPU kernels: y = act(x W^T + low rank + bias) with W stored as codes into a table.
 *
 *   W[r, c] = (table[r / table_rows][code[r, c]] - zero) * unit * scale[r, c / group]
 *
 * Layout "c16" (made by kernels/layout.py; `group` 0 = all k inputs are one group, and one scale per row):
 *
 *   codes   for each block of 16 rows, for each group, for each step of 32 inputs (a group's last step is filled up with
 *           code 0, and so are the rows of the last block): `bits` units of 64 bytes. A unit is one 32-bit little-endian
 *           word for each of the 16 rows, of one plane of w bits (w = 8, 4, 2 or 1; 3 bits = a plane of 2 and one of 1,
 *           5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1). Units of the widest plane come first and hold the lowest bits of the
 *           codes. A word of a plane of w bits covers 32/w consecutive inputs: input 4 f + b in bits 8 b + w f upwards,
 *           so that shifting a unit right by w f leaves four neighbouring inputs of a row in the low bits of its bytes.
 *   table   [blocks of table_rows rows][2^bits], uint8 or float16; table_rows is 0 (one table) or a multiple of 16
 *   scale   [blocks of 16 rows][groups][16], float16, bfloat16 or float32
 *
 * Exact mode accumulates in float32. Int8 mode rounds the inputs of each row of x to signed bytes, in runs of up to 128
 * inputs within each group: s = max |x| / 127, q = rint(x * (127 / max |x|)), all in float32, half to even; a run whose
 * largest |x| is so small that 127 / max |x| overflows counts as zeros, with s = 0. It needs a uint8 table and a whole
 * `zero` in 0..255, and sums are exact in int32 within a run, so every instruction set gives the same sums. A row with
 * an infinite or undefined input gives undefined outputs.
 *
 * Nothing here allocates, throws or keeps state but the choice of instruction set and, where no `parallel` is given, a
 * pool of threads that starts on first use with threads > 1.
 */
#ifndef PAREDOWN_H
#define PAREDOWN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define PAREDOWN_API __declspec(dllexport)
#else
#define PAREDOWN_API __attribute__((visibility("default")))
#endif

enum { PAREDOWN_ABI = 1 };

typedef enum { PAREDOWN_U8 = 0, PAREDOWN_F16 = 1, PAREDOWN_BF16 = 2, PAREDOWN_F32 = 3 } paredown_type;
typedef enum { PAREDOWN_EXACT = 0, PAREDOWN_INT8 = 1 } paredown_mode;
typedef enum {
  PAREDOWN_NONE = 0,
  PAREDOWN_RELU = 1,
  PAREDOWN_GELU = 2,      /* x (1 + erf(x / sqrt 2)) / 2 */
  PAREDOWN_GELU_TANH = 3, /* its tanh approximation */
  PAREDOWN_SILU = 4
} paredown_activation;

/* 0 is success; paredown_message tells what any other status means. */
typedef enum {
  PAREDOWN_OK = 0,
  PAREDOWN_BAD_WEIGHT = 1, /* sizes, bits, group, table or scale that the layout does not allow */
  PAREDOWN_BAD_CALL = 2,   /* types, strides or counts of x and y; scratch too small */
  PAREDOWN_NO_ISA = 3      /* this instruction set was not built in, or the processor has it not */
} paredown_status;

typedef struct {
  int64_t n, k;
  int64_t group, table_rows;
  int32_t bits;       /* 1 to 8 */
  int32_t table_type; /* PAREDOWN_U8 or PAREDOWN_F16 */
  int32_t scale_type; /* PAREDOWN_F16, PAREDOWN_BF16 or PAREDOWN_F32 */
  float zero, unit;
  const void *codes, *table, *scale;
} paredown_weight;

/* Run task(argument, i) for each i below count, in any order and on any threads, and return when all are done. */
typedef void (*paredown_task)(void *argument, size_t i);
typedef void (*paredown_parallel)(void *context, paredown_task task, void *argument, size_t count);

typedef struct {
  const paredown_weight *weight;
  const void *x; /* m rows of weight->k, x_stride elements apart */
  void *y;       /* m rows of weight->n, y_stride elements apart */
  int64_t m, x_stride, y_stride;
  int32_t type; /* of x, y, bias and low_x: PAREDOWN_F32, PAREDOWN_F16 or PAREDOWN_BF16 */
  int32_t mode, activation;
  const void *bias; /* n values, or null */
  /* The low-rank term: its left factor (n, r), a weight of this layout, on low_x (m, r). Always exact. Or both null. */
  const paredown_weight *low;
  const void *low_x;
  int64_t low_stride;
  void *scratch; /* paredown_scratch bytes, aligned to 64 */
  size_t scratch_bytes;
  int32_t threads; /* how many run at once: decides how the work is cut */
  paredown_parallel parallel;
  void *parallel_context;
} paredown_linear;

PAREDOWN_API int32_t paredown_abi(void);
PAREDOWN_API const char *paredown_message(int32_t status);

/* Bytes that `codes` (or `scale`) of a weight take in this layout; 0 where the sizes are no weight. */
PAREDOWN_API size_t paredown_codes_bytes(const paredown_weight *weight);
PAREDOWN_API size_t paredown_scale_count(const paredown_weight *weight);

/* Bytes of scratch that a call needs. */
PAREDOWN_API size_t paredown_scratch(const paredown_linear *call);
PAREDOWN_API int32_t paredown_run_linear(const paredown_linear *call);

/* A convolution of one group in int8 mode: y[b, o, i, j] = act(sum over c, u, v of W[o, (u, v, c)] x[b, c, i s + u d - p, ...]
 * + bias[o]). Its weight is a matrix (n, kernel[0] * kernel[1] * C) with one scale per row (group 0), C the channels filled
 * up to a multiple of 4, and inputs in the order (row of the kernel, column, channel). The inputs of an image are
 * rounded as one run: s = max |x[b]| / 127. Outside of an image x is 0. Sums are exact in int32: k is at most 65536. */
typedef struct {
  const paredown_weight *weight;
  const void *x; /* [batch][channels][height][width] */
  void *y;       /* [batch][n][outputs][outputs] */
  int64_t batch, channels, height, width;
  int64_t kernel[2], stride[2], dilation[2];
  int64_t pad[4];           /* top, left, bottom, right */
  int32_t type, activation; /* PAREDOWN_NONE or PAREDOWN_RELU */
  const void *bias;         /* n values, or null */
  void *scratch;            /* paredown_conv_scratch bytes, aligned to 64 */
  size_t scratch_bytes;
  int32_t threads;
  paredown_parallel parallel;
  void *parallel_context;
} paredown_conv;

/* Outputs along an axis (0: rows, 1: columns); 0 or less where there are none. */
PAREDOWN_API int64_t paredown_conv_outputs(const paredown_conv *call, int32_t axis);
PAREDOWN_API size_t paredown_conv_scratch(const paredown_conv *call);
PAREDOWN_API int32_t paredown_run_conv(const paredown_conv *call);

/* Decode rows of W: y[i, :] = W[rows[i], :] in `type`, computed in float32 and rounded once. */
PAREDOWN_API int32_t paredown_gather(const paredown_weight *weight, const int64_t *rows, int64_t count, void *y,
                                     int32_t type);

/* Read `bytes` bytes (whole 256 of each thread's part) as fast as the machine can, for benchmarks; returns their parity,
 * so that nothing is left out. */
PAREDOWN_API uint64_t paredown_read(const void *data, size_t bytes, int32_t threads);

/* For benchmarks: round x once, then multiply by the weight `times` times. On a weight that stays in the
 * first cache it shows what the instructions of the kernel take, whatever the memory. */
PAREDOWN_API int32_t paredown_repeat_linear(const paredown_linear *call, int64_t times);
/* For benchmarks, on this thread: products of two bytes, at least `count`, as fast as the instruction set in use
 * multiplies them, with operands in registers and nothing decoded; returns how many there were. */
PAREDOWN_API int64_t paredown_multiply_bytes(int64_t count);

/* Instruction sets, best first, as names separated by commas: those built in that this processor runs. */
PAREDOWN_API const char *paredown_isas(void);
PAREDOWN_API const char *paredown_isa(void);
/* Use one of them from now on (for tests and benchmarks). */
PAREDOWN_API int32_t paredown_use_isa(const char *name);

#ifdef __cplusplus
}
#endif
#endif
