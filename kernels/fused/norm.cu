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

constexpr int kCluster = 4;  // blocks that share a row

// The sum over the blocks of a cluster, each of which calls it once.
__device__ float cluster_sum(float x) {
  x = block_sum(x);
#if __CUDA_ARCH__ >= 900
  __shared__ float mine;
  if (threadIdx.x == 0) mine = x;
  const auto meet_all = [] {
    asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;"
                 ::: "memory");
  };
  meet_all();
  x = 0.f;
#pragma unroll
  for (int block = 0; block < kCluster; ++block) {
    float other;
    asm volatile(
        "{ .reg .u32 there; mapa.shared::cluster.u32 there, %1, %2;\n"
        "  ld.shared::cluster.f32 %0, [there]; }"
        : "=f"(other)
        : "r"(shared_address(&mine)), "r"(block)
        : "memory");
    x += other;
  }
  meet_all();  // nobody ends while another may still read
#endif
  return x;
}

// What of a row's product one thread has yet to get: from before the wait on, its B.
template <typename T>
struct PendingPiece {
  Part<T> part{};
  RankRows<T> rows;
  int offset;
  bool inside;

  __device__ PendingPiece(const Pending& pending, int token, int at, int hidden)
      : offset(threadIdx.x % 32 * kWide), inside(at < hidden) {
    const int slot = pending.row_slots[token], first = at - offset;
    if (slot != 0 && first < hidden)
      part = part_at<T>(pending.site, row_of(pending.site, slot), first);
    rows.load(part, 0, offset, inside);
  }

  // Adds to the product's 8 elements and rounds them as a finished product is.
  __device__ void finish(Vec<T>& product, const Pending& pending, int token) {
    float acc[kWide] = {};
    expand_warp(acc, rows, pending, part, token, offset, inside);
    product = product.plus(acc);
    product.round();
  }
};

// residual += x and what is pending of it, then out = norm(residual) * weight: a cluster a row, a
// thread 8 elements. Blocks this small find room beside the product, and have their B when it ends.
template <typename T>
__global__ void __launch_bounds__(256)
    norm_pending_kernel(T* out, T* residual, const T* x, const T* weight, int hidden, float eps,
                        Pending pending) {
  let_next_begin();
  const int token = blockIdx.x / kCluster;
  const int at = (blockIdx.x % kCluster * blockDim.x + threadIdx.x) * kWide;
  PendingPiece<T> piece(pending, token, at, hidden);
  // The weight waits in shared memory: for registers of it there is no room beside the product.
  __shared__ __align__(16) T weights[256 * kWide];
  T* my_weights = weights + threadIdx.x * kWide;
  copy_async(shared_address(my_weights), weight + at, piece.inside);
  wait_for_inputs();
  const int64_t place = static_cast<int64_t>(token) * hidden + at;
  Vec<T> sum{};
  float squares = 0.f;
  const uint4 before = piece.inside ? load16(residual + place) : make_uint4(0, 0, 0, 0);
  if (piece.inside) sum = Vec<T>::load(x + place);
  piece.finish(sum, pending, token);
  if (piece.inside) {
    sum = sum.plus(Vec<T>::unpack(before).x);
    sum.round();
    sum.store(residual + place);
#pragma unroll
    for (int j = 0; j < kWide; ++j) squares += sum.x[j] * sum.x[j];
  }
  const float scale = rsqrtf(cluster_sum(squares) / hidden + eps);
  if (!piece.inside) return;
  asm volatile("cp.async.wait_all;" ::: "memory");
  Vec<T> w = Vec<T>::load(my_weights);
#pragma unroll
  for (int j = 0; j < kWide; ++j) w.x[j] *= rounded<T>(sum.x[j] * scale);
  w.store(out + place);
}

template <typename T>
int norm_pending(void* out, void* residual, const void* x, const void* weight, int rows,
                 int hidden, float eps, const Pending& pending, cudaStream_t stream) {
  const int warps = (hidden + 32 * kWide - 1) / (32 * kWide);
  const int threads = (warps + kCluster - 1) / kCluster * 32;
  if (!is_hopper() || threads > 256) return cudaErrorInvalidValue;
  return launch_clusters(kCluster, norm_pending_kernel<T>, dim3(rows * kCluster), threads, 0,
                         stream, static_cast<T*>(out), static_cast<T*>(residual),
                         static_cast<const T*>(x), static_cast<const T*>(weight), hidden, eps,
                         pending);
}

// residual (+= x), then out = norm(residual) * weight. kVecs pieces of 8 per thread.
template <typename T, int kVecs>
__global__ void __launch_bounds__(512)
    rms_norm_kernel(T* out, T* residual, const T* x, const T* weight, int hidden, float eps) {
  let_next_begin();
  uint4 weights[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * kWide;
    if (at < hidden) weights[i] = load16(weight + at);
  }
  wait_for_inputs();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * hidden;
  Vec<T> held[kVecs];
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * kWide;
    if (at < hidden) {
      held[i] = Vec<T>::load(residual + row + at);
      if (x != nullptr) {
        held[i] = held[i].plus(Vec<T>::load(x + row + at).x);
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
      Vec<T> w = Vec<T>::unpack(weights[i]);
#pragma unroll
      for (int j = 0; j < kWide; ++j) w.x[j] *= rounded<T>(held[i].x[j] * scale);
      w.store(out + row + at);
    }
  }
}

template <typename T>
int norm(void* out, void* residual, const void* x, const void* weight, int rows, int hidden,
         float eps, const Pending* pending, cudaStream_t stream) {
  if (pending != nullptr)
    return norm_pending<T>(out, residual, x, weight, rows, hidden, eps, *pending, stream);
  const int pieces = (hidden + kWide - 1) / kWide;
  int threads = (pieces + 31) / 32 * 32;
  if (threads > 512) threads = 512;
  const int vecs = (pieces + threads - 1) / threads;
  const auto run = [&](auto kernel) {
    return launch(kernel, dim3(rows), threads, 0, stream, static_cast<T*>(out),
                  static_cast<T*>(residual), static_cast<const T*>(x),
                  static_cast<const T*>(weight), hidden, eps);
  };
  if (vecs == 1) return run(rms_norm_kernel<T, 1>);
  if (vecs == 2) return run(rms_norm_kernel<T, 2>);
  if (vecs <= 4) return run(rms_norm_kernel<T, 4>);
  return cudaErrorInvalidValue;
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
