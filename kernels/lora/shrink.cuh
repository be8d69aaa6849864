// The decode shrink, for a kernel of its own and for one that shares its launch with a product.
#pragma once

#include "site.cuh"

namespace lorafleet {

constexpr int kRankTile = 16;  // ranks of one item: the rows of one mma

// partial [splits, tokens, capacity] = x @ A^T of each token's slot, in splits over k. The work is
// cut into items, one for each tile of ranks, token and split.
struct Shrink {
  Site site;
  const int* row_slots;
  float* partial;
  int tokens, capacity, splits;

  __host__ __device__ int rank_tiles() const { return (capacity + kRankTile - 1) / kRankTile; }
  __host__ __device__ int items() const { return rank_tiles() * tokens * splits; }
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

// An item as one lane of its kWarps warps sees it. 64 k a warp and round: two pieces of 32, so that
// a quad reads 128 bytes of a row.
template <typename T, int kWarps>
struct ShrinkItem {
  int token, count, split, r0, rank_total;
  int first, stride;  // of k
  const T *a_low, *a_high;
  bool has_low, has_high;

  __device__ ShrinkItem(const Shrink& work, int item, int thread) {
    const int tiles = work.rank_tiles(), group = thread % 32 / 4;
    r0 = item % tiles * kRankTile;
    token = item / tiles % work.tokens;
    split = item / (tiles * work.tokens);
    count = run_from(work.row_slots, token, work.tokens);
    const SiteRow& row = row_of(work.site, work.row_slots[token]);
    rank_total = count == 0 ? 0 : static_cast<int>(row.rank_total);
    const int64_t wide = work.site.in_features;
    a_low = static_cast<const T*>(work.site.arena) + row.a_offset + (r0 + group) * wide;
    a_high = a_low + 8 * wide;
    has_low = r0 + group < rank_total;
    has_high = r0 + group + 8 < rank_total;
    first = 64 * (thread / 32 + kWarps * split);
    stride = 64 * kWarps * work.splits;
  }

  __device__ bool is_empty() const { return r0 >= rank_total; }

  // Starts the way of A to the L2; needs nothing that a kernel of this step writes.
  __device__ void start(const Shrink& work) const {
    for (int k = first + threadIdx.x % 4 * 16; k < work.site.in_features; k += stride) {
      if (has_low) prefetch(a_low + k);
      if (has_high) prefetch(a_high + k);
    }
  }

  // This warp's part of D[16 ranks x 8 tokens] = A x^T.
  __device__ void multiply(float (&d)[4], const Shrink& work, const T* x) const {
    const int group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    const int wide = work.site.in_features;
    const T* x_row = x + static_cast<int64_t>(token + group) * wide;
    const bool has_x = group < count;
#pragma unroll 2
    for (int k = first; k < wide; k += stride) {
      uint4 low[2], high[2], xs[2];
#pragma unroll
      for (int piece = 0; piece < 2; ++piece) {
        const int at = k + quad * 16 + piece * 8;
        const bool inside = at < wide;
        low[piece] = load_or_zero(a_low + at, inside && has_low);
        high[piece] = load_or_zero(a_high + at, inside && has_high);
        xs[piece] = inside && has_x ? load16(x_row + at) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int piece = 0; piece < 2; ++piece) mma_pieces<T>(d, low[piece], high[piece], xs[piece]);
    }
  }
};

// kWarps warps, each with its `thread` counted from the first of them: every gridDim.x-th item. Waits
// for x.
template <typename T, int kWarps>
__device__ void shrink_items(const Shrink& work, const T* x, int thread) {
  __shared__ float sums[kWarps][kRankTile][kGroup];
  const int items = work.items();
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const ShrinkItem<T, kWarps> mine(work, item, thread);
    if (!mine.is_empty()) mine.start(work);
  }
  wait_for_inputs();
  const int warp = thread / 32, group = thread % 32 / 4, quad = thread % 4;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const ShrinkItem<T, kWarps> mine(work, item, thread);
    if (mine.is_empty()) continue;
    float d[4] = {0.f, 0.f, 0.f, 0.f};
    mine.multiply(d, work, x);
    sums[warp][group][2 * quad] = d[0];
    sums[warp][group][2 * quad + 1] = d[1];
    sums[warp][group + 8][2 * quad] = d[2];
    sums[warp][group + 8][2 * quad + 1] = d[3];
    meet<kWarps, 2>();
    for (int i = thread; i < kRankTile * mine.count; i += 32 * kWarps) {
      const int rank = i % kRankTile, column = i / kRankTile;
      if (mine.r0 + rank >= mine.rank_total) continue;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += sums[w][rank][column];
      const int64_t at = static_cast<int64_t>(mine.split) * work.tokens + mine.token + column;
      work.partial[at * work.capacity + mine.r0 + rank] = sum;
    }
    meet<kWarps, 2>();
  }
}

}  // namespace lorafleet
