// What the kernels need of the device beneath the language: launching, barriers, shared memory, tensor-core products.
// Two backends of one interface: CUDA, and the emulation of tests/cuda_emulation, which runs the same kernels on the
// CPU. Torch-free.
//
// Barriers are numbered, so that the emulation can leave one out and a test can show that it would be missed.
#pragma once

#include "../sequence.h"

namespace rnnfast {
inline namespace RNNFAST_ISA {

// How a kernel runs. `barriers`: it uses some (for the emulation, which runs threads one after the other where none
// waits for another). cooperative: all blocks must run at once.
struct Launch {
  int64_t blocks;
  int threads;
  void* stream;
  int64_t shared_bytes = 0;
  bool barriers = false;
  bool cooperative = false;
};

}  // namespace RNNFAST_ISA
}  // namespace rnnfast

#ifdef __CUDACC__

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#define RNNFAST_FUNCTION __device__ __forceinline__
#define RNNFAST_KERNEL __global__

namespace rnnfast {
inline namespace RNNFAST_ISA {

RNNFAST_FUNCTION float half_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
RNNFAST_FUNCTION uint16_t float_to_half(float x) {
  return __half_as_ushort(__float2half_rn(x));
}
RNNFAST_FUNCTION float bits_to_float(uint32_t bits) {
  return __uint_as_float(bits);
}
RNNFAST_FUNCTION uint32_t float_to_bits(float x) {
  return __float_as_uint(x);
}
// The nearest number that a tf32 product sees, as bits of a float.
RNNFAST_FUNCTION uint32_t float_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// 1 / x to a unit in the last place, zero past 2^126.
RNNFAST_FUNCTION float reciprocal(float x) {
  return __fdividef(1.0f, x);
}

// The dynamic shared memory of the block, aligned to 16 bytes.
RNNFAST_FUNCTION char* shared_memory() {
  extern __shared__ int4 memory[];
  return reinterpret_cast<char*>(memory);
}
RNNFAST_FUNCTION int thread_index() {
  return static_cast<int>(threadIdx.x);
}
RNNFAST_FUNCTION int block_threads() {
  return static_cast<int>(blockDim.x);
}
RNNFAST_FUNCTION int64_t block_index() {
  return blockIdx.x;
}
RNNFAST_FUNCTION int64_t global_thread() {
  return int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
}
using Piece = uint4;  // 16 bytes

// What blocks that run at once tell each other through global memory. A number is there as soon as it is seen: the
// place was empty before, all bits ones.
RNNFAST_FUNCTION Piece load_published(const Piece* p) {
  Piece x;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p)
               : "memory");
  return x;
}
RNNFAST_FUNCTION uint32_t load_published(const uint32_t* p) {
  uint32_t x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
RNNFAST_FUNCTION void store_published(uint16_t* p, uint16_t x) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(p), "h"(x) : "memory");
}
RNNFAST_FUNCTION void store_published(uint32_t* p, uint32_t x) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
// Before any load or store that follows, other blocks see every store that came before.
RNNFAST_FUNCTION void publication_fence() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}
RNNFAST_FUNCTION void look_again() {}
// After a loop that lanes leave at different times.
RNNFAST_FUNCTION void rejoin_warp() {
  __syncwarp();
}

template <int kNumber>
RNNFAST_FUNCTION void block_barrier() {
  __syncthreads();
}
template <int kNumber>
RNNFAST_FUNCTION void warp_barrier() {
  __syncwarp();
}

// D += A B of 16 x kDepth and kDepth x 8 on the tensor cores, one tile per warp. A lane's registers, with g = lane / 4
// and q = lane % 4: a[0], a[2] are of row g, a[1], a[3] of row g + 8; b of column g; d[0], d[1] of row g, columns 2q
// and 2q + 1, d[2], d[3] of row g + 8. Which k a register holds is the caller's choice, the same for A and B.
template <typename E>
RNNFAST_FUNCTION void tile_product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define RNNFAST_TILE_PRODUCT(E, shape_and_types)                                                               \
  template <>                                                                                                  \
  RNNFAST_FUNCTION void tile_product<E>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {       \
    asm("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                   \
  }
RNNFAST_TILE_PRODUCT(Half, "m16n8k16.row.col.f32.f16.f16.f32")
RNNFAST_TILE_PRODUCT(BFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
RNNFAST_TILE_PRODUCT(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef RNNFAST_TILE_PRODUCT

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("rnnfast: ") + what + ": " + cudaGetErrorString(error));
}

template <typename Params>
void launch(const Launch& how, void (*kernel)(Params), const Params& params) {
  if (how.blocks == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  config.stream = static_cast<cudaStream_t>(how.stream);
  cudaLaunchAttribute attributes[1];
  config.attrs = attributes;
  if (how.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (how.shared_bytes > 48 * 1024)
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared_bytes)),
        "shared memory");
  check_cuda(cudaLaunchKernelEx(&config, kernel, params), "launch");
}

inline void fill_zero(void* memory, int64_t bytes, void* stream) {
  if (bytes > 0)
    check_cuda(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)), "memset");
}

}  // namespace RNNFAST_ISA
}  // namespace rnnfast

#else

#include "emulation.h"

#endif
