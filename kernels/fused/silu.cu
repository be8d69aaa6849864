// silu_mul of op.py.
#include "../lora/expand.cuh"

namespace lorafleet {
namespace {

template <typename T>
__device__ Vec<T> silu_times(Vec<T> gate, const Vec<T>& up) {
#pragma unroll
  for (int j = 0; j < kWide; ++j)
    gate.x[j] = rounded<T>(gate.x[j] / (1.f + __expf(-gate.x[j]))) * up.x[j];
  return gate;
}

// grid (pieces of a row, rows); 16 bytes a thread.
template <typename T>
__global__ void silu_mul_kernel(T* out, const T* gate_up, int width) {
  const int at = (blockIdx.x * blockDim.x + threadIdx.x) * kWide;
  if (at >= width) return;
  const T* gate = gate_up + static_cast<int64_t>(blockIdx.y) * 2 * width + at;
  silu_times(Vec<T>::load(gate), Vec<T>::load(gate + width))
      .store(out + static_cast<int64_t>(blockIdx.y) * width + at);
}

constexpr int kShared = 4;  // tokens of one slot that share the loads of B

// Tokens from `token` on that have its slot and lie in its aligned group of kShared; 0 where an
// earlier token has taken this one.
__device__ int shared_from(const int* row_slots, int token, int num_tokens) {
  const int slot = row_slots[token];
  if (token % kShared != 0 && row_slots[token - 1] == slot) return 0;
  int count = 1;
  while (token + count < num_tokens && (token + count) % kShared != 0 &&
         row_slots[token + count] == slot)
    ++count;
  return count;
}

// The same with the LoRA part of gate_up still to be added. grid (tiles of 256 outputs, tokens);
// one warp finishes gate, the other up, and they meet in shared memory.
template <typename T>
__global__ void __launch_bounds__(64)
    silu_mul_pending_kernel(T* out, const T* gate_up, int width, Pending pending) {
  __shared__ float4 ups[kShared][2][32];
  const int token = blockIdx.y, lane = threadIdx.x % 32;
  const bool is_up = threadIdx.x >= 32;
  const int count = shared_from(pending.row_slots, token, pending.num_tokens);
  if (count == 0) return;
  const int slot = pending.row_slots[token];
  const int first = blockIdx.x * 32 * kWide, at = first + lane * kWide;
  const bool inside = at < width;
  const T* mine = gate_up + static_cast<int64_t>(token) * 2 * width + (is_up ? width : 0) + at;
  uint4 raw[kShared];
#pragma unroll
  for (int j = 0; j < kShared; ++j)
    raw[j] = load_or_zero(mine + static_cast<int64_t>(j) * 2 * width, inside && j < count);
  float acc[kShared][kWide] = {};
  if (slot != 0) {
    const SiteRow& row = row_of(pending.site, slot);
    const Part<T> part = part_at<T>(pending.site, row, first + (is_up ? width : 0));
    if (count == 1)
      expand_warp<T, 1>(reinterpret_cast<float(&)[1][kWide]>(acc), pending, part, token, 1,
                        lane * kWide, inside);
    else
      expand_warp<T, kShared>(acc, pending, part, token, count, lane * kWide, inside);
  }
  Vec<T> finished[kShared];
#pragma unroll
  for (int j = 0; j < kShared; ++j) {
    finished[j] = Vec<T>::unpack(raw[j]).plus(acc[j]);
    finished[j].round();
    if (is_up && j < count) {
      const float* x = finished[j].x;
      ups[j][0][lane] = make_float4(x[0], x[1], x[2], x[3]);
      ups[j][1][lane] = make_float4(x[4], x[5], x[6], x[7]);
    }
  }
  __syncthreads();
  if (is_up || !inside) return;
#pragma unroll
  for (int j = 0; j < kShared; ++j) {
    if (j >= count) break;
    const float4 low = ups[j][0][lane], high = ups[j][1][lane];
    const Vec<T> up{{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
    silu_times(finished[j], up).store(out + static_cast<int64_t>(token + j) * width + at);
  }
}

template <typename T>
int silu_mul(void* out, const void* gate_up, int rows, int width, const Pending* pending,
             cudaStream_t stream) {
  T* o = static_cast<T*>(out);
  const T* g = static_cast<const T*>(gate_up);
  if (pending != nullptr) {
    const dim3 grid((width + 32 * kWide - 1) / (32 * kWide), rows);
    silu_mul_pending_kernel<<<grid, 64, 0, stream>>>(o, g, width, *pending);
  } else {
    constexpr int kThreads = 256;
    const dim3 grid((width + kThreads * kWide - 1) / (kThreads * kWide), rows);
    silu_mul_kernel<<<grid, kThreads, 0, stream>>>(o, g, width);
  }
  return cudaGetLastError();
}

}  // namespace
}  // namespace lorafleet

using namespace lorafleet;

extern "C" int lorafleet_silu_mul(int is_half, void* out, const void* gate_up, int rows, int width,
                                  const Pending* pending, cudaStream_t stream) {
  return is_half ? silu_mul<__half>(out, gate_up, rows, width, pending, stream)
                 : silu_mul<__nv_bfloat16>(out, gate_up, rows, width, pending, stream);
}
