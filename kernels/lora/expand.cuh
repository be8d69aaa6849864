// The decode expand of one warp, for a kernel of its own and for those that read its product next.
#pragma once

#include "shrink.cuh"

namespace lorafleet {

// What a product still lacks: each row's shrunk x, to be multiplied by the B of its slot.
struct Pending {
  const float* partial;  // [splits, num_tokens, capacity]
  Site site;
  const int* row_slots;
  int num_tokens, capacity, splits;
};

// The part of one slot's adapter that an output of the site gets: b is at that output.
template <typename T>
struct Part {
  const T* b;
  int width, rank, h_start;
};

template <typename T>
__device__ Part<T> part_at(const Site& site, const SiteRow& row, int output) {
  int h_start = 0;
#pragma unroll
  for (int i = 0; i < kMaxTargets; ++i) {
    const int rank = static_cast<int>(row.pairs[2 * i]);
    if (output < site.outs[i])
      return {static_cast<const T*>(site.arena) + row.pairs[2 * i + 1] + output, site.outs[i], rank,
              h_start};
    output -= site.outs[i];
    h_start += rank;
  }
  return {nullptr, 0, 0, 0};
}

// One warp, for `count` tokens of one slot from `token`: acc[j] += h[token + j] @ B over the 8
// outputs from this lane's `offset` in the part. 16 ranks at a time, their B on its way before h.
template <typename T, int kTokens>
__device__ void expand_warp(float (&acc)[kTokens][8], const Pending& pending, const Part<T>& part,
                            int token, int count, int offset, bool inside) {
  constexpr int kRanks = 16, kHeld = (kTokens + 1) / 2;
  const int lane = threadIdx.x % 32;
  for (int r0 = 0; r0 < part.rank; r0 += kRanks) {
    uint4 rows[kRanks];
#pragma unroll
    for (int i = 0; i < kRanks; ++i)
      rows[i] = load_or_zero(part.b + static_cast<int64_t>(r0 + i) * part.width + offset,
                             inside && r0 + i < part.rank);
    float h[kHeld] = {};  // lane: rank r0 + lane % 16 of tokens lane / 16, lane / 16 + 2
    const int rank = r0 + lane % kRanks;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int j = 2 * i + lane / kRanks;
      if (j < count && rank < part.rank) {
        const float* at = pending.partial + part.h_start + rank +
                          static_cast<int64_t>(token + j) * pending.capacity;
#pragma unroll 8
        for (int s = 0; s < pending.splits; ++s)
          h[i] += at[static_cast<int64_t>(s) * pending.num_tokens * pending.capacity];
      }
      h[i] = rounded<T>(h[i]);
    }
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      const uint32_t bits[4] = {rows[r].x, rows[r].y, rows[r].z, rows[r].w};
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        const float scale = __shfl_sync(kFullWarp, h[j / 2], j % 2 * kRanks + r);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 pair = Pair<T>::unpack(bits[i]);
          acc[j][2 * i] += scale * pair.x;
          acc[j][2 * i + 1] += scale * pair.y;
        }
      }
    }
  }
}

}  // namespace lorafleet
