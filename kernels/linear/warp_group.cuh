// Hopper's products of a warp group (four warps) from shared memory (PTX ISA, wgmma).
#pragma once

#include "../common.cuh"

#include <type_traits>

namespace lorafleet {

#if __CUDA_ARCH_FEAT_SM90_ALL
// A tile of rows of 64 2-byte elements as `swizzled` has them, on a boundary of 1024 bytes: eights
// of rows lie 1024 bytes apart, the swizzle is that of 128 bytes.
__device__ inline uint64_t describe_tile(const unsigned char* tile) {
  return uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 16 |
         (shared_address(tile) & 0x3ffff) / 16;
}

constexpr int kStep = 32 / 16;  // from one 16 columns of a described tile to the next

// What lies between `begin_products` and `end_products` may run at once; then the sums are whole.
template <int kHeld>
__device__ void hold(float (&sums)[kHeld]) {
#pragma unroll
  for (float& sum : sums) asm volatile("" : "+f"(sum)::"memory");
}

template <int kHeld>
__device__ void begin_products(float (&sums)[kHeld]) {
  hold(sums);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

template <int kHeld>
__device__ void end_products(float (&sums)[kHeld]) {
  asm volatile(
      "wgmma.commit_group.sync.aligned;\n"
      "wgmma.wait_group.sync.aligned 0;" ::: "memory");
  hold(sums);
}

// D[64 x 2 kHeld] += A[64 x 16] * B[2 kHeld x 16]^T; each warp holds 16 rows, as `mma`s would.
#define LORAFLEET_PRODUCT(N, TYPE, SUMS, A, B, ONE, ...)                                   \
  asm volatile(                                                                            \
      "{ .reg .pred adds; setp.ne.b32 adds, " ONE ", 0;\n"                                 \
      "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" SUMS "}, " A ", " B \
      ", adds, 1, 1, 0, 0; }"                                                              \
      : __VA_ARGS__                                                                        \
      : "l"(a), "l"(b), "r"(1))
#define LORAFLEET_FOUR(I) "+f"(d[I]), "+f"(d[I + 1]), "+f"(d[I + 2]), "+f"(d[I + 3])
#define LORAFLEET_EIGHT(I) LORAFLEET_FOUR(I), LORAFLEET_FOUR(I + 4)
#define LORAFLEET_NAMES_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define LORAFLEET_NAMES_16 LORAFLEET_NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LORAFLEET_NAMES_32 \
  LORAFLEET_NAMES_16       \
  ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LORAFLEET_PRODUCTS(TYPE)                                                                  \
  if constexpr (kHeld == 8)                                                                       \
    LORAFLEET_PRODUCT("16", TYPE, LORAFLEET_NAMES_8, "%8", "%9", "%10", LORAFLEET_EIGHT(0));       \
  if constexpr (kHeld == 16)                                                                      \
    LORAFLEET_PRODUCT("32", TYPE, LORAFLEET_NAMES_16, "%16", "%17", "%18", LORAFLEET_EIGHT(0),     \
                      LORAFLEET_EIGHT(8));                                                        \
  if constexpr (kHeld == 32)                                                                      \
    LORAFLEET_PRODUCT("64", TYPE, LORAFLEET_NAMES_32, "%32", "%33", "%34", LORAFLEET_EIGHT(0),     \
                      LORAFLEET_EIGHT(8), LORAFLEET_EIGHT(16), LORAFLEET_EIGHT(24))

template <typename T, int kHeld>
__device__ void multiply_tile(float (&d)[kHeld], uint64_t a, uint64_t b) {
  static_assert(kHeld == 8 || kHeld == 16 || kHeld == 32);
  if constexpr (std::is_same_v<T, __half>) {
    LORAFLEET_PRODUCTS("f16");
  } else {
    LORAFLEET_PRODUCTS("bf16");
  }
}
#undef LORAFLEET_PRODUCTS
#undef LORAFLEET_NAMES_32
#undef LORAFLEET_NAMES_16
#undef LORAFLEET_NAMES_8
#undef LORAFLEET_EIGHT
#undef LORAFLEET_FOUR
#undef LORAFLEET_PRODUCT
#endif

}  // namespace lorafleet
