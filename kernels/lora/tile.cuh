// The prefill expand of one tile, for a kernel of its own and for those that read its product next.
#pragma once

#include "expand.cuh"

namespace lorafleet {

constexpr int kTileTokens = 64;
constexpr int kTileOuts = 128;  // in two halves
constexpr int kHalfOuts = kTileOuts / 2;
constexpr int kTileThreads = 128;  // a warp for 16 tokens
constexpr int kTilePad = 8;
constexpr int kWarpTokens = 32;  // of a warp with half of the outputs

// Tokens [first, first + count) of one slot.
struct TileTokens {
  int slot, first, count;

  __device__ TileTokens(const Pending& pending, int index)
      : slot(pending.tiles[3 * index]),
        first(pending.tiles[3 * index + 1]),
        count(pending.tiles[3 * index + 2] - first) {}
};

// 64 outputs of a tile, of which the first `columns` are there.
template <typename T>
struct Half {
  Part<T> part;
  int columns;
};

template <typename T>
__device__ Half<T> half_at(const Site& site, const SiteRow& row, int output, int columns) {
  if (columns <= 0) return {{nullptr, 0, 0, 0}, 0};
  return {part_at<T>(site, row, output), min(columns, kHalfOuts)};
}

template <typename T>
using TileOuts = T[kTileTokens][kTileOuts + kTilePad];

// The tile's tokens x 16 ranks of h from rank r0 on, zeros where there is none.
template <typename T>
__device__ void load_h_tile(T (*h_tile)[16 + kTilePad], const Pending& pending,
                            const Part<T>& part, const TileTokens& tokens, int r0) {
  const T* h = static_cast<const T*>(pending.h) + static_cast<int64_t>(tokens.first) *
               pending.capacity + part.h_start + r0;
  if ((part.h_start | pending.capacity | part.rank) % kWide == 0) {
    const int t = threadIdx.x / 2, r = threadIdx.x % 2 * kWide;
    const bool valid = t < tokens.count && r0 + r < part.rank;
    *reinterpret_cast<uint4*>(&h_tile[t][r]) =
        valid ? load16(h + static_cast<int64_t>(t) * pending.capacity + r)
              : make_uint4(0, 0, 0, 0);
    return;
  }
  const T zero = Pair<T>::round(0.f);
  for (int i = threadIdx.x; i < kTileTokens * 16; i += kTileThreads) {
    const int t = i / 16, r = i % 16;
    const bool valid = t < tokens.count && r0 + r < part.rank;
    h_tile[t][r] = valid ? h[static_cast<int64_t>(t) * pending.capacity + r] : zero;
  }
}

// Has the products of a warp's 16 tokens on their way to its rows of `tile`, half by half; each half
// has so many columns and begins at the first token's `products`. What comes of B is looked up
// meanwhile.
template <typename T>
__device__ void fetch_products(TileOuts<T>& tile, const int (&columns)[2],
                               const T* const (&products)[2], int64_t width, int count) {
  const int c = threadIdx.x % (kTileOuts / kWide) * kWide, at = c % kHalfOuts;
  const bool is_second = c >= kHalfOuts;
  const T* from = (is_second ? products[1] : products[0]) + at;
  const bool is_there = at < (is_second ? columns[1] : columns[0]);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int t = threadIdx.x / 32 * 16 + 2 * i + threadIdx.x % 32 / (kTileOuts / kWide);
    copy_async(shared_address(&tile[t][c]), from + t * width, is_there && t < count);
  }
  asm volatile("cp.async.commit_group;");
}

// tile[t] += h[first + t] @ B over the 64 outputs of each half, after `fetch_products`. A warp may
// read the rows of its own 16 tokens when this returns.
template <typename T>
__device__ void expand_tile(TileOuts<T>& tile, const Half<T> (&halves)[2], const Pending& pending,
                            const TileTokens& tokens) {
  __shared__ __align__(16) T b_tile[16][kHalfOuts + kTilePad];
  __shared__ __align__(16) T h_tile[kTileTokens][16 + kTilePad];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int r = threadIdx.x / (kHalfOuts / kWide), c = threadIdx.x % (kHalfOuts / kWide) * kWide;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Part<T>& part = halves[half].part;
    float d[kHalfOuts / 8][4] = {};
    for (int r0 = 0; r0 < part.rank; r0 += 16) {
      __syncthreads();
      const bool valid = r0 + r < part.rank && c < halves[half].columns;
      *reinterpret_cast<uint4*>(&b_tile[r][c]) =
          valid ? load_shared_rows(part.b + static_cast<int64_t>(r0 + r) * part.width + c)
                : make_uint4(0, 0, 0, 0);
      load_h_tile(h_tile, pending, part, tokens, r0);
      __syncthreads();
      uint32_t a[4];
      load_matrices(a, shared_address(&h_tile[16 * warp + lane % 16][lane / 16 * 8]));
#pragma unroll
      for (int pair = 0; pair < kHalfOuts / 16; ++pair) {
        uint32_t b[4];
        load_transposed(b, shared_address(&b_tile[lane % 16][16 * pair + lane / 16 * 8]));
        mma<T>(d[2 * pair], a[0], a[1], a[2], a[3], b[0], b[1]);
        mma<T>(d[2 * pair + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
    }
    if (half == 0) {
      asm volatile("cp.async.wait_all;");
      __syncwarp();
    }
    if (part.rank == 0) continue;
#pragma unroll
    for (int n = 0; n < kHalfOuts / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        T* at = &tile[16 * warp + lane / 4 + 8 * i][half * kHalfOuts + 8 * n + 2 * (lane % 4)];
        uint32_t* pair = reinterpret_cast<uint32_t*>(at);
        const float2 product = Pair<T>::unpack(*pair);
        *pair = Pair<T>::pack(product.x + d[n][2 * i], product.y + d[n][2 * i + 1]);
      }
    }
  }
  __syncwarp();
}

// A warp's 64 outputs of a tile, for 8 of its tokens at a time, without shared memory: outputs and
// ranks are dealt to the fragments of mma so that a lane, 4 * group + quad, loads 16 bytes of each of
// ranks 4 * quad to 4 * quad + 3 of B and ends with 8 consecutive outputs, from 8 * group on, of token
// 2 * quad and the one after.
template <typename T>
struct WarpOuts {
  Half<T> half;
  uint32_t b[4][4];  // 16 ranks; rows group and group + 8 of b[m] are outputs 2 m and 2 m + 1

  __device__ explicit WarpOuts(const Half<T>& outs) : half(outs) { load_b(0); }

  __device__ void load_b(int r0) {
    const int c = threadIdx.x % 32 / 4 * kWide, r = r0 + threadIdx.x % 4 * 4;
    uint4 rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      rows[i] = c < half.columns && r + i < half.part.rank
                    ? load_shared_rows(half.part.b +
                                       static_cast<int64_t>(r + i) * half.part.width + c)
                    : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t low[4] = {rows[i].x, rows[i].y, rows[i].z, rows[i].w};
      const uint32_t high[4] = {rows[i + 1].x, rows[i + 1].y, rows[i + 1].z, rows[i + 1].w};
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        b[m][i] = __byte_perm(low[m], high[m], 0x5410);
        b[m][i + 1] = __byte_perm(low[m], high[m], 0x7632);
      }
    }
  }

  // This lane's four ranks from r0 on of the h of its one of the 8 tokens from t on, zeros where there
  // is none.
  __device__ uint2 load_h(const Pending& pending, const TileTokens& tokens, int t, int r0) const {
    t += threadIdx.x % 32 / 4;
    const int r = r0 + threadIdx.x % 4 * 4, left = t < tokens.count ? half.part.rank - r : 0;
    const uint16_t* h = static_cast<const uint16_t*>(pending.h) +
                        static_cast<int64_t>(tokens.first + t) * pending.capacity +
                        half.part.h_start + r;
    if ((half.part.h_start | half.part.rank) % 4 == 0)  // as is capacity
      return left > 0 ? *reinterpret_cast<const uint2*>(h) : make_uint2(0, 0);
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = i < left ? h[i] : 0;
    return make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
  }

  // Adds h @ B to this lane's products of the 8 tokens from t on, and rounds; `h` is of the first
  // ranks. Where nothing is added they keep their bits.
  __device__ void finish(uint4 (&products)[2], uint2 h, const Pending& pending,
                         const TileTokens& tokens, int t) {
    if (half.part.rank == 0) return;
    float d[4][4] = {};
    for (int r0 = 0; r0 < half.part.rank; r0 += 16) {
      if (half.part.rank > 16) load_b(r0);
      if (r0 > 0) h = load_h(pending, tokens, t, r0);
#pragma unroll
      for (int m = 0; m < 4; ++m) mma<T>(d[m], b[m][0], b[m][1], b[m][2], b[m][3], h.x, h.y);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float added[kWide];
#pragma unroll
      for (int j = 0; j < kWide; ++j) added[j] = d[j / 2][j % 2 * 2 + i];
      products[i] = Vec<T>::unpack(products[i]).plus(added).packed();
    }
  }
};

}  // namespace lorafleet
