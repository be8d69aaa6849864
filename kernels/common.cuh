// What the kernels share: launches, 16-byte loads, tensor-core products, reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace lorafleet {

constexpr unsigned kFullWarp = 0xffffffffu;

// Programmatic dependent launch (CUDA C++ programming guide): a kernel started by `launch` may begin
// while the one before it in its stream still runs. Until `wait_for_inputs` returns it may read only
// what no kernel of the same step writes (weights, adapters, earlier tokens' keys and values) and
// write nothing. Every such kernel waits, in every block: the one behind it relies on that for what
// came two kernels before.
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel begin as soon as every block of this one has come here and there is room.
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Whether blocks may form clusters, and kernels begin before the one in front has ended.
inline bool is_hopper() {
  static const bool found = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  return found;
}

// In clusters of `cluster` blocks along x; 1 where there are none.
template <typename... Parameters, typename... Arguments>
int launch_clusters(int cluster, void (*kernel)(Parameters...), dim3 grid, int threads,
                    size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = !is_hopper() ? 0 : cluster == 1 ? 1 : 2;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
           cudaStream_t stream, Arguments&&... arguments) {
  return launch_clusters(1, kernel, grid, threads, shared_bytes, stream,
                         static_cast<Parameters>(arguments)...);
}

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

// silu(gate), rounded, times up. The reciprocal is of 1 or more, which spares the steps that a division
// takes for other numbers.
template <typename T>
__device__ float gated(float gate, float up) {
  float sigmoid;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(1.f + __expf(-gate)));
  return rounded<T>(gate * sigmoid) * up;
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
  __device__ uint4 packed() const {
    return make_uint4(Pair<T>::pack(x[0], x[1]), Pair<T>::pack(x[2], x[3]),
                      Pair<T>::pack(x[4], x[5]), Pair<T>::pack(x[6], x[7]));
  }
  __device__ void store(T* p) const { *reinterpret_cast<uint4*>(p) = packed(); }
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

// Starts the way of 16 bytes to the L2; harmless for any address that could be loaded.
__device__ inline void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes to shared memory, or zeros: then `from` is not read.
__device__ inline void copy_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0));
}

// Where the 16-byte piece `piece` of row `row` lies in a tile of 64 2-byte columns, in bytes:
// swizzled, so that matrices of 8 rows are read without bank conflicts.
__device__ inline uint32_t swizzled(int row, int piece) {
  return row * 128 + ((piece ^ (row & 7)) << 4);
}

// Four 8 x 8 matrices of 2-byte elements; lane 8 m + r gives the address of row r of matrix m.
__device__ inline void load_matrices(uint32_t (&m)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row));
}

__device__ inline void load_transposed(uint32_t (&m)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row));
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

// A barrier of kWarps warps of the block, beside __syncthreads, which is barrier 0.
template <int kWarps, int kBarrier = 1>
__device__ void meet() {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(32 * kWarps) : "memory");
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
