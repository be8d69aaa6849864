// LoRA for long segments, on tensor cores: contract in cuda.py. Shrink writes float32 partial sums of
// x @ A^T, reduce sums and rounds them, expand multiplies by B and writes what a product is then
// added to, so that no y is read and written once more.
#include "site.cuh"

namespace lorafleet {
namespace {

// Prefill. tiles: int32 [num_tiles, 3] = (slot, first token, end), at most 64 tokens each.
constexpr int kTileTokens = 64;
constexpr int kTileRanks = 64;

constexpr int kShrinkStages = 4;
constexpr int kBoxBytes = 64 * 128;  // 64 rows of 64 columns

// grid (rank tiles of 64, token tiles, splits); 4 warps of 16 tokens each.
template <typename T>
__global__ void __launch_bounds__(128)
    shrink_prefill_kernel(float* partial, const T* x, Site site, const int* tiles, int num_tokens,
                          int capacity) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];  // stages of x's box, then A's
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

// h [num_tokens, capacity] = round(sum of partial over splits), where the tile's slot has ranks.
template <typename T>
__global__ void reduce_prefill_kernel(T* h, const float* partial, Site site, const int* tiles,
                                      int num_tokens, int capacity, int splits) {
  const int* tile = tiles + 3 * blockIdx.x;
  const int rank_total = static_cast<int>(row_of(site, tile[0]).rank_total);
  const int count = (tile[2] - tile[1]) * rank_total;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int64_t at = static_cast<int64_t>(tile[1] + i / rank_total) * capacity + i % rank_total;
    float sum = 0.f;
    for (int s = 0; s < splits; ++s)
      sum += partial[static_cast<int64_t>(s) * num_tokens * capacity + at];
    h[at] = Pair<T>::round(sum);
  }
}

constexpr int kPrefillOuts = 128;

// grid (output tiles, token tiles); 4 warps, 16 tokens each, over 128 outputs.
template <typename T>
__global__ void __launch_bounds__(128, 5)
    expand_prefill_kernel(T* y, const T* h, const T* bias, Site site, const int* tiles,
                          int capacity, int y_width) {
  constexpr int kPad = 8;
  __shared__ __align__(16) T b_tile[16][kPrefillOuts + kPad];
  __shared__ __align__(16) T h_tile[kTileTokens][16 + kPad];
  __shared__ __align__(16) T out[kTileTokens][kPrefillOuts + kPad];
  const int* place = tiles + 3 * blockIdx.y;
  const SiteRow& row = row_of(site, place[0]);
  Tile tile;
  find_tile(site, row, blockIdx.x, kPrefillOuts, tile);  // rank 0: bias or zeros are written
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, quad = lane % 4;
  const int first = place[1], count = place[2] - place[1];
  const T* b = static_cast<const T*>(site.arena) + tile.b_offset + tile.start;
  const T zero = Pair<T>::round(0.f);
  float d[kPrefillOuts / 8][4] = {};
  for (int r0 = 0; r0 < tile.rank; r0 += 16) {
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * kPrefillOuts / 8; i += 128) {
      const int r = i / (kPrefillOuts / 8), c = 8 * (i % (kPrefillOuts / 8));
      const bool valid = r0 + r < tile.rank && tile.start + c < tile.width;
      *reinterpret_cast<uint4*>(&b_tile[r][c]) =
          load_or_zero(b + static_cast<int64_t>(r0 + r) * tile.width + c, valid);
    }
    for (int i = threadIdx.x; i < kTileTokens * 16; i += 128) {
      const int t = i / 16, r = i % 16;
      const bool valid = t < count && r0 + r < tile.rank;
      h_tile[t][r] =
          valid ? h[static_cast<int64_t>(first + t) * capacity + tile.h_start + r0 + r] : zero;
    }
    __syncthreads();
    const int t = 16 * warp + group;
    const uint32_t a0 = *reinterpret_cast<const uint32_t*>(&h_tile[t][2 * quad]);
    const uint32_t a1 = *reinterpret_cast<const uint32_t*>(&h_tile[t + 8][2 * quad]);
    const uint32_t a2 = *reinterpret_cast<const uint32_t*>(&h_tile[t][2 * quad + 8]);
    const uint32_t a3 = *reinterpret_cast<const uint32_t*>(&h_tile[t + 8][2 * quad + 8]);
#pragma unroll
    for (int n = 0; n < kPrefillOuts / 8; ++n) {
      uint32_t b0, b1;
      const uint32_t address =
          static_cast<uint32_t>(__cvta_generic_to_shared(&b_tile[lane % 16][8 * n]));
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                   : "=r"(b0), "=r"(b1)
                   : "r"(address));
      mma<T>(d[n], a0, a1, a2, a3, b0, b1);
    }
  }
  // Through shared memory, so that y is written 16 bytes at a time.
#pragma unroll
  for (int n = 0; n < kPrefillOuts / 8; ++n) {
    const int t = 16 * warp + group, c = 8 * n + 2 * quad;
    *reinterpret_cast<uint32_t*>(&out[t][c]) = Pair<T>::pack(d[n][0], d[n][1]);
    *reinterpret_cast<uint32_t*>(&out[t + 8][c]) = Pair<T>::pack(d[n][2], d[n][3]);
  }
  __syncwarp();  // a warp writes the tokens that it computed
  T* y_tile = y + static_cast<int64_t>(first) * y_width + tile.y_start + tile.start;
#pragma unroll
  for (int i = lane; i < 16 * kPrefillOuts / 8; i += 32) {
    const int t = 16 * warp + i / (kPrefillOuts / 8), c = 8 * (i % (kPrefillOuts / 8));
    if (t >= count || tile.start + c >= tile.width) continue;
    uint4 raw = *reinterpret_cast<const uint4*>(&out[t][c]);
    if (bias != nullptr) {
      Vec<T> sum = Vec<T>::load(bias + tile.y_start + tile.start + c).plus(Vec<T>::unpack(raw).x);
      sum.store(&out[t][c]);
      raw = *reinterpret_cast<const uint4*>(&out[t][c]);
    }
    *reinterpret_cast<uint4*>(y_tile + static_cast<int64_t>(t) * y_width + c) = raw;
  }
}

template <typename T>
int prefill(void* y, void* h, float* partial, const void* x, const void* bias, const Site& site,
            const int* tiles, int num_tiles, int tokens, int capacity, int splits,
            cudaStream_t stream) {
  constexpr int kBytes = kShrinkStages * 2 * kBoxBytes;
  static const cudaError_t allowed = cudaFuncSetAttribute(
      shrink_prefill_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (allowed != cudaSuccess) return allowed;
  const dim3 shrink((capacity + kTileRanks - 1) / kTileRanks, num_tiles, splits);
  shrink_prefill_kernel<T><<<shrink, 128, kBytes, stream>>>(partial, static_cast<const T*>(x), site,
                                                            tiles, tokens, capacity);
  reduce_prefill_kernel<T><<<num_tiles, 256, 0, stream>>>(static_cast<T*>(h), partial, site, tiles,
                                                          tokens, capacity, splits);
  const dim3 expand(tiles_of(site, kPrefillOuts), num_tiles);
  expand_prefill_kernel<T><<<expand, 128, 0, stream>>>(
      static_cast<T*>(y), static_cast<const T*>(h), static_cast<const T*>(bias), site, tiles,
      capacity, width_of(site));
  return cudaGetLastError();
}

}  // namespace
}  // namespace lorafleet

using namespace lorafleet;

extern "C" int lorafleet_lora_prefill(int is_half, void* y, void* h, float* partial, const void* x,
                                      const void* bias, const void* arena, const int64_t* table,
                                      int64_t stride, int in_features, int out0, int out1, int out2,
                                      const int* tiles, int num_tiles, int tokens, int capacity,
                                      int splits, cudaStream_t stream) {
  const Site site{arena, table, stride, in_features, {out0, out1, out2}};
  return is_half ? prefill<__half>(y, h, partial, x, bias, site, tiles, num_tiles, tokens, capacity,
                                   splits, stream)
                 : prefill<__nv_bfloat16>(y, h, partial, x, bias, site, tiles, num_tiles, tokens,
                                          capacity, splits, stream);
}
