// rms_norm and add_rms_norm_ of op.py. One block a row, 16 bytes a thread.
#include "../lora/expand.cuh"

namespace lorafleet {
namespace {

__device__ float block_sum(float x) {
  __shared__ float partial[32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  const int warps = blockDim.x / 32;
  x = threadIdx.x % 32 < warps ? partial[threadIdx.x % 32] : 0.f;
  return warp_sum(x);
}

// x with what is pending of it: 8 elements from `at`, rounded as a finished product is.
template <typename T, bool kPending>
__device__ Vec<T> load_finished(const T* x, const Pending& pending, int at, int hidden) {
  Vec<T> loaded = at < hidden ? Vec<T>::load(x + at) : Vec<T>{};
  if constexpr (kPending) {
    const int token = blockIdx.x, slot = pending.row_slots[token];
    if (slot == 0) return loaded;
    const int lane_offset = threadIdx.x % 32 * kWide, first = at - lane_offset;
    if (first >= hidden) return loaded;
    float acc[kWide] = {};
    const Part<T> part = part_at<T>(pending.site, row_of(pending.site, slot), first);
    expand_warp(acc, pending, part, token, lane_offset, at < hidden);
    loaded = loaded.plus(acc);
    loaded.round();
  }
  return loaded;
}

// What load_finished will read of B.
template <typename T>
__device__ void prefetch_pending(const Pending& pending, int hidden) {
  const SiteRow& row = row_of(pending.site, pending.row_slots[blockIdx.x]);
  for (int at = threadIdx.x * kWide; at < hidden; at += blockDim.x * kWide)
    prefetch_part(part_at<T>(pending.site, row, at), 0);
}

// residual (+= x), then out = norm(residual) * weight. kVecs pieces of 8 per thread.
template <typename T, int kVecs, bool kPending>
__global__ void __launch_bounds__(512)
    rms_norm_kernel(T* out, T* residual, const T* x, const T* weight, int hidden, float eps,
                    Pending pending) {
  let_next_begin();
  if constexpr (kPending) prefetch_pending<T>(pending, hidden);
  wait_for_inputs();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * hidden;
  Vec<T> held[kVecs];
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * kWide;
    Vec<T> added;
    if (x != nullptr) added = load_finished<T, kPending>(x + row, pending, at, hidden);
    if (at < hidden) {
      held[i] = Vec<T>::load(residual + row + at);
      if (x != nullptr) {
        held[i] = held[i].plus(added.x);
        held[i].round();
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

template <typename T, bool kPending>
int norm_rows(void* out, void* residual, const void* x, const void* weight, int rows, int hidden,
           float eps, const Pending& pending, cudaStream_t stream) {
  const int pieces = (hidden + kWide - 1) / kWide;
  int threads = (pieces + 31) / 32 * 32;
  if (threads > 512) threads = 512;
  const int vecs = (pieces + threads - 1) / threads;
  const auto run = [&](auto kernel) {
    return lorafleet::launch(kernel, dim3(rows), threads, 0, stream, static_cast<T*>(out),
                             static_cast<T*>(residual), static_cast<const T*>(x),
                             static_cast<const T*>(weight), hidden, eps, pending);
  };
  if (vecs == 1) return run(rms_norm_kernel<T, 1, kPending>);
  if (vecs == 2) return run(rms_norm_kernel<T, 2, kPending>);
  if constexpr (!kPending)  // with it, more would not fit the registers
    if (vecs <= 4) return run(rms_norm_kernel<T, 4, kPending>);
  return cudaErrorInvalidValue;
}

template <typename T>
int norm(void* out, void* residual, const void* x, const void* weight, int rows, int hidden,
         float eps, const Pending* pending, cudaStream_t stream) {
  return pending != nullptr
             ? norm_rows<T, true>(out, residual, x, weight, rows, hidden, eps, *pending, stream)
             : norm_rows<T, false>(out, residual, x, weight, rows, hidden, eps, {}, stream);
}

}  // namespace
}  // namespace lorafleet

using namespace lorafleet;

extern "C" int lorafleet_rms_norm(int is_half, void* out, void* residual, const void* x,
                                  const void* weight, int rows, int hidden, float eps,
                                  const Pending* pending, cudaStream_t stream) {
  return is_half
             ? norm<__half>(out, residual, x, weight, rows, hidden, eps, pending, stream)
             : norm<__nv_bfloat16>(out, residual, x, weight, rows, hidden, eps, pending, stream);
}
