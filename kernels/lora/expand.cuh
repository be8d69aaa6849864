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

// B may be another warp's too, of a token with the same slot: it may stay in the L1.
__device__ inline uint4 load_shared_rows(const void* address) {
  return __ldg(static_cast<const uint4*>(address));
}

// The sum of every other split from `first` on, kAtOnce of them on their way at a time: there are few,
// and a loop over them would wait for each.
__device__ inline float sum_splits(const float* at, int64_t stride, int first, int splits) {
  constexpr int kAtOnce = 7;
  float sum = 0.f;
  for (int s = first; s < splits; s += 2 * kAtOnce) {
    float found[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int split = s + 2 * i;
      found[i] = split < splits ? at[split * stride] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sum += found[i];
  }
  return sum;
}

constexpr int kRankRows = 16;

// 16 ranks of B, 8 outputs for each lane. Needs nothing that a kernel of this step writes.
template <typename T>
struct RankRows {
  uint4 rows[kRankRows];

  __device__ void load(const Part<T>& part, int r0, int offset, bool inside) {
#pragma unroll
    for (int i = 0; i < kRankRows; ++i)
      rows[i] = inside && r0 + i < part.rank
                    ? load_shared_rows(part.b + static_cast<int64_t>(r0 + i) * part.width + offset)
                    : make_uint4(0, 0, 0, 0);
  }
  __device__ void arrive() const {}
  __device__ const uint4& row(int i) const { return rows[i]; }
};

// The same in shared memory, for blocks that find room for their registers beside a product.
template <typename T>
struct StagedRankRows {
  uint4 (*rows)[32];  // kRankRows, of this warp

  __device__ void load(const Part<T>& part, int r0, int offset, bool inside) {
    asm volatile("" ::: "memory");  // what was there has been read
#pragma unroll
    for (int i = 0; i < kRankRows; ++i)
      copy_async(shared_address(&rows[i][threadIdx.x % 32]),
                 part.b + static_cast<int64_t>(r0 + i) * part.width + offset,
                 inside && r0 + i < part.rank);
  }
  // A lane reads what it copied itself.
  __device__ void arrive() const { asm volatile("cp.async.wait_all;" ::: "memory"); }
  __device__ const uint4& row(int i) const { return rows[i][threadIdx.x % 32]; }
};

// One warp: acc += h[token] @ B over the 8 outputs from this lane's `offset` in the part, 16 ranks at
// a time, `rows` being the first. Of two lanes with one rank each sums every other split.
template <typename T, typename Rows>
__device__ void expand_warp(float (&acc)[kWide], Rows& rows, const Pending& pending,
                            const Part<T>& part, int token, int offset, bool inside) {
  constexpr int kRanks = kRankRows;
  const int lane = threadIdx.x % 32;
  const int64_t split_stride = static_cast<int64_t>(pending.num_tokens) * pending.capacity;
#pragma unroll 1
  for (int r0 = 0; r0 < part.rank; r0 += kRanks) {
    if (r0 > 0) rows.load(part, r0, offset, inside);
    const int rank = r0 + lane % kRanks;
    float h = 0.f;
    if (rank < part.rank) {
      const float* at = pending.partial + static_cast<int64_t>(token) * pending.capacity +
                        part.h_start + rank;
      h = sum_splits(at, split_stride, lane / kRanks, pending.splits);
    }
    h = rounded<T>(h + __shfl_xor_sync(kFullWarp, h, kRanks));
    rows.arrive();
#pragma unroll
    for (int i = 0; i < kRanks; ++i) {
      const float scale = __shfl_sync(kFullWarp, h, i);
      const Vec<T> b = Vec<T>::unpack(rows.row(i));
#pragma unroll
      for (int j = 0; j < kWide; ++j) acc[j] += scale * b.x[j];
    }
  }
}

}  // namespace lorafleet
