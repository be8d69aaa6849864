// LoRA for rows of one token, or few: contracts in cuda.py. Shrink writes float32 partial sums of
// x @ A^T, expand sums them, rounds to the serving dtype, multiplies by B and adds to y.
#include "expand.cuh"
#include "shrink.cuh"

namespace lorafleet {
namespace {

constexpr int kOutTile = 256;  // outputs of one decode-expand block: 8 for each lane

constexpr int kShrinkWarps = 8;

// A block an item.
template <typename T>
__global__ void __launch_bounds__(32 * kShrinkWarps) shrink_decode_kernel(const T* x, Shrink work) {
  let_next_begin();
  shrink_items<T, kShrinkWarps>(work, x, threadIdx.x);
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
  let_next_begin();
  wait_for_inputs();
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
// 256 outputs, a few ranks at a time, and none waits for another. Tokens of one slot read the same B,
// from the L2. grid (pairs of output tiles, tokens).
constexpr int kAloneWarps = 2;

template <typename T>
__global__ void __launch_bounds__(32 * kAloneWarps, 6)
    expand_alone_kernel(T* y, Pending pending, int y_width) {
  let_next_begin();
  const int token = blockIdx.y;
  const SiteRow& row = row_of(pending.site, pending.row_slots[token]);
  Tile tile;
  const int index = blockIdx.x * kAloneWarps + threadIdx.x / 32;
  const bool adds = find_tile(pending.site, row, index, kOutTile, tile);
  const int out = tile.start + threadIdx.x % 32 * 8;
  const bool inside = out < tile.width;
  const Part<T> part{static_cast<const T*>(pending.site.arena) + tile.b_offset, tile.width,
                     adds ? tile.rank : 0, tile.h_start};
  RankRows<T> rows;
  rows.load(part, 0, out, inside);
  wait_for_inputs();
  if (!adds) return;
  T* target = y + static_cast<int64_t>(token) * y_width + tile.y_start + out;
  const uint4 before = inside ? load16(target) : make_uint4(0, 0, 0, 0);
  float acc[kWide] = {};
  expand_warp(acc, rows, pending, part, token, out, inside);
  if (inside) Vec<T>::unpack(before).plus(acc).store(target);
}

template <typename T>
int launch_shrink(const void* x, const Shrink& work, cudaStream_t stream) {
  return launch(shrink_decode_kernel<T>, dim3(work.items()), 32 * kShrinkWarps, 0, stream,
                static_cast<const T*>(x), work);
}

template <typename T>
int expand_decode(void* y, const float* partial, const Site& site, const int* row_slots, int tokens,
                  int capacity, int max_rank, int splits, cudaStream_t stream) {
  if (tokens >= (max_rank <= 32 ? 4 : 16)) {
    const dim3 pairs((tiles_of(site, kOutTile) + kAloneWarps - 1) / kAloneWarps, tokens);
    const Pending pending{site, capacity, partial, row_slots, tokens, splits};
    return launch(expand_alone_kernel<T>, pairs, 32 * kAloneWarps, 0, stream,
                  static_cast<T*>(y), pending, width_of(site));
  }
  constexpr int kWarps = 4;
  const dim3 grid(tiles_of(site, kOutTile), tokens);
  return launch(expand_decode_kernel<T, kWarps>, grid, 32 * kWarps,
                kGroup * max_rank * sizeof(float), stream, static_cast<T*>(y), partial, site,
                row_slots, tokens, capacity, splits, width_of(site));
}

}  // namespace
}  // namespace lorafleet

using namespace lorafleet;

extern "C" int lorafleet_lora_shrink(int is_half, const void* x, const Shrink* work,
                                     cudaStream_t stream) {
  return is_half ? launch_shrink<__half>(x, *work, stream)
                 : launch_shrink<__nv_bfloat16>(x, *work, stream);
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
