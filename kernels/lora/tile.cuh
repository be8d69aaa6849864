// The prefill expand of one tile, for a kernel of its own and for those that read its product next.
#pragma once

#include "expand.cuh"

namespace lorafleet {

constexpr int kTileTokens = 64;
constexpr int kTileOuts = 256;
constexpr int kWarpOuts = 64;
constexpr int kTileThreads = kTileOuts / kWarpOuts * 32;

// Tokens [first, first + count) of one slot.
struct TileTokens {
  int slot, first, count;

  __device__ TileTokens(const Pending& pending, int index)
      : slot(pending.tiles[3 * index]),
        first(pending.tiles[3 * index + 1]),
        count(pending.tiles[3 * index + 2] - first) {}
};

// A warp's 64 outputs, of which the first `columns` are there.
template <typename T>
struct WarpPart {
  Part<T> part;
  int columns;
};

template <typename T>
__device__ WarpPart<T> warp_part_at(const Site& site, const SiteRow& row, int output, int columns) {
  if (columns <= 0) return {{nullptr, 0, 0, 0}, 0};
  return {part_at<T>(site, row, output), min(columns, kWarpOuts)};
}

// Where this lane's 8 outputs begin among the block's, and the first of its two tokens of 8.
__device__ inline int lane_output() {
  return threadIdx.x / 32 * kWarpOuts + threadIdx.x % 32 / 4 * kWide;
}
__device__ inline int lane_token() { return threadIdx.x % 4 * 2; }

// copy_async, but that the L2 fetches 256 bytes, of which what follows wants the rest.
__device__ inline void copy_ahead(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0));
}

// A tile's products of kParts parts that lie `apart`, 8 tokens at a time, on their way to shared
// memory. A warp copies 512 bytes of one row at once, though its outputs are 128 bytes of each row:
// in pieces so short the memory gives much less (docs/benchmarks.md).
template <typename T, int kParts>
class ProductRing {
 public:
  static constexpr int kAhead = 3;  // groups of 8 tokens on their way

  // `first`: of the tile's first token, at the block's first output, of which `columns` are there.
  // Starts the first groups.
  __device__ ProductRing(const T* first, int width, int apart, int count, int columns)
      : from_(first + piece()), width_(width), apart_(apart),
        count_(piece() < columns ? count : 0) {
    __shared__ __align__(16) T stages[kAhead + 1][kParts][kGroup][kTileOuts + kWide];
    stages_ = stages;
    for (int i = 0; i < kAhead; ++i) start(i * kGroup);
  }

  // The whole block: this lane's products of the 8 tokens from t on, zeros where there is none. Starts
  // a later group in the place of the one before.
  __device__ void take(uint4 (&products)[kParts][2], int t) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kAhead - 1) : "memory");
    __syncthreads();
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        products[part][i] = load16(row(t, part, lane_token() + i) + lane_output());
    start(t + kAhead * kGroup);
  }

  // One of the 8 tokens from t on; free to be written once taken, until the next is taken.
  __device__ T* row(int t, int part, int token) const {
    return stages_[t / kGroup % (kAhead + 1)][part][token];
  }

  // What a thread copies, and may use, of a row: 8 outputs from here on.
  __device__ static int piece() { return threadIdx.x % 32 * kWide; }

 private:
  __device__ void start(int t) {
    constexpr int kWarps = kTileThreads / 32;
#pragma unroll
    for (int i = 0; i < kGroup / kWarps; ++i) {
      const int token = threadIdx.x / 32 + i * kWarps;
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        copy_ahead(shared_address(row(t, part, token) + piece()),
                   from_ + part * apart_ + (t + token) * width_, t + token < count_);
    }
    asm volatile("cp.async.commit_group;");
  }

  T (*stages_)[kParts][kGroup][kTileOuts + kWide];
  const T* from_;
  int width_, apart_, count_;
};

// A warp's 64 outputs of a tile, for 8 of its tokens at a time, without shared memory: outputs and
// ranks are dealt to the fragments of mma so that a lane, 4 * group + quad, loads 16 bytes of each of
// ranks 4 * quad to 4 * quad + 3 of B and ends with 8 consecutive outputs, from 8 * group on, of token
// 2 * quad and the one after.
template <typename T>
struct WarpOuts {
  WarpPart<T> mine;
  uint32_t b[4][4];  // 16 ranks; rows group and group + 8 of b[m] are outputs 2 m and 2 m + 1

  __device__ explicit WarpOuts(const WarpPart<T>& part) : mine(part) { load_b(0); }

  __device__ void load_b(int r0) {
    const int c = threadIdx.x % 32 / 4 * kWide, r = r0 + threadIdx.x % 4 * 4;
    uint4 rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      rows[i] = c < mine.columns && r + i < mine.part.rank
                    ? load_shared_rows(mine.part.b +
                                       static_cast<int64_t>(r + i) * mine.part.width + c)
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
    const int r = r0 + threadIdx.x % 4 * 4, left = t < tokens.count ? mine.part.rank - r : 0;
    const uint16_t* h = static_cast<const uint16_t*>(pending.h) +
                        static_cast<int64_t>(tokens.first + t) * pending.capacity +
                        mine.part.h_start + r;
    if ((mine.part.h_start | mine.part.rank) % 4 == 0)  // as is capacity
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
    if (mine.part.rank == 0) return;
    float d[4][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Vec<T> product = Vec<T>::unpack(products[i]);
#pragma unroll
      for (int j = 0; j < kWide; ++j) d[j / 2][j % 2 * 2 + i] = product.x[j];
    }
    for (int r0 = 0; r0 < mine.part.rank; r0 += 16) {
      if (r0 > 0) h = load_h(pending, tokens, t, r0);
      if (mine.part.rank > 16) load_b(r0);
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

// The whole block: finishes the products of the tile's tokens and gives each to use(t, token, sum), this
// lane's 8 outputs at a time; `token` is one of the 8 from t on. after(t) follows each 8.
template <typename T, typename Use, typename After>
__device__ void finish_products(ProductRing<T, 1>& ring, const WarpPart<T>& part,
                                const Pending& pending, const TileTokens& tokens, Use&& use,
                                After&& after) {
  WarpOuts<T> outs(part);
  uint2 h = outs.load_h(pending, tokens, 0, 0);
#pragma unroll 1
  for (int t = 0; t < tokens.count; t += kGroup) {
    uint4 sums[1][2];
    ring.take(sums, t);
    outs.finish(sums[0], h, pending, tokens, t);
    h = outs.load_h(pending, tokens, t + kGroup, 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) use(t, lane_token() + i, sums[0][i]);
    after(t);
  }
}

}  // namespace lorafleet
