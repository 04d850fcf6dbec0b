/* The instructions that the kernels are written in, each with its PTX. No header of CUDA is needed (NVRTC has none).
 *
 * Halves travel as pairs in 32-bit words. tests/kernels/emulated.h has the same names for a warp of 32 coroutines, so
 * that g++ compiles the kernels too and their whole arithmetic of indices is tested without a GPU.
 */
#ifndef PAREDOWN_CUDA_INTRINSICS_CUH
#define PAREDOWN_CUDA_INTRINSICS_CUH

#if defined(PAREDOWN_EMULATED)
#include "emulated.h"
#else

#if defined(__CUDACC_RTC__)
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

#define PD_DEVICE __device__ __forceinline__
#define PD_KERNEL extern "C" __global__ void
#define PD_THREADS(count, blocks) __launch_bounds__(count, blocks)
/* Bulk copies with an mbarrier, which Hopper and its successors have. */
#if __CUDA_ARCH__ >= 900
#define PD_BULK 1
#else
#define PD_BULK 0
#endif

namespace paredown {

PD_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
PD_DEVICE int block_index_x() { return static_cast<int>(blockIdx.x); }
PD_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }
PD_DEVICE int block_index_z() { return static_cast<int>(blockIdx.z); }
PD_DEVICE int grid_size_z() { return static_cast<int>(gridDim.z); }
/* The same in all lanes, which the shuffle tells the compiler: loops of a warp then need no care for divergence. */
PD_DEVICE int warp_index() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0); }
PD_DEVICE void sync_threads() { __syncthreads(); }
PD_DEVICE void sync_warp() { __syncwarp(); }

/* The dynamic shared memory of the block. */
PD_DEVICE unsigned char *shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}
PD_DEVICE uint32_t shared_address(const void *pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

PD_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
PD_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

/* PRMT without the mask that __byte_perm adds to the selector: its nibbles must be below 8. */
PD_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
  return out;
}

/* Two halves a - b. */
PD_DEVICE uint32_t subtract_f16(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}

PD_DEVICE float from_f16(uint16_t half) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(half));
  return out;
}
PD_DEVICE float from_bf16(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }
PD_DEVICE uint16_t to_f16(float value) {
  uint16_t out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
}
PD_DEVICE uint16_t to_bf16(float value) {
  uint16_t out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
}
/* The nearest integer, half to even, within int32. */
PD_DEVICE int round_to_int(float value) { return __float2int_rn(value); }

/* a / b within 2 units in the last place, without the call that the exact quotient takes. */
PD_DEVICE float divide(float a, float b) {
  float out;
  asm("div.full.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}
PD_DEVICE float erf_of(float value) { return erff(value); }
PD_DEVICE float exp_of(float value) { return expf(value); }
PD_DEVICE float tanh_of(float value) { return tanhf(value); }

PD_DEVICE float max_across(float value, int lane_xor) { return fmaxf(value, __shfl_xor_sync(~0u, value, lane_xor)); }
PD_DEVICE int add_across(int value, int lane_xor) { return value + __shfl_xor_sync(~0u, value, lane_xor); }

/* 16 bytes that no kernel writes meanwhile. */
PD_DEVICE uint4 load16(const void *pointer) { return __ldg(static_cast<const uint4 *>(pointer)); }
PD_DEVICE uint32_t load4(const void *pointer) { return __ldg(static_cast<const uint32_t *>(pointer)); }
PD_DEVICE uint16_t load2(const void *pointer) { return __ldg(static_cast<const uint16_t *>(pointer)); }
PD_DEVICE uint4 zero16() { return make_uint4(0, 0, 0, 0); }

/* D += A B of a warp, 16 x 16 x 8 halves: A = rows g, g + 8 of inputs 2 t ..; then of inputs 2 t + 8 .. */
PD_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
PD_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/* D += A B of a warp, 16 x 32 x 8 signed bytes. */
PD_DEVICE void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Weights are read once: they leave L2 first, so that x stays. */
PD_DEVICE uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

/* Start copying 16 bytes to shared memory, or zeros where they are not wanted; nothing is read then. */
PD_DEVICE void copy16(void *shared, const void *global, bool wanted) {
  const int bytes = wanted ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
PD_DEVICE void copy16_once(void *shared, const void *global, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "l"(policy)
               : "memory");
}
PD_DEVICE void copy8_once(void *shared, const void *global, uint64_t policy) {
  asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], 8, %2;" ::"r"(shared_address(shared)),
               "l"(global), "l"(policy)
               : "memory");
}
/* Copies since the last call are one group. */
PD_DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Wait until all but the newest PENDING groups of this thread have arrived. */
template <int PENDING>
PD_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#if PD_BULK
/* One arrival, by the lane that starts the copy, completes a phase together with the bytes that it announces. */
PD_DEVICE void barrier_start(uint64_t *barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
/* Make barriers that were just started visible to the copy engine. */
PD_DEVICE void barrier_publish() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
/* Arrive, and let the phase end when so many bytes have come too. */
PD_DEVICE void barrier_expect(uint64_t *barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
/* PTX 8.6 can say that the copy stays in this block, which for sm_120 spares a call; CUDA 12.6 has PTX 8.5. */
#if __CUDA_ARCH__ >= 1000
#define PD_BULK_TO "cp.async.bulk.shared::cta.global"
#else
#define PD_BULK_TO "cp.async.bulk.shared::cluster.global"
#endif
PD_DEVICE void copy_bulk(void *shared, const void *global, int bytes, uint64_t *barrier, uint64_t policy) {
  asm volatile(PD_BULK_TO ".mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
               : "memory");
}
PD_DEVICE void barrier_wait(uint64_t *barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
#endif

}  // namespace paredown
#endif
#endif
