/* One kernel for every number of rows of x, for plugins that embed a single kernel into an engine (board/plugin_aot.py).
 *
 * It takes the arguments of the linear kernels (../cuda/launch.py). The grid is that of gemv_r16 for W and of tile_*_m32
 * for x: tile_* needs an eighth of the blocks, and the others leave at once. x has to be readable in place, and nothing
 * is cut into parts. Compiled with PAREDOWN_KIND (KindF16), PAREDOWN_NAME (f16) and PAREDOWN_BITS (4).
 */
#include "../cuda/linear.cuh"

#define PD_JOINED(name, bits) paredown_bucket_##name##_b##bits
#define PD_NAME(name, bits) PD_JOINED(name, bits)

PD_KERNEL PD_THREADS(256, 2) PD_NAME(PAREDOWN_NAME, PAREDOWN_BITS)(PD_LINEAR_PARAMETERS) {
  PD_LINEAR_VALUES;
  if (m <= 8) {
    paredown::run_gemv<paredown::PAREDOWN_KIND, PAREDOWN_BITS, 1, 1>(linear, output);
  } else if (m <= 16) {
    paredown::run_gemv<paredown::PAREDOWN_KIND, PAREDOWN_BITS, 1, 2>(linear, output);
  } else if (static_cast<int>(paredown::block_index_x()) * paredown::WARPS * paredown::BLOCK_ROWS < n) {
    paredown::run_tile<paredown::PAREDOWN_KIND, PAREDOWN_BITS, 4>(linear, output);
  }
}
