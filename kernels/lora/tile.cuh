// The prefill expand of one tile, for a kernel of its own and for those that read its product next.
#pragma once

#include "expand.cuh"

namespace lorafleet {

constexpr int kTileTokens = 64;
constexpr int kTileOuts = 128;  // in two halves
constexpr int kHalfOuts = kTileOuts / 2;
constexpr int kTileThreads = 128;

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

// Where this warp and lane work in a tile: tokens from `first` on and before `end`, 64 outputs from
// `offset` on, of these 8 from `c` on.
struct WarpPlace {
  int first, end, offset, c;

  // `abreast`: how many of the block's four warps have outputs side by side.
  __device__ WarpPlace(const TileTokens& tokens, int abreast)
      : first(threadIdx.x / 32 / abreast * (kTileTokens / 4 * abreast)),
        end(min(tokens.count, first + kTileTokens / 4 * abreast)),
        offset(threadIdx.x / 32 % abreast * kHalfOuts),
        c(threadIdx.x % 32 / 4 * kWide) {}

  // The first or second of this lane's tokens of the 8 from t on.
  __device__ static int token(int t, int i) { return t + threadIdx.x % 4 * 2 + i; }
};

// A warp's products of kParts parts that lie `apart`, 8 tokens at a time. They wait in shared memory,
// each lane's in places of its own that nobody else touches: many can be on their way without
// registers, and none is waited for by others.
template <typename T, int kParts>
class ProductRing {
 public:
  static constexpr int kAhead = 3;  // groups of 8 tokens on their way

  // `first`: of the tile's first token, at the warp's first output, of which `columns` are there.
  __device__ ProductRing(const T* first, int64_t width, int64_t apart, const WarpPlace& place,
                         int columns)
      : from_(first + place.c), width_(width), apart_(apart), place_(place),
        is_inside_(place.c < columns) {
    __shared__ __align__(16) uint4 places[kStages][2 * kParts][kTileThreads];
    mine_ = shared_address(&places[0][0][threadIdx.x]);
  }

  // Starts the way of the 8 tokens from t on; every group in turn, also those past the end.
  __device__ void start(int t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = place_.token(t, i);
      const bool valid = is_inside_ && token < place_.end;
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        copy_async(place_of(t, part, i), from_ + part * apart_ + token * width_, valid);
    }
    asm volatile("cp.async.commit_group;");
  }

  // The 8 tokens from t on, while kAhead groups have been started from there; zeros where there is
  // none.
  __device__ void take(uint4 (&products)[kParts][2], int t) const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kAhead - 1) : "memory");
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int i = 0; i < 2; ++i) products[part][i] = load_shared16(place_of(t, part, i));
  }

 private:
  static constexpr int kStages = kAhead + 1;

  __device__ uint32_t place_of(int t, int part, int i) const {
    const int stage = t / kGroup % kStages;
    return mine_ + ((stage * kParts + part) * 2 + i) * kTileThreads * 16;
  }

  const T* from_;
  int64_t width_, apart_;
  WarpPlace place_;
  bool is_inside_;
  uint32_t mine_;
};

// A warp's 64 outputs of a tile, for 8 of its tokens at a time, without shared memory: outputs and
// ranks are dealt to the fragments of mma so that a lane, 4 * group + quad, loads 16 bytes of each of
// ranks 4 * quad to 4 * quad + 3 of B and ends with 8 consecutive outputs, from 8 * group on, of token
// 2 * quad and the one after.
template <typename T>
struct WarpOuts {
  Half<T> half;
  uint32_t b[4][4];  // 16 ranks; rows group and group + 8 of b[m] are outputs 2 m and 2 m + 1

  WarpOuts() = default;
  __device__ explicit WarpOuts(const Half<T>& outs) : half(outs) { load_b(0); }

  // This lane's part of 16 ranks of B, as it lies.
  __device__ static void fetch_b(uint4 (&rows)[4], const Half<T>& half, int r0) {
    const int c = threadIdx.x % 32 / 4 * kWide, r = r0 + threadIdx.x % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      rows[i] = c < half.columns && r + i < half.part.rank
                    ? load_shared_rows(half.part.b +
                                       static_cast<int64_t>(r + i) * half.part.width + c)
                    : make_uint4(0, 0, 0, 0);
  }

  // The same as mma takes it.
  __device__ void deal(const uint4 (&rows)[4]) {
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

  __device__ void load_b(int r0) {
    uint4 rows[4];
    fetch_b(rows, half, r0);
    deal(rows);
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
    float d[4][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Vec<T> product = Vec<T>::unpack(products[i]);
#pragma unroll
      for (int j = 0; j < kWide; ++j) d[j / 2][j % 2 * 2 + i] = product.x[j];
    }
    for (int r0 = 0; r0 < half.part.rank; r0 += 16) {
      if (r0 > 0) h = load_h(pending, tokens, t, r0);
      if (half.part.rank > 16) load_b(r0);
#pragma unroll
      for (int m = 0; m < 4; ++m) mma<T>(d[m], b[m][0], b[m][1], b[m][2], b[m][3], h.x, h.y);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Vec<T> sum;
#pragma unroll
      for (int j = 0; j < kWide; ++j) sum.x[j] = d[j / 2][j % 2 * 2 + i];
      products[i] = sum.packed();
    }
  }
};

// One warp: store(token, c, sum) for all of its place, 8 outputs from c on at a time. `products` is the
// tile's first token at the warp's first output.
template <typename T, typename Store>
__device__ void finish_products(const T* products, int64_t width, const WarpPlace& place,
                                const Half<T>& half, const Pending& pending,
                                const TileTokens& tokens, Store&& store) {
  if (place.first >= place.end || half.columns == 0) return;
  ProductRing<T, 1> ring(products, width, 0, place, half.columns);
  for (int i = 0; i < ring.kAhead; ++i) ring.start(place.first + i * kGroup);
  WarpOuts<T> outs(half);
  uint2 h = outs.load_h(pending, tokens, place.first, 0);
#pragma unroll 1
  for (int t = place.first; t < place.end; t += kGroup) {
    uint4 sums[1][2];
    ring.take(sums, t);
    ring.start(t + ring.kAhead * kGroup);
    outs.finish(sums[0], h, pending, tokens, t);
    h = outs.load_h(pending, tokens, t + kGroup, 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = place.token(t, i);
      if (token < place.end && place.c < half.columns) store(token, place.c, sums[0][i]);
    }
  }
}

}  // namespace lorafleet
