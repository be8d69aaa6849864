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

// x with what is pending of it: 8 elements from `at`, rounded as a finished product is.
template <typename T, bool kPending>
__device__ Vec<T> load_finished(const T* x, const Pending& pending, int at, int hidden) {
  const uint4 loaded = at < hidden ? load16(x + at) : make_uint4(0, 0, 0, 0);
  if constexpr (kPending) {
    const int token = blockIdx.x, slot = pending.row_slots[token];
    const int lane_offset = threadIdx.x % 32 * kWide, first = at - lane_offset;
    if (slot != 0 && first < hidden) {
      float acc[kWide] = {};
      const Part<T> part = part_at<T>(pending.site, row_of(pending.site, slot), first);
      expand_warp(acc, pending, part, token, lane_offset, at < hidden);
      Vec<T> finished = Vec<T>::unpack(loaded).plus(acc);
      finished.round();
      return finished;
    }
  }
  return Vec<T>::unpack(loaded);
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
  uint4 held[kVecs];
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * kWide;
    Vec<T> added;
    if (x != nullptr) added = load_finished<T, kPending>(x + row, pending, at, hidden);
    if (at < hidden) {
      Vec<T> sum = Vec<T>::load(residual + row + at);
      if (x != nullptr) {
        sum = sum.plus(added.x);
        sum.round();
        sum.store(residual + row + at);
      }
      held[i] = sum.packed();
#pragma unroll
      for (int j = 0; j < kWide; ++j) squares += sum.x[j] * sum.x[j];
    }
  }
  const float scale = rsqrtf(block_sum(squares) / hidden + eps);
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int at = (i * blockDim.x + threadIdx.x) * kWide;
    if (at < hidden) {
      Vec<T> w = Vec<T>::load(weight + at);
      const Vec<T> sum = Vec<T>::unpack(held[i]);
#pragma unroll
      for (int j = 0; j < kWide; ++j) w.x[j] *= rounded<T>(sum.x[j] * scale);
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
  if (pending != nullptr && pending->tiles != nullptr)
    return norm_tiles<T>(out, residual, x, weight, hidden, eps, *pending, stream);
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
