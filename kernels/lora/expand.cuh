// The decode expand of one warp, for a kernel of its own and for those that read its product next.
#pragma once

#include "site.cuh"

namespace lorafleet {

// What a product still lacks: each row's shrunk x, to be multiplied by the B of its slot. Either of
// rows of few tokens (partial sums, slots found by row) or of tiles.
struct Pending {
  Site site;
  int capacity;  // ranks from one token to the next
  const float* partial;  // [splits, num_tokens, capacity]
  const int* row_slots;
  int num_tokens, splits;
  const void* h;  // [num_tokens, capacity], summed and rounded; only a slot's ranks are written
  const int* tiles;  // [num_tiles, 3]: slot, first token, end; null where there are none
  int num_tiles;
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

// Starts the way of the first ranks of B to the L2, each lane's 8 outputs from `offset`.
template <typename T>
__device__ void prefetch_part(const Part<T>& part, int offset) {
  const int count = min(part.rank, 16);
#pragma unroll 4
  for (int r = 0; r < count; ++r)
    prefetch(part.b + static_cast<int64_t>(r) * part.width + offset);
}

// B may be another warp's too, of a token with the same slot: it may stay in the L1.
__device__ inline uint4 load_shared_rows(const void* address) {
  return __ldg(static_cast<const uint4*>(address));
}

// The sum of every kStep-th split from `first` on, kAtOnce of them on their way at a time: there are
// few, and a loop over them would wait for each.
template <int kAtOnce, int kStep>
__device__ float sum_splits(const float* at, int64_t stride, int first, int splits) {
  float sum = 0.f;
  for (int s = first; s < splits; s += kAtOnce * kStep) {
    float found[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int split = s + i * kStep;
      found[i] = split < splits ? at[split * stride] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sum += found[i];
  }
  return sum;
}

// One warp: acc += h[token] @ B over the 8 outputs from this lane's `offset` in the part, 16 ranks at
// a time. All of their h and half of their B are on the way at once, the other half before the first
// is used. Of two lanes with one rank each sums every other split.
template <typename T>
__device__ void expand_warp(float (&acc)[kWide], const Pending& pending, const Part<T>& part,
                            int token, int offset, bool inside) {
  constexpr int kRanks = 16, kAtOnce = 8;
  const int lane = threadIdx.x % 32;
  const int64_t split_stride = static_cast<int64_t>(pending.num_tokens) * pending.capacity;
  const auto load = [&](uint4(&rows)[kAtOnce], int r0) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      rows[i] = inside && r0 + i < part.rank
                    ? load_shared_rows(part.b + static_cast<int64_t>(r0 + i) * part.width + offset)
                    : make_uint4(0, 0, 0, 0);
  };
  const auto add = [&](const uint4(&rows)[kAtOnce], float h, int first_lane) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float scale = __shfl_sync(kFullWarp, h, first_lane + i);
      const Vec<T> b = Vec<T>::unpack(rows[i]);
#pragma unroll
      for (int j = 0; j < kWide; ++j) acc[j] += scale * b.x[j];
    }
  };
#pragma unroll 1
  for (int r0 = 0; r0 < part.rank; r0 += kRanks) {
    uint4 low[kAtOnce], high[kAtOnce];
    load(low, r0);
    const int rank = r0 + lane % kRanks;
    float h = 0.f;
    if (rank < part.rank) {
      const float* at = pending.partial + static_cast<int64_t>(token) * pending.capacity +
                        part.h_start + rank;
      h = sum_splits<3, 2>(at, split_stride, lane / kRanks, pending.splits);
    }
    load(high, r0 + kAtOnce);
    h = rounded<T>(h + __shfl_xor_sync(kFullWarp, h, kRanks));
    add(low, h, 0);
    add(high, h, kAtOnce);
  }
}

}  // namespace lorafleet
