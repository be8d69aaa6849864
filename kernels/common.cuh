// What the kernels share: 16-byte loads, tensor-core products, reductions, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace lorafleet {

constexpr unsigned kFullWarp = 0xffffffffu;

template <typename T>
struct Pair;
template <>
struct Pair<__half> {
  using type = __half2;
  static __device__ float2 unpack(uint32_t bits) {
    return __half22float2(*reinterpret_cast<__half2*>(&bits));
  }
  static __device__ uint32_t pack(float low, float high) {
    __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&both);
  }
  static __device__ __half round(float x) { return __float2half_rn(x); }
  static __device__ float widen(__half x) { return __half2float(x); }
};
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static __device__ float2 unpack(uint32_t bits) {
    return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&bits));
  }
  static __device__ uint32_t pack(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&both);
  }
  static __device__ __nv_bfloat16 round(float x) { return __float2bfloat16_rn(x); }
  static __device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
};

template <typename T>
__device__ float rounded(float x) {
  return Pair<T>::widen(Pair<T>::round(x));
}

__device__ inline uint4 load16(const void* address) {
  return *reinterpret_cast<const uint4*>(address);
}

constexpr int kWide = 8;  // elements in 16 bytes

template <typename T>
struct Vec {
  float x[kWide];
  __device__ static Vec load(const T* p) { return unpack(load16(p)); }
  __device__ static Vec unpack(const uint4& raw) {
    const uint32_t bits[4] = {raw.x, raw.y, raw.z, raw.w};
    Vec v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 pair = Pair<T>::unpack(bits[i]);
      v.x[2 * i] = pair.x;
      v.x[2 * i + 1] = pair.y;
    }
    return v;
  }
  __device__ void store(T* p) const {
    uint4 raw;
    raw.x = Pair<T>::pack(x[0], x[1]);
    raw.y = Pair<T>::pack(x[2], x[3]);
    raw.z = Pair<T>::pack(x[4], x[5]);
    raw.w = Pair<T>::pack(x[6], x[7]);
    *reinterpret_cast<uint4*>(p) = raw;
  }
  // The sum, not rounded until it is stored.
  __device__ Vec plus(const float (&added)[kWide]) const {
    Vec sum;
#pragma unroll
    for (int i = 0; i < kWide; ++i) sum.x[i] = x[i] + added[i];
    return sum;
  }
  __device__ void round() {
#pragma unroll
    for (int i = 0; i < kWide; ++i) x[i] = rounded<T>(x[i]);
  }
};

// Adapter weights are read once per step: they must not push anything else out of L1.
__device__ inline uint4 load_stream(const void* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

// D[16 x 8] += A[16 x 16] * B[16 x 8], float32 accumulators. Fragments as PTX lays them out for
// mma.m16n8k16: lane = 4 * group + quad; a holds rows group and group + 8, b holds column group.
template <typename T>
__device__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                    uint32_t b1);
template <>
__device__ inline void mma<__nv_bfloat16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                          uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma<__half>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                   uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

// A slot's row of the table: see cache/packed_form.py.
struct SiteRow {
  int64_t a_offset, rank_total;
  int64_t pairs[6];  // rank and B offset of each target
};

}  // namespace lorafleet
