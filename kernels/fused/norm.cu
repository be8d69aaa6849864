// rms_norm and add_rms_norm_ of op.py. One block a row, 16 bytes a thread; for tiles one for 16 rows.
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
      Vec<T> w = Vec<T>::load(weight + at);
#pragma unroll
      for (int j = 0; j < kWide; ++j) w.x[j] *= rounded<T>(held[i].x[j] * scale);
      w.store(out + row + at);
    }
  }
}

constexpr int kNormWarps = 8;
constexpr int kNormTokens = 16;
constexpr int kBoxBytes = kNormTokens * 128;  // 16 tokens, or ranks, of 64 columns
constexpr int kStageBytes = 3 * kBoxBytes;  // product, residual, B
constexpr int kNormBytes = 2 * kNormWarps * kStageBytes;

// residual += x and what is pending of it in tiles, then the norm. grid (quarters of a tile, tiles); a
// warp takes every 8th 64 columns of its block's 16 tokens, one stage ahead of itself.
template <typename T>
__global__ void __launch_bounds__(32 * kNormWarps, 2)
    norm_tiles_kernel(T* out, T* residual, const T* x, const T* weight, int hidden, float eps,
                      Pending pending) {
  extern __shared__ __align__(128) unsigned char bytes[];
  __shared__ float squares[kNormWarps][kNormTokens];
  let_next_begin();
  wait_for_inputs();
  const TileTokens tile(pending, blockIdx.y);
  const int first = tile.first + kNormTokens * blockIdx.x;
  const int count = min(kNormTokens, tile.count - kNormTokens * static_cast<int>(blockIdx.x));
  if (count <= 0) return;
  const Part<T> part = part_at<T>(pending.site, row_of(pending.site, tile.slot), 0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const uint32_t stages = shared_address(bytes) + 2 * warp * kStageBytes;
  const int64_t begin = static_cast<int64_t>(first) * hidden;
  const auto load_b = [&](uint32_t stage, int column, int r0) {
#pragma unroll
    for (int i = lane; i < kNormTokens * 8; i += 32) {
      const int r = i / 8, c = column + i % 8 * kWide;
      copy_async(stage + 2 * kBoxBytes + swizzled(r, i % 8),
                 part.b + static_cast<int64_t>(r0 + r) * hidden + c,
                 r0 + r < part.rank && c < hidden);
    }
  };
  const auto start = [&](uint32_t stage, int column) {
    if (column < hidden) {
#pragma unroll
      for (int i = lane; i < kNormTokens * 8; i += 32) {
        const int t = i / 8, c = column + i % 8 * kWide;
        const bool valid = t < count && c < hidden;
        const int64_t at = begin + static_cast<int64_t>(t) * hidden + c;
        copy_async(stage + swizzled(t, i % 8), x + at, valid);
        copy_async(stage + kBoxBytes + swizzled(t, i % 8), residual + at, valid);
      }
      if (part.rank != 0) load_b(stage, column, 0);
    }
    asm volatile("cp.async.commit_group;");
  };
  // Two neighbours of h as an mma takes them, zero where there is no token or rank.
  const auto pair_of_h = [&](int t, int r) -> uint32_t {
    if (t >= count || r >= part.rank) return 0;
    const T* h = static_cast<const T*>(pending.h);
    const uint32_t both = *reinterpret_cast<const uint32_t*>(
        h + static_cast<int64_t>(first + t) * pending.capacity + r);
    return r + 1 < part.rank ? both : both & 0xffff;
  };

  float sums[2] = {};
  start(stages, 64 * warp);
  int parity = 0;
  for (int column = 64 * warp; column < hidden; column += 64 * kNormWarps, parity ^= 1) {
    const uint32_t stage = stages + parity * kStageBytes;
    __syncwarp();
    start(stages + (parity ^ 1) * kStageBytes, column + 64 * kNormWarps);
    asm volatile("cp.async.wait_group 1;");
    __syncwarp();
    float d[8][4] = {};
    for (int r0 = 0; r0 < part.rank; r0 += 16) {
      if (r0 > 0) {
        __syncwarp();
        load_b(stage, column, r0);
        asm volatile("cp.async.commit_group; \n cp.async.wait_group 0;");
        __syncwarp();
      }
      const int r = r0 + 2 * quad;
      const uint32_t a[4] = {pair_of_h(group, r), pair_of_h(group + 8, r),
                             pair_of_h(group, r + 8), pair_of_h(group + 8, r + 8)};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b[4];
        load_transposed(b, stage + 2 * kBoxBytes + swizzled(lane % 16, 2 * n + lane / 16));
        mma<T>(d[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
        mma<T>(d[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
    }
    unsigned char* boxes = bytes + (stage - shared_address(bytes));
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t at = swizzled(group + 8 * i, n) + 4 * quad;
        const float2 product = Pair<T>::unpack(*reinterpret_cast<uint32_t*>(boxes + at));
        uint32_t* held = reinterpret_cast<uint32_t*>(boxes + kBoxBytes + at);
        const float2 before = Pair<T>::unpack(*held);
        const float low = rounded<T>(before.x + rounded<T>(product.x + d[n][2 * i]));
        const float high = rounded<T>(before.y + rounded<T>(product.y + d[n][2 * i + 1]));
        *held = Pair<T>::pack(low, high);
        sums[i] += low * low + high * high;
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < kNormTokens * 8; i += 32) {
      const int t = i / 8, c = column + i % 8 * kWide;
      if (t < count && c < hidden)
        *reinterpret_cast<uint4*>(residual + begin + static_cast<int64_t>(t) * hidden + c) =
            load16(boxes + kBoxBytes + swizzled(t, i % 8));
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sums[i] += __shfl_xor_sync(kFullWarp, sums[i], 1);
    sums[i] += __shfl_xor_sync(kFullWarp, sums[i], 2);
    if (quad == 0) squares[warp][group + 8 * i] = sums[i];
  }
  __syncthreads();
  // Each lane reads again what it has written itself: always the same four tokens.
  float scales[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kNormWarps; ++w) sum += squares[w][4 * i + lane / 8];
    scales[i] = rsqrtf(sum / hidden + eps);
  }
  for (int column = 64 * warp + lane % 8 * kWide; column < hidden; column += 64 * kNormWarps) {
    const Vec<T> w = Vec<T>::load(weight + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = 4 * i + lane / 8;
      if (t >= count) continue;
      const int64_t at = begin + static_cast<int64_t>(t) * hidden + column;
      Vec<T> held = Vec<T>::load(residual + at);
#pragma unroll
      for (int j = 0; j < kWide; ++j) held.x[j] = rounded<T>(held.x[j] * scales[i]) * w.x[j];
      held.store(out + at);
    }
  }
}

template <typename T>
int norm_tiles(void* out, void* residual, const void* x, const void* weight, int hidden, float eps,
               const Pending& pending, cudaStream_t stream) {
  static const cudaError_t allowed = cudaFuncSetAttribute(
      norm_tiles_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kNormBytes);
  if (allowed != cudaSuccess) return allowed;
  return launch(norm_tiles_kernel<T>, dim3(kTileTokens / kNormTokens, pending.num_tiles),
                32 * kNormWarps, kNormBytes, stream, static_cast<T*>(out),
                static_cast<T*>(residual), static_cast<const T*>(x),
                static_cast<const T*>(weight), hidden, eps, pending);
}

template <typename T>
int norm(void* out, void* residual, const void* x, const void* weight, int rows, int hidden,
         float eps, const Pending* pending, cudaStream_t stream) {
  if (pending != nullptr && pending->tiles != nullptr)
    return norm_tiles<T>(out, residual, x, weight, hidden, eps, *pending, stream);
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
