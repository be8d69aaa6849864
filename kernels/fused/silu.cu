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
  let_next_begin();
  wait_for_inputs();
  const int at = (blockIdx.x * blockDim.x + threadIdx.x) * kWide;
  if (at >= width) return;
  const T* gate = gate_up + static_cast<int64_t>(blockIdx.y) * 2 * width + at;
  silu_times(Vec<T>::load(gate), Vec<T>::load(gate + width))
      .store(out + static_cast<int64_t>(blockIdx.y) * width + at);
}

constexpr int kTokens = 4;  // of a block: those of one slot find its B in the L1

// The same with the LoRA part of gate_up still to be added. grid (tiles of 256 outputs, groups of
// tokens); of two warps a token one finishes gate, the other up, and they meet in shared memory.
template <typename T>
__global__ void __launch_bounds__(64 * kTokens, 2)
    silu_mul_pending_kernel(T* out, const T* gate_up, int width, Pending pending) {
  __shared__ float4 ups[kTokens][2][32];
  let_next_begin();
  const int place = threadIdx.x / 64, lane = threadIdx.x % 32;
  const bool is_up = threadIdx.x % 64 >= 32;
  const int token = blockIdx.y * kTokens + place;
  const bool is_token = token < pending.num_tokens;
  const int first = blockIdx.x * 32 * kWide, at = first + lane * kWide;
  const bool inside = is_token && at < width;
  const SiteRow& row = row_of(pending.site, is_token ? pending.row_slots[token] : 0);
  const Part<T> part = part_at<T>(pending.site, row, first + (is_up ? width : 0));
  if (inside) prefetch_part(part, lane * kWide);
  wait_for_inputs();
  const T* mine = gate_up + static_cast<int64_t>(token) * 2 * width + (is_up ? width : 0) + at;
  const Vec<T> product = inside ? Vec<T>::load(mine) : Vec<T>{};
  float acc[kWide] = {};
  expand_warp(acc, pending, part, token, lane * kWide, inside);
  Vec<T> finished = product.plus(acc);
  finished.round();
  if (is_up) {
    const float* x = finished.x;
    ups[place][0][lane] = make_float4(x[0], x[1], x[2], x[3]);
    ups[place][1][lane] = make_float4(x[4], x[5], x[6], x[7]);
  }
  __syncthreads();
  if (is_up || !inside) return;
  const float4 low = ups[place][0][lane], high = ups[place][1][lane];
  const Vec<T> up{{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
  silu_times(finished, up).store(out + static_cast<int64_t>(token) * width + at);
}

template <typename T>
int silu_mul(void* out, const void* gate_up, int rows, int width, const Pending* pending,
             cudaStream_t stream) {
  T* o = static_cast<T*>(out);
  const T* g = static_cast<const T*>(gate_up);
  if (pending != nullptr) {
    const dim3 grid((width + 32 * kWide - 1) / (32 * kWide), (rows + kTokens - 1) / kTokens);
    return launch(silu_mul_pending_kernel<T>, grid, 64 * kTokens, 0, stream, o, g, width, *pending);
  }
  constexpr int kThreads = 256;
  const dim3 grid((width + kThreads * kWide - 1) / (kThreads * kWide), rows);
  return launch(silu_mul_kernel<T>, grid, kThreads, 0, stream, o, g, width);
}

}  // namespace
}  // namespace lorafleet

using namespace lorafleet;

extern "C" int lorafleet_silu_mul(int is_half, void* out, const void* gate_up, int rows, int width,
                                  const Pending* pending, cudaStream_t stream) {
  return is_half ? silu_mul<__half>(out, gate_up, rows, width, pending, stream)
                 : silu_mul<__nv_bfloat16>(out, gate_up, rows, width, pending, stream);
}
