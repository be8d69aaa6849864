// Norm, activation and rotary kernels: contracts in op.py. One block a row, 16 bytes a thread.
#include "../common.cuh"

namespace lorafleet {
namespace {

constexpr int kWide = 8;  // elements in 16 bytes

template <typename T>
struct Vec {
  float x[kWide];
  __device__ static Vec load(const T* p) {
    uint4 raw = load16(p);
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
};

__device__ float block_sum(float x) {
  __shared__ float partial[32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  const int warps = blockDim.x / 32;
  x = threadIdx.x % 32 < warps ? partial[threadIdx.x % 32] : 0.f;
  return warp_sum(x);
}

// residual (+= x), then out = norm(residual) * weight. kVecs pieces of 8 per thread.
template <typename T, int kVecs>
__global__ void rms_norm_kernel(T* out, T* residual, const T* x, const T* weight, int hidden,
                                float eps) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * hidden;
  Vec<T> held[kVecs];
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * kWide;
    if (at < hidden) {
      held[i] = Vec<T>::load(residual + row + at);
      if (x != nullptr) {
        Vec<T> added = Vec<T>::load(x + row + at);
#pragma unroll
        for (int j = 0; j < kWide; ++j) held[i].x[j] = rounded<T>(held[i].x[j] + added.x[j]);
        held[i].store(residual + row + at);
      }
#pragma unroll
      for (int j = 0; j < kWide; ++j) squares += held[i].x[j] * held[i].x[j];
    }
  }
  const float scale = rsqrtf(block_sum(squares) / hidden + eps);
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * kWide;
    if (at < hidden) {
      Vec<T> w = Vec<T>::load(weight + at);
#pragma unroll
      for (int j = 0; j < kWide; ++j) w.x[j] *= rounded<T>(held[i].x[j] * scale);
      w.store(out + row + at);
    }
  }
}

template <typename T>
__global__ void silu_mul_kernel(T* out, const T* gate_up, int width) {
  const int at = (blockIdx.x * blockDim.x + threadIdx.x) * kWide;
  if (at >= width) return;
  const int64_t row = blockIdx.y;
  Vec<T> gate = Vec<T>::load(gate_up + row * 2 * width + at);
  Vec<T> up = Vec<T>::load(gate_up + row * 2 * width + width + at);
#pragma unroll
  for (int j = 0; j < kWide; ++j) {
    gate.x[j] = rounded<T>(gate.x[j] / (1.f + __expf(-gate.x[j]))) * up.x[j];
  }
  gate.store(out + row * width + at);
}

// One warp a head. Lane i holds elements i, i + 32, ... of the head, so that the two halves of a
// rotary pair (d and d + rotary_dim / 2) meet through shared memory.
template <typename T>
__global__ void rotary_kernel(T* qkv, T* query, const T* cos, const T* sin, T* keys, T* values,
                              const int64_t* locations, const T* q_norm, const T* k_norm, int heads,
                              int kv_heads, int head_dim, int rotary_dim, float eps) {
  extern __shared__ float shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = blockIdx.y * (blockDim.x / 32) + warp;
  if (head >= heads + 2 * kv_heads) return;
  const int64_t token = blockIdx.x;
  const T* source = qkv + (token * (heads + 2 * kv_heads) + head) * head_dim;
  const int64_t place = locations[token];
  if (head >= heads + kv_heads) {  // a value: only stored
    T* target = values + (place * kv_heads + head - heads - kv_heads) * head_dim;
    for (int d = lane * kWide; d < head_dim; d += 32 * kWide)
      *reinterpret_cast<uint4*>(target + d) = load16(source + d);
    return;
  }
  float* x = shared + warp * head_dim;
  const T* norm = head < heads ? q_norm : k_norm;
  float squares = 0.f;
  for (int d = lane; d < head_dim; d += 32) {
    x[d] = Pair<T>::widen(source[d]);
    squares += x[d] * x[d];
  }
  if (norm != nullptr) {
    const float scale = rsqrtf(warp_sum(squares) / head_dim + eps);
    for (int d = lane; d < head_dim; d += 32)
      x[d] = rounded<T>(rounded<T>(x[d] * scale) * Pair<T>::widen(norm[d]));
  }
  __syncwarp();
  T* target = head < heads ? query + (token * heads + head) * head_dim
                           : keys + (place * kv_heads + head - heads) * head_dim;
  const int half = rotary_dim / 2;
  for (int d = lane; d < head_dim; d += 32) {
    float result = x[d];
    if (d < rotary_dim) {
      const float other = d < half ? -x[d + half] : x[d - half];
      const float c = Pair<T>::widen(cos[token * rotary_dim + d]);
      const float s = Pair<T>::widen(sin[token * rotary_dim + d]);
      result = rounded<T>(x[d] * c) + rounded<T>(other * s);
    }
    target[d] = Pair<T>::round(result);
  }
}

template <typename T>
int launch_norm(void* out, void* residual, const void* x, const void* weight, int rows, int hidden,
                float eps, cudaStream_t stream) {
  const int pieces = (hidden + kWide - 1) / kWide;
  int threads = (pieces + 31) / 32 * 32;
  if (threads > 512) threads = 512;
  const int vecs = (pieces + threads - 1) / threads;
  T* o = static_cast<T*>(out);
  T* r = static_cast<T*>(residual);
  const T* a = static_cast<const T*>(x);
  const T* w = static_cast<const T*>(weight);
  if (vecs == 1) rms_norm_kernel<T, 1><<<rows, threads, 0, stream>>>(o, r, a, w, hidden, eps);
  else if (vecs == 2) rms_norm_kernel<T, 2><<<rows, threads, 0, stream>>>(o, r, a, w, hidden, eps);
  else if (vecs <= 4) rms_norm_kernel<T, 4><<<rows, threads, 0, stream>>>(o, r, a, w, hidden, eps);
  else return cudaErrorInvalidValue;
  return cudaGetLastError();
}

template <typename T>
int launch_rotary(void* qkv, void* query, const void* cos, const void* sin, void* keys,
                  void* values, const int64_t* locations, const void* q_norm, const void* k_norm,
                  int tokens, int heads, int kv_heads, int head_dim, int rotary_dim, float eps,
                  cudaStream_t stream) {
  constexpr int kWarps = 8;
  const dim3 grid(tokens, (heads + 2 * kv_heads + kWarps - 1) / kWarps);
  rotary_kernel<T><<<grid, 32 * kWarps, kWarps * head_dim * sizeof(float), stream>>>(
      static_cast<T*>(qkv), static_cast<T*>(query), static_cast<const T*>(cos),
      static_cast<const T*>(sin), static_cast<T*>(keys), static_cast<T*>(values), locations,
      static_cast<const T*>(q_norm), static_cast<const T*>(k_norm), heads, kv_heads, head_dim,
      rotary_dim, eps);
  return cudaGetLastError();
}

}  // namespace
}  // namespace lorafleet

using namespace lorafleet;

extern "C" const char* lorafleet_error_string(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

extern "C" int lorafleet_rms_norm(int is_half, void* out, void* residual, const void* x,
                                  const void* weight, int rows, int hidden, float eps,
                                  cudaStream_t stream) {
  return is_half ? launch_norm<__half>(out, residual, x, weight, rows, hidden, eps, stream)
                 : launch_norm<__nv_bfloat16>(out, residual, x, weight, rows, hidden, eps, stream);
}

extern "C" int lorafleet_silu_mul(int is_half, void* out, const void* gate_up, int rows, int width,
                                  cudaStream_t stream) {
  constexpr int kThreads = 256;
  const dim3 grid((width + kThreads * kWide - 1) / (kThreads * kWide), rows);
  if (is_half)
    silu_mul_kernel<<<grid, kThreads, 0, stream>>>(static_cast<__half*>(out),
                                                   static_cast<const __half*>(gate_up), width);
  else
    silu_mul_kernel<<<grid, kThreads, 0, stream>>>(
        static_cast<__nv_bfloat16*>(out), static_cast<const __nv_bfloat16*>(gate_up), width);
  return cudaGetLastError();
}

extern "C" int lorafleet_rotary_and_store(int is_half, void* qkv, void* query, const void* cos,
                                          const void* sin, void* keys, void* values,
                                          const int64_t* locations, const void* q_norm,
                                          const void* k_norm, int tokens, int heads, int kv_heads,
                                          int head_dim, int rotary_dim, float eps,
                                          cudaStream_t stream) {
  return is_half ? launch_rotary<__half>(qkv, query, cos, sin, keys, values, locations, q_norm,
                                         k_norm, tokens, heads, kv_heads, head_dim, rotary_dim, eps,
                                         stream)
                 : launch_rotary<__nv_bfloat16>(qkv, query, cos, sin, keys, values, locations,
                                                q_norm, k_norm, tokens, heads, kv_heads, head_dim,
                                                rotary_dim, eps, stream);
}
