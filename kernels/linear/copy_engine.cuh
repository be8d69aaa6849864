// Hopper's bulk tensor copies and the barriers they complete on (PTX ISA, cp.async.bulk.tensor).
#pragma once

#include <cuda.h>

#include "../common.cuh"

namespace lorafleet {

// 2-byte elements in boxes of `box`, as `swizzled` has rows of 128 bytes; the first dimension lies
// side by side, the others `strides` bytes apart. What a box covers outside of `sizes` reads as 0.
template <int kDims>
int describe_boxes(CUtensorMap* map, bool is_half, const void* matrix,
                   const cuuint64_t (&sizes)[kDims], const cuuint64_t (&strides)[kDims - 1],
                   const cuuint32_t (&box)[kDims]) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                     &status);
    return reinterpret_cast<Encode>(found);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  cuuint32_t steps[kDims];
  for (cuuint32_t& step : steps) step = 1;
  const CUresult result = encode(
      map, is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kDims,
      const_cast<void*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// A row-major matrix as boxes of 64 columns by `box_rows`.
inline int describe_matrix(CUtensorMap* map, bool is_half, const void* matrix, uint64_t rows,
                           uint64_t columns, uint32_t box_rows) {
  return describe_boxes<2>(map, is_half, matrix, {columns, rows}, {2 * columns}, {64, box_rows});
}

// The same, its rows cut into `parts` of equal length; a box has eight rows of each part in turn.
// Coordinates: column, 0, 0, then the row in its part over eight.
inline int describe_parts(CUtensorMap* map, bool is_half, const void* matrix, uint64_t rows,
                          uint64_t columns, uint32_t box_rows, uint32_t parts) {
  return describe_boxes<4>(map, is_half, matrix, {columns, 8, parts, rows / parts / 8},
                           {2 * columns, 2 * columns * (rows / parts), 16 * columns},
                           {64, 8, parts, box_rows / parts / 8});
}

#if __CUDA_ARCH__ >= 900
__device__ inline void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}

// Makes initialized barriers visible to the copy engine; the block synchronizes afterwards.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Returns once the phase of this parity is complete; a new barrier counts as past parity 1.
__device__ inline void wait(uint64_t* barrier, int parity) {
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

// Weights are read once a step (evict first), activations by every block (evict last).
constexpr uint64_t kEvictFirst = 0x12f0000000000000, kEvictLast = 0x14f0000000000000;

__device__ inline void copy_box(void* to, const CUtensorMap* map, int column, int row,
                                uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// Of a matrix in parts.
__device__ inline void copy_parts(void* to, const CUtensorMap* map, int column, int eights,
                                  uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %3, %4}], [%5], %6;" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(0), "r"(eights), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
#endif

}  // namespace lorafleet
