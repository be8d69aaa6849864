// rms_norm and add_rms_norm_ of op.py. One block a row, 16 bytes a thread; for tiles one for 8 rows.
#include "../lora/tile.cuh"

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
  Vec<T> w = Vec<T>::load(weight + at);
#pragma unroll
  for (int j = 0; j < kWide; ++j) w.x[j] *= rounded<T>(sum.x[j] * scale);
  w.store(out + place);
}

// The same for tiles: 8 tokens a block, 64 outputs a warp at a time, 256 in the order in which
// rms_norm_kernel sums their squares: a row without an adapter keeps its bits. What a thread reads
// comes to places of its own in shared memory, where the sums stay until they are normed.
// grid (groups of 8 tokens of a tile, tiles).
constexpr int kNormThreads = 32 * kGroup;
constexpr int kChunk = 4 * kHalfOuts;
constexpr int kMaxTileHidden = 4096;
constexpr int kMaxHalves = kMaxTileHidden / kHalfOuts / kGroup;  // of a warp
constexpr int kAhead = 3;  // halves on their way
constexpr int kNormBytes = (kMaxHalves + kAhead + 1) * 2 * kNormThreads * 16;

// This lane's 8 outputs of a half, of two tokens: where they are in a row, and which are there.
struct NormPlace {
  int at;
  bool valid[2];
};

template <typename T>
__global__ void __launch_bounds__(kNormThreads, 2)
    norm_tiles_kernel(T* out, T* residual, const T* x, const T* weight, int hidden, float eps,
                      Pending pending) {
  extern __shared__ __align__(16) uint4 places[];  // residuals [kMaxHalves], products [kAhead + 1]
  __shared__ float squares[kGroup][kMaxTileHidden / kChunk], scales[kGroup];
  let_next_begin();
  wait_for_inputs();
  const TileTokens tokens(pending, blockIdx.y);
  const int t = blockIdx.x * kGroup;
  if (t >= tokens.count) return;
  const SiteRow& row = row_of(pending.site, tokens.slot);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int chunks = (hidden + kChunk - 1) / kChunk;
  const int halves = (chunks - warp + kGroup - 1) / kGroup * 4;  // of this warp, chunk by chunk
  const auto start_of = [&](int k) {
    return (warp + k / 4 * kGroup) * kChunk + (k % 2 * 2 + k / 2 % 2) * kHalfOuts;
  };
  const auto half_of = [&](int k) {
    return half_at<T>(pending.site, row, start_of(k), hidden - start_of(k));
  };
  const auto place_of = [&](int k) {
    const int at = start_of(k) + lane / 4 * kWide, token = t + lane % 4 * 2;
    const bool inside = k < halves && at < hidden;
    return NormPlace{at, {inside && token < tokens.count, inside && token + 1 < tokens.count}};
  };
  const int64_t first = static_cast<int64_t>(tokens.first + t + lane % 4 * 2) * hidden;
  const uint32_t mine = shared_address(places + threadIdx.x);
  const auto sum_at = [&](int k, int i) { return mine + (k * 2 + i) * kNormThreads * 16; };
  const auto product_at = [&](int k, int i) { return sum_at(kMaxHalves + k % (kAhead + 1), i); };
  const auto start = [&](int k) {
    const NormPlace place = place_of(k);
    if (k < halves) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t at = first + i * hidden + place.at;
        copy_async(product_at(k, i), x + at, place.valid[i]);
        copy_async(sum_at(k, i), residual + at, place.valid[i]);
      }
    }
    asm volatile("cp.async.commit_group;");
  };
  for (int k = 0; k < kAhead; ++k) start(k);
  WarpOuts<T> outs;
  uint4 b[4];
  outs.half = half_of(0);
  outs.fetch_b(b, outs.half, 0);
  const uint2 h = outs.load_h(pending, tokens, t, 0);
  float pair[2], sums[2];
#pragma unroll 1
  for (int k = 0; k < halves; ++k) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kAhead - 1) : "memory");
    start(k + kAhead);
    outs.half = half_of(k);
    outs.deal(b);
    if (k + 1 < halves) outs.fetch_b(b, half_of(k + 1), 0);
    uint4 products[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) products[i] = load_shared16(product_at(k, i));
    outs.finish(products, h, pending, tokens, t);
    const NormPlace place = place_of(k);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Vec<T> sum = Vec<T>::unpack(load_shared16(sum_at(k, i)));
      sum = Vec<T>::unpack(products[i]).plus(sum.x);
      sum.round();
      places[(k * 2 + i) * kNormThreads + threadIdx.x] = sum.packed();
      if (place.valid[i]) sum.store(residual + first + i * hidden + place.at);
      float square = 0.f;
#pragma unroll
      for (int j = 0; j < kWide; ++j) square += sum.x[j] * sum.x[j];
      pair[i] = k % 2 == 0 ? square : pair[i] + square;
      if (k % 2 == 1) sums[i] = k % 4 == 1 ? pair[i] : sums[i] + pair[i];
    }
    if (k % 4 != 3) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int offset = 16; offset >= 4; offset >>= 1)
        sums[i] += __shfl_xor_sync(kFullWarp, sums[i], offset);
      if (lane < 4) squares[2 * lane + i][warp + k / 4 * kGroup] = sums[i];
    }
  }
  __syncthreads();
  const float sum = warp_sum(lane < chunks ? squares[warp][lane] : 0.f);
  if (lane == 0) scales[warp] = rsqrtf(sum / hidden + eps);
  __syncthreads();
#pragma unroll 2
  for (int k = 0; k < halves; ++k) {
    const NormPlace place = place_of(k);
    if (!place.valid[0]) continue;
    const Vec<T> w = Vec<T>::load(weight + place.at);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float scale = scales[lane % 4 * 2 + i];
      Vec<T> normed = Vec<T>::unpack(load_shared16(sum_at(k, i)));
#pragma unroll
      for (int j = 0; j < kWide; ++j) normed.x[j] = w.x[j] * rounded<T>(normed.x[j] * scale);
      if (place.valid[i]) normed.store(out + first + i * hidden + place.at);
    }
  }
}

template <typename T>
int norm_tiles(void* out, void* residual, const void* x, const void* weight, int hidden, float eps,
               const Pending& pending, cudaStream_t stream) {
  if (hidden > kMaxTileHidden) return cudaErrorInvalidValue;
  static const cudaError_t allowed = cudaFuncSetAttribute(
      norm_tiles_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kNormBytes);
  if (allowed != cudaSuccess) return allowed;
  return launch(norm_tiles_kernel<T>, dim3(kTileTokens / kGroup, pending.num_tiles), kNormThreads,
                kNormBytes, stream, static_cast<T*>(out), static_cast<T*>(residual),
                static_cast<const T*>(x), static_cast<const T*>(weight), hidden, eps, pending);
}

template <typename T>
int norm_pending(void* out, void* residual, const void* x, const void* weight, int rows,
                 int hidden, float eps, const Pending& pending, cudaStream_t stream) {
  if (pending.tiles != nullptr)
    return norm_tiles<T>(out, residual, x, weight, hidden, eps, pending, stream);
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
