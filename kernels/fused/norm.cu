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

// The same for tiles: 8 tokens a block, 256 outputs a warp at a time. Sums the squares in the order of
// rms_norm_kernel's one piece a thread: a row without an adapter keeps its bits. grid (groups of 8
// tokens of a tile, tiles); dynamic shared memory: what each thread has yet to norm.
constexpr int kNormThreads = 32 * kGroup;
constexpr int kChunkHalves = 4;
constexpr int kChunk = kChunkHalves * kHalfOuts;
constexpr int kMaxTileHidden = 4096;

template <typename T>
__global__ void __launch_bounds__(kNormThreads, 2)
    norm_tiles_kernel(T* out, T* residual, const T* x, const T* weight, int hidden, float eps,
                      Pending pending) {
  extern __shared__ uint4 held[];  // [halves of this warp][2][kNormThreads]
  __shared__ float squares[kGroup][kMaxTileHidden / kChunk], scales[kGroup];
  let_next_begin();
  wait_for_inputs();
  const TileTokens tokens(pending, blockIdx.y);
  const int t = blockIdx.x * kGroup;
  if (t >= tokens.count) return;
  const SiteRow& row = row_of(pending.site, tokens.slot);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane / 4 * kWide;
  const int chunks = (hidden + kChunk - 1) / kChunk;
  const auto place_of = [&](int i) { return tokens.first + t + lane % 4 * 2 + i; };
  const auto is_there = [&](int start, int i) {
    return t + lane % 4 * 2 + i < tokens.count && start + c < hidden;
  };
  const auto kept_at = [&](int chunk, int half) {
    return held + (chunk / kGroup * kChunkHalves + half) * 2 * kNormThreads + threadIdx.x;
  };
  // Has the residual of this lane's outputs of a half; adds their squares to each token's sum.
  const auto add = [&](float (&sums)[2], int chunk, int half) {
    const int start = chunk * kChunk + half * kHalfOuts;
    uint4 products[2], before[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t at = static_cast<int64_t>(place_of(i)) * hidden + start + c;
      products[i] = is_there(start, i) ? load16(x + at) : make_uint4(0, 0, 0, 0);
      before[i] = is_there(start, i) ? load16(residual + at) : make_uint4(0, 0, 0, 0);
    }
    WarpOuts<T> outs(half_at<T>(pending.site, row, start, hidden - start));
    outs.finish(products, outs.load_h(pending, tokens, t, 0), pending, tokens, t);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Vec<T> sum = Vec<T>::unpack(products[i]).plus(Vec<T>::unpack(before[i]).x);
      sum.round();
      kept_at(chunk, half)[i * kNormThreads] = sum.packed();
      if (is_there(start, i))
        sum.store(residual + static_cast<int64_t>(place_of(i)) * hidden + start + c);
      float square = 0.f;
#pragma unroll
      for (int j = 0; j < kWide; ++j) square += sum.x[j] * sum.x[j];
      sums[i] += square;
    }
  };
  for (int chunk = warp; chunk < chunks; chunk += kGroup) {
    float sums[2] = {};
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      float both[2] = {};
#pragma unroll
      for (int second = 0; second < 2; ++second) add(both, chunk, half + 2 * second);
      sums[0] += both[0];
      sums[1] += both[1];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int offset = 16; offset >= 4; offset >>= 1)
        sums[i] += __shfl_xor_sync(kFullWarp, sums[i], offset);
      if (lane < 4) squares[2 * lane + i][chunk] = sums[i];
    }
  }
  __syncthreads();
  const float sum = warp_sum(lane < chunks ? squares[warp][lane] : 0.f);
  if (lane == 0) scales[warp] = rsqrtf(sum / hidden + eps);
  __syncthreads();
  for (int chunk = warp; chunk < chunks; chunk += kGroup) {
#pragma unroll
    for (int half = 0; half < kChunkHalves; ++half) {
      const int start = chunk * kChunk + half * kHalfOuts;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!is_there(start, i)) continue;
        const Vec<T> x = Vec<T>::unpack(kept_at(chunk, half)[i * kNormThreads]);
        Vec<T> w = Vec<T>::load(weight + start + c);
#pragma unroll
        for (int j = 0; j < kWide; ++j)
          w.x[j] *= rounded<T>(x.x[j] * scales[lane % 4 * 2 + i]);
        w.store(out + static_cast<int64_t>(place_of(i)) * hidden + start + c);
      }
    }
  }
}

template <typename T>
int norm_tiles(void* out, void* residual, const void* x, const void* weight, int hidden, float eps,
               const Pending& pending, cudaStream_t stream) {
  if (hidden > kMaxTileHidden) return cudaErrorInvalidValue;
  constexpr int kBytes = 8 * kMaxTileHidden * sizeof(T);
  static const cudaError_t allowed = cudaFuncSetAttribute(
      norm_tiles_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (allowed != cudaSuccess) return allowed;
  return launch(norm_tiles_kernel<T>, dim3(kTileTokens / kGroup, pending.num_tiles), kNormThreads,
                kBytes, stream, static_cast<T*>(out), static_cast<T*>(residual),
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
