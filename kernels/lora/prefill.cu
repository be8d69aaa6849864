// LoRA for long segments, on tensor cores: contract in cuda.py. Shrink writes float32 partial sums of
// x @ A^T, reduce sums and rounds them; expand multiplies by B and adds to y, unless the operation
// that reads y next does.
#include "tile.cuh"

namespace lorafleet {
namespace {

constexpr int kTileRanks = 64;
constexpr int kShrinkStages = 4;
constexpr int kBoxBytes = 64 * 128;  // 64 rows of 64 columns

// grid (rank tiles of 64, token tiles, splits); 4 warps of 16 tokens each.
template <typename T>
__global__ void __launch_bounds__(128)
    shrink_prefill_kernel(float* partial, const T* x, Site site, const int* tiles, int num_tokens,
                          int capacity) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];  // stages of x's box, then A's
  let_next_begin();
  wait_for_inputs();
  const int* tile = tiles + 3 * blockIdx.y;
  const SiteRow& row = row_of(site, tile[0]);
  const int rank_total = static_cast<int>(row.rank_total), r0 = blockIdx.x * kTileRanks;
  if (r0 >= rank_total) return;
  const int first = tile[1], count = tile[2] - first, columns = min(kTileRanks, rank_total - r0);
  const int64_t wide = site.in_features;
  const T* x_box = x + first * wide;
  const T* a_box = static_cast<const T*>(site.arena) + row.a_offset + r0 * wide;
  const int units = (site.in_features + 63) / 64;
  const int begin = units * blockIdx.z / gridDim.z, end = units * (blockIdx.z + 1) / gridDim.z;
  const uint32_t shared = shared_address(shared_bytes);
  const auto start = [&](int unit) {
    const uint32_t stage = shared + (unit - begin) % kShrinkStages * 2 * kBoxBytes;
    if (unit < end) {
#pragma unroll
      for (int i = threadIdx.x; i < 64 * 8; i += 128) {
        const int r = i / 8, piece = i % 8, k = 64 * unit + 8 * piece;
        const uint32_t at = stage + swizzled(r, piece);
        copy_async(at, x_box + r * wide + k, k < wide && r < count);
        copy_async(at + kBoxBytes, a_box + r * wide + k, k < wide && r < columns);
      }
    }
    asm volatile("cp.async.commit_group;");
  };
  for (int i = 0; i < kShrinkStages - 1; ++i) start(begin + i);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float d[kTileRanks / 8][4] = {};
  for (int unit = begin; unit < end; ++unit) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kShrinkStages - 2));
    __syncthreads();
    start(unit + kShrinkStages - 1);
    const uint32_t stage = shared + (unit - begin) % kShrinkStages * 2 * kBoxBytes;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t xs[4];
      load_matrices(xs, stage + swizzled(16 * warp + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int pair = 0; pair < kTileRanks / 16; ++pair) {
        if (16 * pair >= columns) break;
        uint32_t as[4];
        load_matrices(as, stage + kBoxBytes + swizzled(16 * pair + lane / 16 * 8 + lane % 8,
                                                       2 * step + lane / 8 % 2));
        mma<T>(d[2 * pair], xs[0], xs[1], xs[2], xs[3], as[0], as[1]);
        mma<T>(d[2 * pair + 1], xs[0], xs[1], xs[2], xs[3], as[2], as[3]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kTileRanks / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = 16 * warp + lane / 4 + 8 * (i / 2), c = 8 * n + 2 * (lane % 4) + i % 2;
      if (t < count && c < columns) {
        const int64_t at = static_cast<int64_t>(blockIdx.z) * num_tokens + first + t;
        partial[at * capacity + r0 + c] = d[n][i];
      }
    }
  }
}

constexpr int kReduceBlocks = 2;  // of a tile

// h [num_tokens, capacity] = round(sum of partial over splits), where the tile's slot has ranks.
// grid (token tiles, kReduceBlocks).
template <typename T>
__global__ void reduce_prefill_kernel(T* h, const float* partial, Site site, const int* tiles,
                                      int num_tokens, int capacity, int splits) {
  let_next_begin();
  wait_for_inputs();
  const int* tile = tiles + 3 * blockIdx.x;
  const int rank_total = static_cast<int>(row_of(site, tile[0]).rank_total);
  const int count = (tile[2] - tile[1]) * rank_total;
  for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < count; i += kReduceBlocks * blockDim.x) {
    const int64_t at = static_cast<int64_t>(tile[1] + i / rank_total) * capacity + i % rank_total;
    float sum = 0.f;
#pragma unroll 4
    for (int s = 0; s < splits; ++s)
      sum += partial[static_cast<int64_t>(s) * num_tokens * capacity + at];
    h[at] = Pair<T>::round(sum);
  }
}

// y += the update. grid (output tiles, token tiles).
template <typename T>
__global__ void __launch_bounds__(kTileThreads, 5)
    expand_prefill_kernel(T* y, Pending pending, int y_width) {
  __shared__ __align__(16) TileOuts<T> out;
  let_next_begin();
  wait_for_inputs();
  const TileTokens tokens(pending, blockIdx.y);
  const SiteRow& row = row_of(pending.site, tokens.slot);
  Tile tile;
  if (!find_tile(pending.site, row, blockIdx.x, kTileOuts, tile)) return;
  const int columns = tile.width - tile.start, start = tile.y_start + tile.start;
  const Half<T> halves[2] = {half_at<T>(pending.site, row, start, columns),
                             half_at<T>(pending.site, row, start + kHalfOuts, columns - kHalfOuts)};
  expand_tile(out, halves, pending, tokens);
  T* y_tile = y + static_cast<int64_t>(tokens.first) * y_width + start;
#pragma unroll
  for (int i = threadIdx.x % 32; i < 16 * kTileOuts / kWide; i += 32) {
    const int t = threadIdx.x / 32 * 16 + i / (kTileOuts / kWide);
    const int c = i % (kTileOuts / kWide) * kWide;
    if (t >= tokens.count || c >= columns) continue;
    T* target = y_tile + static_cast<int64_t>(t) * y_width + c;
    finished(target, &out[t][c]).store(target);
  }
}

template <typename T>
int shrink(void* h, float* partial, const void* x, const Site& site, const int* tiles,
           int num_tiles, int tokens, int capacity, int splits, cudaStream_t stream) {
  constexpr int kBytes = kShrinkStages * 2 * kBoxBytes;
  static const cudaError_t allowed = cudaFuncSetAttribute(
      shrink_prefill_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (allowed != cudaSuccess) return allowed;
  const dim3 grid((capacity + kTileRanks - 1) / kTileRanks, num_tiles, splits);
  const int error = launch(shrink_prefill_kernel<T>, grid, 128, kBytes, stream, partial,
                           static_cast<const T*>(x), site, tiles, tokens, capacity);
  if (error != cudaSuccess) return error;
  return launch(reduce_prefill_kernel<T>, dim3(num_tiles, kReduceBlocks), 256, 0, stream,
                static_cast<T*>(h), partial, site, tiles, tokens, capacity, splits);
}

template <typename T>
int expand(void* y, const Pending& pending, cudaStream_t stream) {
  const dim3 grid(tiles_of(pending.site, kTileOuts), pending.num_tiles);
  return launch(expand_prefill_kernel<T>, grid, kTileThreads, 0, stream, static_cast<T*>(y),
                pending, width_of(pending.site));
}

}  // namespace
}  // namespace lorafleet

using namespace lorafleet;

extern "C" int lorafleet_lora_shrink_tiles(int is_half, const void* x, float* partial,
                                           const Pending* pending, cudaStream_t stream) {
  const Pending& p = *pending;
  void* h = const_cast<void*>(p.h);
  return is_half ? shrink<__half>(h, partial, x, p.site, p.tiles, p.num_tiles, p.num_tokens,
                                  p.capacity, p.splits, stream)
                 : shrink<__nv_bfloat16>(h, partial, x, p.site, p.tiles, p.num_tiles, p.num_tokens,
                                         p.capacity, p.splits, stream);
}

extern "C" int lorafleet_lora_expand_tiles(int is_half, void* y, const Pending* pending,
                                           cudaStream_t stream) {
  return is_half ? expand<__half>(y, *pending, stream) : expand<__nv_bfloat16>(y, *pending, stream);
}
