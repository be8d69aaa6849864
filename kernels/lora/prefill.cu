// LoRA for long segments, on tensor cores: contract in cuda.py. Shrink writes float32 partial sums of
// x @ A^T and rounds their sum; expand multiplies by B and adds to y, unless the operation that reads
// y next does.
#include "tile.cuh"

namespace lorafleet {
namespace {

constexpr int kTileRanks = 64;
constexpr int kShrinkStages = 4;
constexpr int kBoxBytes = 64 * 128;  // 64 rows of 64 columns

// Whether this block is the last of `count` to come here; what the others wrote before is visible to
// it then. The counter is zero again afterwards.
__device__ bool comes_last(int* arrived, int count) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(arrived, 1) == count - 1;
    if (last) *arrived = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// Rows of x and of A, `wide` apart, and the units of 64 columns over which they are multiplied.
template <typename T>
struct Factors {
  const T *x, *a;
  int64_t wide;
  int count, columns;  // rows of x, of A
  int begin, end;
};

// d += x @ A^T for a warp's 16 rows of x and kGroups times 16 of A; as zero count those that are not
// there. One loop for each kGroups: without branches in it the loads of a unit go side by side.
template <typename T, int kGroups>
__device__ void multiply(float (&d)[kTileRanks / 8][4], const Factors<T>& of, uint32_t shared) {
  constexpr int kRows = 16;  // that the block copies at once
  const int r = threadIdx.x / 8, piece = threadIdx.x % 8;
  const T* x = of.x + r * of.wide + piece * kWide;
  const T* a = of.a + r * of.wide + piece * kWide;
  const auto start = [&](int unit) {
    if (unit < of.end) {
      const uint32_t stage = shared + (unit - of.begin) % kShrinkStages * 2 * kBoxBytes;
      const uint32_t to = stage + swizzled(r, piece);
      const int k = 64 * unit;
      const bool inside = k + piece * kWide < of.wide;
#pragma unroll
      for (int i = 0; i < 64 / kRows; ++i)
        copy_ahead(to + i * kRows * 128, x + i * kRows * of.wide + k,
                   inside && r + i * kRows < of.count);
#pragma unroll
      for (int i = 0; i < kGroups; ++i)
        copy_ahead(to + kBoxBytes + i * kRows * 128, a + i * kRows * of.wide + k,
                   inside && r + i * kRows < of.columns);
    }
    asm volatile("cp.async.commit_group;");
  };
  for (int i = 0; i < kShrinkStages - 1; ++i) start(of.begin + i);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int unit = of.begin; unit < of.end; ++unit) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kShrinkStages - 2));
    __syncthreads();
    start(unit + kShrinkStages - 1);
    const uint32_t stage = shared + (unit - of.begin) % kShrinkStages * 2 * kBoxBytes;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t xs[4];
      load_matrices(xs, stage + swizzled(16 * warp + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        uint32_t as[4];
        load_matrices(as, stage + kBoxBytes + swizzled(16 * group + lane / 16 * 8 + lane % 8,
                                                       2 * step + lane / 8 % 2));
        mma<T>(d[2 * group], xs[0], xs[1], xs[2], xs[3], as[0], as[1]);
        mma<T>(d[2 * group + 1], xs[0], xs[1], xs[2], xs[3], as[2], as[3]);
      }
    }
  }
}

// The sum of 4 ranks over the splits, in order, with the loads of several on their way at a time.
__device__ float4 sum_parts(const float* at, int64_t stride, int splits) {
  constexpr int kAtOnce = 8;
  float4 sum{};
  for (int s = 0; s < splits; s += kAtOnce) {
    float4 found[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      found[i] = s + i < splits ? __ldcg(reinterpret_cast<const float4*>(at + (s + i) * stride))
                                : float4{};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      sum.x += found[i].x;
      sum.y += found[i].y;
      sum.z += found[i].z;
      sum.w += found[i].w;
    }
  }
  return sum;
}

// h [num_tokens, capacity] = round(x @ A^T), the ranks that each tile's slot has, up to a multiple of
// 4 with what may come after them; capacity is a multiple of 8. The last of a tile's splits over k
// sums them. grid (rank tiles of 64, token tiles, splits); 4 warps of 16 tokens each.
template <typename T>
__global__ void __launch_bounds__(128, 3)
    shrink_prefill_kernel(T* h, float* partial, int* arrived, const T* x, Site site,
                          const int* tiles, int num_tokens, int capacity) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];  // stages of x's box, then A's
  let_next_begin();
  wait_for_inputs();
  const int* tile = tiles + 3 * blockIdx.y;
  const SiteRow& row = row_of(site, tile[0]);
  const int rank_total = static_cast<int>(row.rank_total), r0 = blockIdx.x * kTileRanks;
  if (r0 >= rank_total) return;
  const int first = tile[1], count = tile[2] - first, columns = min(kTileRanks, rank_total - r0);
  const int64_t wide = site.in_features;
  const int units = (site.in_features + 63) / 64;
  const Factors<T> factors{x + first * wide,
                           static_cast<const T*>(site.arena) + row.a_offset + r0 * wide,
                           wide,
                           count,
                           columns,
                           static_cast<int>(units * blockIdx.z / gridDim.z),
                           static_cast<int>(units * (blockIdx.z + 1) / gridDim.z)};
  const uint32_t shared = shared_address(shared_bytes);
  float d[kTileRanks / 8][4] = {};
  if (columns > 48) {
    multiply<T, 4>(d, factors, shared);
  } else if (columns > 32) {
    multiply<T, 3>(d, factors, shared);
  } else if (columns > 16) {
    multiply<T, 2>(d, factors, shared);
  } else {
    multiply<T, 1>(d, factors, shared);
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto each = [&](auto&& act) {  // two neighbours at a time
#pragma unroll
    for (int n = 0; n < kTileRanks / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = 16 * warp + lane / 4 + 8 * i, c = 8 * n + 2 * (lane % 4);
        if (t < count && c < columns)
          act(static_cast<int64_t>(first + t) * capacity + r0 + c, d[n][2 * i], d[n][2 * i + 1]);
      }
    }
  };
  if (gridDim.z == 1) {
    each([&](int64_t at, float low, float high) {
      *reinterpret_cast<uint32_t*>(h + at) = Pair<T>::pack(low, high);
    });
    return;
  }
  const int64_t stride = static_cast<int64_t>(num_tokens) * capacity;
  each([&](int64_t at, float low, float high) {
    *reinterpret_cast<float2*>(partial + blockIdx.z * stride + at) = make_float2(low, high);
  });
  if (!comes_last(arrived + blockIdx.y * gridDim.x + blockIdx.x, gridDim.z)) return;
  const int pieces = (columns + 3) / 4;  // of 4 ranks
  for (int i = threadIdx.x; i < count * pieces; i += 128) {
    const int64_t at = static_cast<int64_t>(first + i / pieces) * capacity + r0 + i % pieces * 4;
    const float4 sum = sum_parts(partial + at, stride, gridDim.z);
    *reinterpret_cast<uint2*>(h + at) =
        make_uint2(Pair<T>::pack(sum.x, sum.y), Pair<T>::pack(sum.z, sum.w));
  }
}

// Of a multiprocessor. With 8, those of 4,096 tokens and outputs are all there at once on 132; compiled
// for 8.x they would spill.
#if __CUDA_ARCH__ == 900
constexpr int kExpandBlocks = 8;
#else
constexpr int kExpandBlocks = 7;
#endif

// y += the update. grid (output tiles, token tiles).
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kExpandBlocks)
    expand_prefill_kernel(T* y, Pending pending, int y_width) {
  let_next_begin();
  wait_for_inputs();
  const TileTokens tokens(pending, blockIdx.y);
  if (tokens.count == 0) return;  // a captured step has room for more tiles
  const SiteRow& row = row_of(pending.site, tokens.slot);
  Tile tile;
  if (!find_tile(pending.site, row, blockIdx.x, kTileOuts, tile)) return;
  const int start = tile.y_start + tile.start, columns = tile.width - tile.start;
  const int offset = threadIdx.x / 32 * kWarpOuts;
  T* y_tile = y + static_cast<int64_t>(tokens.first) * y_width + start;
  ProductRing<T, 1> ring(y_tile, y_width, 0, tokens.count, columns);
  const auto part = warp_part_at<T>(pending.site, row, start + offset, columns - offset);
  finish_products(
      ring, part, pending, tokens,
      [&](int t, int token, const uint4& sum) {
        T* at = y_tile + static_cast<int64_t>(t + token) * y_width + lane_output();
        if (t + token < tokens.count && lane_output() < columns)
          *reinterpret_cast<uint4*>(at) = sum;
      },
      [](int) {});
}

template <typename T>
int shrink(float* partial, int* arrived, const void* x, const Pending& pending,
           cudaStream_t stream) {
  constexpr int kBytes = kShrinkStages * 2 * kBoxBytes;
  static const cudaError_t allowed = cudaFuncSetAttribute(
      shrink_prefill_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (allowed != cudaSuccess) return allowed;
  const dim3 grid((pending.capacity + kTileRanks - 1) / kTileRanks, pending.num_tiles,
                  pending.splits);
  return launch(shrink_prefill_kernel<T>, grid, 128, kBytes, stream,
                static_cast<T*>(const_cast<void*>(pending.h)), partial, arrived,
                static_cast<const T*>(x), pending.site, pending.tiles, pending.num_tokens,
                pending.capacity);
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

extern "C" int lorafleet_lora_shrink_tiles(int is_half, const void* x, float* partial, int* arrived,
                                           const Pending* pending, cudaStream_t stream) {
  return is_half ? shrink<__half>(partial, arrived, x, *pending, stream)
                 : shrink<__nv_bfloat16>(partial, arrived, x, *pending, stream);
}

extern "C" int lorafleet_lora_expand_tiles(int is_half, void* y, const Pending* pending,
                                           cudaStream_t stream) {
  return is_half ? expand<__half>(y, *pending, stream) : expand<__nv_bfloat16>(y, *pending, stream);
}
