// Where a site's adapters lie, as every LoRA kernel reads them; the table: cache/packed_form.py.
#pragma once

#include "../common.cuh"

namespace lorafleet {

constexpr int kGroup = 8;  // tokens of one slot that share the loads of its weights
constexpr int kMaxTargets = 3;

struct Site {
  const void* arena;
  const int64_t* table;  // rows of 8, `stride` apart
  int64_t stride;
  int in_features;
  int outs[kMaxTargets];  // 0 beyond the last target
};

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

// Which target a tile of outputs belongs to, and where it starts there.
struct Tile {
  int target = 0, start = 0, h_start = 0, y_start = 0, width = 0, rank = 0;
  int64_t b_offset = 0;
};

// False where the slot has nothing to add to the tile.
__device__ inline bool find_tile(const Site& site, const SiteRow& row, int index, int tile,
                                 Tile& found) {
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

inline int tiles_of(const Site& site, int tile) {
  int total = 0;
  for (int out : site.outs) total += (out + tile - 1) / tile;
  return total;
}

inline int width_of(const Site& site) { return site.outs[0] + site.outs[1] + site.outs[2]; }

}  // namespace lorafleet
