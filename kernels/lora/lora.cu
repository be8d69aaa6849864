// LoRA for mixed batches: contracts in cuda.py. Shrink writes float32 partial sums of x @ A^T,
// expand sums them, rounds to the serving dtype, multiplies by B and adds to y.
#include "expand.cuh"

namespace lorafleet {
namespace {

constexpr int kOutTile = 256;  // outputs of one decode-expand block: 8 for each lane

// grid (rank tiles, tokens, splits); block kWarps warps.
template <typename T, int kWarps>
__global__ void __launch_bounds__(32 * kWarps)
    shrink_decode_kernel(float* partial, const T* x, Site site, const int* row_slots,
                         int num_tokens, int capacity) {
  shrink_decode<T, kWarps>(partial, x, site, row_slots, num_tokens, capacity, blockIdx.x,
                           blockIdx.y, blockIdx.z, gridDim.z);
}

// Which target a tile of outputs belongs to, and where it starts there.
struct Tile {
  int target, start, h_start, y_start, width, rank;
  int64_t b_offset;
};

__device__ bool find_tile(const Site& site, const SiteRow& row, int index, int tile, Tile& found) {
  int h_start = 0, y_start = 0;
#pragma unroll
  for (int i = 0; i < kMaxTargets; ++i) {
    const int tiles = (site.outs[i] + tile - 1) / tile;
    const int rank = static_cast<int>(row.pairs[2 * i]);
    if (index < tiles) {
      found = {i, index * tile, h_start, y_start, site.outs[i], rank, row.pairs[2 * i + 1]};
      return rank > 0;
    }
    index -= tiles;
    h_start += rank;
    y_start += site.outs[i];
  }
  return false;
}

constexpr int kAhead = 4;  // rank rows of B that a warp has on their way before h is known

// kTokens tokens from `token`: each warp takes every kWarps-th rank row of B.
template <typename T, int kWarps, int kTokens>
__device__ void expand_tokens(T* y, const Site& site, const Tile& tile, const float* h, int h_width,
                              float (*sums)[kTokens][kOutTile], const uint4 (&ahead)[kAhead],
                              int token, int y_width) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int out = tile.start + lane * 8;
  const bool inside = out < tile.width;
  const T* b = static_cast<const T*>(site.arena) + tile.b_offset + out;
  // This thread adds to two outputs of every token: on their way while B is read.
  const int column = 2 * threadIdx.x;
  const bool adds = tile.start + column < tile.width;
  uint32_t* target = reinterpret_cast<uint32_t*>(y + static_cast<int64_t>(token) * y_width +
                                                 tile.y_start + tile.start + column);
  uint32_t before[kTokens];
#pragma unroll
  for (int j = 0; j < kTokens; ++j) before[j] = adds ? target[j * y_width / 2] : 0;
  float acc[kTokens][8] = {};
  const auto add = [&](const uint4& raw, int r) {
    const uint32_t bits[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = Pair<T>::unpack(bits[i]);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        const float scale = h[j * h_width + r];
        acc[j][2 * i] += scale * pair.x;
        acc[j][2 * i + 1] += scale * pair.y;
      }
    }
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (warp + kWarps * i < tile.rank) add(ahead[i], warp + kWarps * i);
#pragma unroll 4
  for (int r = warp + kWarps * kAhead; r < tile.rank; r += kWarps)
    add(load_or_zero(b + static_cast<int64_t>(r) * tile.width, inside), r);
#pragma unroll
  for (int j = 0; j < kTokens; ++j)
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[warp][j][lane * 8 + i] = acc[j][i];
  __syncthreads();
  static_assert(32 * kWarps == kOutTile / 2, "a thread for every two outputs");
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    float2 sum = Pair<T>::unpack(before[j]);
    float low = 0.f, high = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      low += sums[w][j][column];
      high += sums[w][j][column + 1];
    }
    if (adds) target[j * y_width / 2] = Pair<T>::pack(sum.x + low, sum.y + high);
  }
  __syncthreads();
}

// grid (output tiles, tokens); block kWarps warps. Dynamic shared memory: h [kGroup, max rank].
template <typename T, int kWarps>
__global__ void __launch_bounds__(32 * kWarps)
    expand_decode_kernel(T* y, const float* partial, Site site, const int* row_slots,
                         int num_tokens, int capacity, int splits, int y_width) {
  extern __shared__ float h[];
  __shared__ float sums[kWarps * 4 * kOutTile];
  const int token = blockIdx.y;
  const int count = run_from(row_slots, token, num_tokens);
  if (count == 0) return;
  const SiteRow& row = row_of(site, row_slots[token]);
  Tile tile;
  if (row.rank_total == 0 || !find_tile(site, row, blockIdx.x, kOutTile, tile)) return;
  const int warp = threadIdx.x / 32, out = tile.start + threadIdx.x % 32 * 8;
  const T* b = static_cast<const T*>(site.arena) + tile.b_offset + out;
  uint4 ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int r = warp + kWarps * i;
    ahead[i] = load_or_zero(b + static_cast<int64_t>(r) * tile.width,
                            r < tile.rank && out < tile.width);
  }
  for (int i = threadIdx.x; i < count * tile.rank; i += 32 * kWarps) {
    const int j = i / tile.rank, r = i % tile.rank;
    float sum = 0.f;
    for (int s = 0; s < splits; ++s) {
      const int64_t at = static_cast<int64_t>(s) * num_tokens + token + j;
      sum += partial[at * capacity + tile.h_start + r];
    }
    h[i] = rounded<T>(sum);
  }
  __syncthreads();
  int done = 0;
  for (; done + 4 <= count; done += 4)
    expand_tokens<T, kWarps, 4>(y, site, tile, h + done * tile.rank, tile.rank,
                                reinterpret_cast<float(*)[4][kOutTile]>(sums), ahead, token + done,
                                y_width);
  for (; done < count; ++done)
    expand_tokens<T, kWarps, 1>(y, site, tile, h + done * tile.rank, tile.rank,
                                reinterpret_cast<float(*)[1][kOutTile]>(sums), ahead, token + done,
                                y_width);
}

// The expand where warps enough are busy without sharing ranks: a warp by itself takes one token and
// 256 outputs, 16 ranks at a time, and none waits for another. Tokens of one slot read the same B,
// from the L2. grid (pairs of output tiles, tokens).
constexpr int kAloneWarps = 2;

template <typename T>
__global__ void __launch_bounds__(32 * kAloneWarps, 8)
    expand_alone_kernel(T* y, Pending pending, int y_width) {
  const int token = blockIdx.y;
  const int slot = pending.row_slots[token];
  if (slot == 0) return;
  const SiteRow& row = row_of(pending.site, slot);
  Tile tile;
  const int index = blockIdx.x * kAloneWarps + threadIdx.x / 32;
  if (row.rank_total == 0 || !find_tile(pending.site, row, index, kOutTile, tile)) return;
  const int out = tile.start + threadIdx.x % 32 * 8;
  const bool inside = out < tile.width;
  T* target = y + static_cast<int64_t>(token) * y_width + tile.y_start + out;
  const Vec<T> before = inside ? Vec<T>::load(target) : Vec<T>{};
  const Part<T> part{static_cast<const T*>(pending.site.arena) + tile.b_offset, tile.width,
                     tile.rank, tile.h_start};
  float acc[1][8] = {};
  expand_warp<T, 1>(acc, pending, part, token, 1, out, inside);
  if (inside) before.plus(acc[0]).store(target);
}

// Prefill. tiles: int32 [num_tiles, 3] = (slot, first token, end), at most 64 tokens each.
constexpr int kTileTokens = 64;
constexpr int kTileRanks = 64;

// grid (rank tiles of 64, token tiles, splits); 8 warps: 4 x 16 tokens, 2 halves of k.
template <typename T>
__global__ void __launch_bounds__(256)
    shrink_prefill_kernel(float* partial, const T* x, Site site, const int* tiles, int num_tokens,
                          int capacity) {
  const int* tile = tiles + 3 * blockIdx.y;
  const SiteRow& row = row_of(site, tile[0]);
  const int rank_total = static_cast<int>(row.rank_total);
  const int r0 = blockIdx.x * kTileRanks;
  if (r0 >= rank_total) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, quad = lane % 4;
  const int first = tile[1] + 16 * (warp % 4), end = tile[2];
  const int k_size = site.in_features;
  const T* a = static_cast<const T*>(site.arena) + row.a_offset;
  const T* x_low = x + static_cast<int64_t>(first + group) * k_size;
  const T* x_high = x_low + static_cast<int64_t>(8) * k_size;
  const bool has_low = first + group < end, has_high = first + group + 8 < end;
  const int columns = min(kTileRanks, rank_total - r0);

  float d[kTileRanks / 8][4] = {};
  const int stride = 32 * 2 * gridDim.z;
  if (first < end) {
    for (int k = 32 * (warp / 4 + 2 * blockIdx.z); k < k_size; k += stride) {
      const int at = k + quad * 8;
      const bool inside = at < k_size;
      const uint4 low = inside && has_low ? load16(x_low + at) : make_uint4(0, 0, 0, 0);
      const uint4 high = inside && has_high ? load16(x_high + at) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int n = 0; n < kTileRanks / 8; ++n) {
        if (8 * n >= columns) break;
        const int rank = r0 + 8 * n + group;
        const T* a_row = a + static_cast<int64_t>(rank) * k_size + at;
        const uint4 as = inside && rank < rank_total ? load16(a_row) : make_uint4(0, 0, 0, 0);
        mma_pieces<T>(d[n], low, high, as);
      }
    }
  }
  // The two halves of k meet in shared memory: [4 token groups][16 tokens][64 ranks].
  __shared__ float sums[4][16][kTileRanks + 1];
  float(*mine)[kTileRanks + 1] = sums[warp % 4];
  if (warp >= 4) {
#pragma unroll
    for (int n = 0; n < kTileRanks / 8; ++n) {
      mine[group][8 * n + 2 * quad] = d[n][0];
      mine[group][8 * n + 2 * quad + 1] = d[n][1];
      mine[group + 8][8 * n + 2 * quad] = d[n][2];
      mine[group + 8][8 * n + 2 * quad + 1] = d[n][3];
    }
  }
  __syncthreads();
  if (warp >= 4) return;
#pragma unroll
  for (int n = 0; n < kTileRanks / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = group + 8 * (i / 2), c = 8 * n + 2 * quad + i % 2;
      if (first + t < end && c < columns) {
        const int64_t at = static_cast<int64_t>(blockIdx.z) * num_tokens + first + t;
        partial[at * capacity + r0 + c] = d[n][i] + mine[t][c];
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
__global__ void __launch_bounds__(128, 3)
    expand_prefill_kernel(T* y, const T* h, Site site, const int* tiles, int capacity,
                          int y_width) {
  constexpr int kPad = 8;
  __shared__ __align__(16) T b_tile[16][kPrefillOuts + kPad];
  __shared__ __align__(16) T h_tile[kTileTokens][16 + kPad];
  __shared__ __align__(16) float sums[kTileTokens][kPrefillOuts + 4];
  const int* place = tiles + 3 * blockIdx.y;
  const SiteRow& row = row_of(site, place[0]);
  Tile tile;
  if (row.rank_total == 0 || !find_tile(site, row, blockIdx.x, kPrefillOuts, tile)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, quad = lane % 4;
  const int first = place[1], count = place[2] - place[1];
  const T* b = static_cast<const T*>(site.arena) + tile.b_offset + tile.start;
  const T zero = Pair<T>::round(0.f);
  // y is on its way while the product is computed: 16 bytes a piece, 8 pieces a thread.
  constexpr int kPieces = kTileTokens * kPrefillOuts / 8 / 128;
  T* y_tile = y + static_cast<int64_t>(first) * y_width + tile.y_start + tile.start;
  uint4 before[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int i = threadIdx.x + 128 * p;
    const int t = i / (kPrefillOuts / 8), c = 8 * (i % (kPrefillOuts / 8));
    before[p] = t < count && tile.start + c < tile.width
                    ? load16(y_tile + static_cast<int64_t>(t) * y_width + c)
                    : make_uint4(0, 0, 0, 0);
  }
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
#pragma unroll
  for (int n = 0; n < kPrefillOuts / 8; ++n) {
    const int t = 16 * warp + group, c = 8 * n + 2 * quad;
    *reinterpret_cast<float2*>(&sums[t][c]) = make_float2(d[n][0], d[n][1]);
    *reinterpret_cast<float2*>(&sums[t + 8][c]) = make_float2(d[n][2], d[n][3]);
  }
  __syncthreads();
  // Through shared memory, so that y is read and written 16 bytes at a time.
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    const int i = threadIdx.x + 128 * p;
    const int t = i / (kPrefillOuts / 8), c = 8 * (i % (kPrefillOuts / 8));
    if (t >= count || tile.start + c >= tile.width) continue;
    const uint32_t bits[4] = {before[p].x, before[p].y, before[p].z, before[p].w};
    uint32_t result[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 old = Pair<T>::unpack(bits[j]);
      result[j] = Pair<T>::pack(old.x + sums[t][c + 2 * j], old.y + sums[t][c + 2 * j + 1]);
    }
    *reinterpret_cast<uint4*>(y_tile + static_cast<int64_t>(t) * y_width + c) =
        make_uint4(result[0], result[1], result[2], result[3]);
  }
}

int tiles_of(const Site& site, int tile) {
  int total = 0;
  for (int out : site.outs) total += (out + tile - 1) / tile;
  return total;
}

int width_of(const Site& site) { return site.outs[0] + site.outs[1] + site.outs[2]; }

template <typename T>
int launch_shrink(float* partial, const void* x, const Site& site, const int* row_slots, int tokens,
                  int capacity, int splits, cudaStream_t stream) {
  constexpr int kWarps = 8;
  const dim3 grid((capacity + kRankTile - 1) / kRankTile, tokens, splits);
  shrink_decode_kernel<T, kWarps><<<grid, 32 * kWarps, 0, stream>>>(
      partial, static_cast<const T*>(x), site, row_slots, tokens, capacity);
  return cudaGetLastError();
}

template <typename T>
int expand_decode(void* y, const float* partial, const Site& site, const int* row_slots, int tokens,
                  int capacity, int max_rank, int splits, cudaStream_t stream) {
  if (tokens >= (max_rank <= 32 ? 4 : 16)) {
    const dim3 pairs((tiles_of(site, kOutTile) + kAloneWarps - 1) / kAloneWarps, tokens);
    const Pending pending{partial, site, row_slots, tokens, capacity, splits};
    expand_alone_kernel<T>
        <<<pairs, 32 * kAloneWarps, 0, stream>>>(static_cast<T*>(y), pending, width_of(site));
    return cudaGetLastError();
  }
  constexpr int kWarps = 4;
  const dim3 grid(tiles_of(site, kOutTile), tokens);
  expand_decode_kernel<T, kWarps><<<grid, 32 * kWarps, kGroup * max_rank * sizeof(float), stream>>>(
      static_cast<T*>(y), partial, site, row_slots, tokens, capacity, splits, width_of(site));
  return cudaGetLastError();
}

template <typename T>
int prefill(void* y, void* h, float* partial, const void* x, const Site& site, const int* tiles,
            int num_tiles, int tokens, int capacity, int splits, cudaStream_t stream) {
  const dim3 shrink((capacity + kTileRanks - 1) / kTileRanks, num_tiles, splits);
  shrink_prefill_kernel<T><<<shrink, 256, 0, stream>>>(partial, static_cast<const T*>(x), site,
                                                       tiles, tokens, capacity);
  reduce_prefill_kernel<T><<<num_tiles, 256, 0, stream>>>(static_cast<T*>(h), partial, site, tiles,
                                                          tokens, capacity, splits);
  const dim3 expand(tiles_of(site, kPrefillOuts), num_tiles);
  expand_prefill_kernel<T><<<expand, 128, 0, stream>>>(static_cast<T*>(y),
                                                       static_cast<const T*>(h), site, tiles,
                                                       capacity, width_of(site));
  return cudaGetLastError();
}

}  // namespace
}  // namespace lorafleet

using namespace lorafleet;

extern "C" int lorafleet_lora_shrink(int is_half, float* partial, const void* x, const void* arena,
                                     const int64_t* table, int64_t stride, int in_features,
                                     const int* row_slots, int tokens, int capacity, int splits,
                                     cudaStream_t stream) {
  const Site site{arena, table, stride, in_features, {0, 0, 0}};
  return is_half
             ? launch_shrink<__half>(partial, x, site, row_slots, tokens, capacity, splits, stream)
             : launch_shrink<__nv_bfloat16>(partial, x, site, row_slots, tokens, capacity, splits,
                                            stream);
}

extern "C" int lorafleet_lora_expand(int is_half, void* y, const float* partial, const void* arena,
                                     const int64_t* table, int64_t stride, int out0, int out1,
                                     int out2, const int* row_slots, int tokens, int capacity,
                                     int max_rank, int splits, cudaStream_t stream) {
  const Site site{arena, table, stride, 0, {out0, out1, out2}};
  return is_half ? expand_decode<__half>(y, partial, site, row_slots, tokens, capacity, max_rank,
                                         splits, stream)
                 : expand_decode<__nv_bfloat16>(y, partial, site, row_slots, tokens, capacity,
                                                max_rank, splits, stream);
}

extern "C" int lorafleet_lora_prefill(int is_half, void* y, void* h, float* partial, const void* x,
                                      const void* arena, const int64_t* table, int64_t stride,
                                      int in_features, int out0, int out1, int out2,
                                      const int* tiles, int num_tiles, int tokens, int capacity,
                                      int splits, cudaStream_t stream) {
  const Site site{arena, table, stride, in_features, {out0, out1, out2}};
  return is_half ? prefill<__half>(y, h, partial, x, site, tiles, num_tiles, tokens, capacity,
                                   splits, stream)
                 : prefill<__nv_bfloat16>(y, h, partial, x, site, tiles, num_tiles, tokens,
                                          capacity, splits, stream);
}
