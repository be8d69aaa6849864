// The decode shrink, for a kernel of its own and for one that shares its launch with a product.
#pragma once

#include "../common.cuh"

namespace lorafleet {

constexpr int kGroup = 8;       // tokens of one slot that share the loads of its weights
constexpr int kRankTile = 16;   // ranks of one shrink block: the rows of one mma
constexpr int kMaxTargets = 3;

struct Site {
  const void* arena;
  const int64_t* table;    // rows of 8, `stride` apart
  int64_t stride;
  int in_features;
  int outs[kMaxTargets];   // 0 beyond the last target
};

// Tokens [token, token + count) form the part of a run of one slot that lies in one aligned group
// of kGroup; count is 0 where the token is not the first of such a part, or has no adapter.
__device__ inline int run_from(const int* row_slots, int token, int num_tokens) {
  const int slot = row_slots[token];
  if (slot == 0) return 0;
  if (token % kGroup != 0 && row_slots[token - 1] == slot) return 0;
  int count = 1;
  while (token + count < num_tokens && (token + count) % kGroup != 0 &&
         row_slots[token + count] == slot)
    ++count;
  return count;
}

__device__ inline const SiteRow& row_of(const Site& site, int slot) {
  return *reinterpret_cast<const SiteRow*>(site.table + slot * site.stride);
}

// Eight consecutive elements, or zeros.
template <typename T>
__device__ uint4 load_or_zero(const T* p, bool valid) {
  return valid ? load_stream(p) : make_uint4(0, 0, 0, 0);
}

// One warp: D[16 ranks x 8 tokens] += A x^T over the 32 k from `k`. Each lane takes 8 consecutive
// k of its rows; the order of k inside an mma is the same for both operands, so it does not matter.
template <typename T>
__device__ void mma_pieces(float (&d)[4], const uint4& low, const uint4& high, const uint4& x) {
  mma<T>(d, low.x, high.x, low.y, high.y, x.x, x.y);
  mma<T>(d, low.z, high.z, low.w, high.w, x.z, x.w);
}

// What one block of kWarps warps does: a tile of ranks of the run that starts at `token`, over
// every `splits`-th stretch of k.
template <typename T, int kWarps>
__device__ void shrink_decode(float* partial, const T* x, const Site& site, const int* row_slots,
                              int num_tokens, int capacity, int rank_tile, int token, int split,
                              int splits) {
  const int count = run_from(row_slots, token, num_tokens);
  if (count == 0) return;
  const SiteRow& row = row_of(site, row_slots[token]);
  const int rank_total = static_cast<int>(row.rank_total);
  const int r0 = rank_tile * kRankTile;
  if (r0 >= rank_total) return;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, quad = lane % 4;
  const int k_size = site.in_features;
  const T* a = static_cast<const T*>(site.arena) + row.a_offset;
  const bool has_low = r0 + group < rank_total, has_high = r0 + group + 8 < rank_total;
  const T* a_low = a + static_cast<int64_t>(r0 + group) * k_size;
  const T* a_high = a_low + static_cast<int64_t>(8) * k_size;
  const T* x_row = x + static_cast<int64_t>(token + group) * k_size;
  const bool has_x = group < count;

  // 64 k a warp and round: two pieces of 32, so that a quad reads 128 bytes of a row.
  float d[4] = {0.f, 0.f, 0.f, 0.f};
  const int stride = 64 * kWarps * splits;
#pragma unroll 2
  for (int k = 64 * (warp + kWarps * split); k < k_size; k += stride) {
    uint4 low[2], high[2], xs[2];
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      const int at = k + quad * 16 + piece * 8;
      const bool inside = at < k_size;
      low[piece] = load_or_zero(a_low + at, inside && has_low);
      high[piece] = load_or_zero(a_high + at, inside && has_high);
      xs[piece] = inside && has_x ? load16(x_row + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) mma_pieces<T>(d, low[piece], high[piece], xs[piece]);
  }

  __shared__ float sums[kWarps][kRankTile][kGroup];
  sums[warp][group][2 * quad] = d[0];
  sums[warp][group][2 * quad + 1] = d[1];
  sums[warp][group + 8][2 * quad] = d[2];
  sums[warp][group + 8][2 * quad + 1] = d[3];
  __syncthreads();
  const int rank = threadIdx.x % kRankTile, column = threadIdx.x / kRankTile;
  if (column < count && r0 + rank < rank_total) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w][rank][column];
    const int64_t at = static_cast<int64_t>(split) * num_tokens + token + column;
    partial[at * capacity + r0 + rank] = sum;
  }
}

}  // namespace lorafleet
