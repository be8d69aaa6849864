// rotary_and_store_ of op.py. A lane holds 8 elements of a head, a warp one token's whole heads.
#include "../lora/tile.cuh"

namespace lorafleet {
namespace {

constexpr int kWarps = 4;

struct Heads {
  int num, num_kv, dim, rotary_dim;
  int lanes;  // of a warp that one head takes: dim / 8, rounded up to a power of two
};

template <typename T>
struct Tables {
  const T *cos, *sin, *q_norm, *k_norm;
  float eps;
};

template <typename T>
struct Pool {
  T *keys, *values;
  const int64_t* locations;
};

// This lane's 8 elements: of which head of which part (0 query, 1 key, 2 value).
struct Place {
  int part, first_head, head, at;
  bool valid;
};

__device__ Place place_of(const Heads& heads, int warp) {
  const int lane = threadIdx.x % 32, per_warp = 32 / heads.lanes;
  const int query_warps = (heads.num + per_warp - 1) / per_warp;
  const int kv_warps = (heads.num_kv + per_warp - 1) / per_warp;
  Place place;
  place.part = warp < query_warps ? 0 : warp < query_warps + kv_warps ? 1 : 2;
  if (place.part > 0) warp -= query_warps;
  if (place.part > 1) warp -= kv_warps;
  place.first_head = warp * per_warp;
  place.head = place.first_head + lane / heads.lanes;
  place.at = lane % heads.lanes * kWide;
  const int count = place.part == 0 ? heads.num : heads.num_kv;
  place.valid = place.head < count && place.at < heads.dim;
  return place;
}

template <typename T>
__device__ void norm_head(Vec<T>& x, const T* weight, const Heads& heads, const Place& place,
                          float eps) {
  float squares = 0.f;
#pragma unroll
  for (int j = 0; j < kWide; ++j) squares += x.x[j] * x.x[j];
  for (int offset = heads.lanes / 2; offset; offset /= 2)
    squares += __shfl_xor_sync(kFullWarp, squares, offset);
  const float scale = rsqrtf(squares / heads.dim + eps);
  const Vec<T> w = place.valid ? Vec<T>::load(weight + place.at) : Vec<T>{};
#pragma unroll
  for (int j = 0; j < kWide; ++j) x.x[j] = rounded<T>(rounded<T>(x.x[j] * scale) * w.x[j]);
}

// 8 of cos and of sin; zeros where nothing is rotated.
struct Angles {
  uint4 cos, sin;
};

template <typename T>
__device__ Angles angles_of(const Tables<T>& tables, const Heads& heads, const Place& place,
                            int token) {
  if (place.part == 2 || place.at >= heads.rotary_dim) return {};
  const int64_t at = static_cast<int64_t>(token) * heads.rotary_dim + place.at;
  return {load16(tables.cos + at), load16(tables.sin + at)};
}

// Element d meets d + rotary_dim / 2, which a neighbouring lane holds.
template <typename T, typename Find>
__device__ void rotate(Vec<T>& x, Find&& find_angles, const Heads& heads, const Place& place) {
  const int half = heads.rotary_dim / 2;
  const bool is_first = place.at < half, is_rotated = place.at < heads.rotary_dim;
  const int partner = (threadIdx.x + (is_first ? half : -half) / kWide) % 32;
  Vec<T> other;
#pragma unroll
  for (int j = 0; j < kWide; ++j) other.x[j] = __shfl_sync(kFullWarp, x.x[j], partner);
  if (!is_rotated) return;
  const Angles angles = find_angles();
  const Vec<T> c = Vec<T>::unpack(angles.cos), s = Vec<T>::unpack(angles.sin);
  const float sign = is_first ? -1.f : 1.f;
#pragma unroll
  for (int j = 0; j < kWide; ++j)
    x.x[j] = rounded<T>(x.x[j] * c.x[j]) + rounded<T>(sign * other.x[j] * s.x[j]);
}

// Norms and rotates this lane's elements as their part wants it, and stores them.
template <typename T, typename Find>
__device__ void finish(Vec<T>& x, T* query, const Pool<T>& pool, const Tables<T>& tables,
                       const Heads& heads, const Place& place, Find&& find_angles, int64_t token,
                       int64_t location) {
  T* target = place.part == 0 ? query + (token * heads.num + place.head) * heads.dim
                              : (place.part == 1 ? pool.keys : pool.values) +
                                    (location * heads.num_kv + place.head) * heads.dim;
  if (place.part < 2) {
    const T* weight = place.part == 0 ? tables.q_norm : tables.k_norm;
    if (weight != nullptr) norm_head(x, weight, heads, place, tables.eps);
    rotate(x, find_angles, heads, place);
  }
  if (place.valid) x.store(target + place.at);
}

__host__ __device__ int tiles_in(int outputs) { return (outputs + kTileOuts - 1) / kTileOuts; }

// grid (tokens, warps of a token / kWarps).
template <typename T, bool kPending>
__global__ void __launch_bounds__(32 * kWarps)
    rotary_kernel(T* query, const T* qkv, Pool<T> pool, Tables<T> tables, Heads heads,
                  Pending pending) {
  let_next_begin();
  const Place place = place_of(heads, blockIdx.y * kWarps + threadIdx.x / 32);
  const int num = place.part == 0 ? heads.num : heads.num_kv;
  const int64_t token = blockIdx.x, location = pool.locations[token];
  const int start = place.part == 0 ? 0 : heads.num + (place.part - 1) * heads.num_kv;
  const int offset = (place.head - place.first_head) * heads.dim + place.at;
  const int first = (start + place.first_head) * heads.dim;
  const int width = (heads.num + 2 * heads.num_kv) * heads.dim;
  Part<T> part{};
  uint4 (*staged)[32] = nullptr;
  if constexpr (kPending) {
    __shared__ uint4 rows[kWarps][kRankRows][32];
    staged = rows[threadIdx.x / 32];
    part = part_at<T>(pending.site, row_of(pending.site, pending.row_slots[token]), first);
    StagedRankRows<T>{staged}.load(part, 0, offset, place.valid);
  }
  wait_for_inputs();
  if (place.first_head >= num) return;  // the whole warp
  Vec<T> x = place.valid ? Vec<T>::load(qkv + token * width + first + offset) : Vec<T>{};
  const Angles angles = angles_of(tables, heads, place, token);
  if constexpr (kPending) {
    if (part.rank != 0) {
      float acc[kWide] = {};
      StagedRankRows<T> rows{staged};
      expand_warp(acc, rows, pending, part, token, offset, place.valid);
      x = x.plus(acc);
      x.round();
    }
  }
  finish(x, query, pool, tables, heads, place, [&] { return angles; }, token, location);
}

// The same for a product whose update comes in tiles: heads of 8 to 256 elements, a power of two.
// grid (tiles of 256 outputs, token tiles).
template <typename T>
__global__ void __launch_bounds__(kTileThreads, 6)
    rotary_tiles_kernel(T* query, const T* qkv, Pool<T> pool, Tables<T> tables, Heads heads,
                        Pending pending) {
  __shared__ int64_t locations[kTileTokens];
  let_next_begin();
  wait_for_inputs();
  const TileTokens tokens(pending, blockIdx.y);
  if (tokens.count == 0) return;  // a captured step has room for more tiles
  const int q_tiles = tiles_in(heads.num * heads.dim), kv_tiles = tiles_in(heads.num_kv * heads.dim);
  const int part = blockIdx.x < q_tiles ? 0 : blockIdx.x < q_tiles + kv_tiles ? 1 : 2;
  const int at = (blockIdx.x - (part > 0 ? q_tiles : 0) - (part > 1 ? kv_tiles : 0)) * kTileOuts;
  const int columns = (part == 0 ? heads.num : heads.num_kv) * heads.dim - at;
  const int skipped = part == 0 ? 0 : heads.num + (part - 1) * heads.num_kv;
  const int start = skipped * heads.dim + at, offset = threadIdx.x / 32 * kWarpOuts;
  const int64_t width = (heads.num + 2 * heads.num_kv) * heads.dim;
  ProductRing<T, 1> ring(qkv + tokens.first * width + start, width, 0, tokens.count, columns);
  if (threadIdx.x < tokens.count)
    locations[threadIdx.x] = pool.locations[tokens.first + threadIdx.x];
  const auto mine = warp_part_at<T>(pending.site, row_of(pending.site, tokens.slot),
                                    start + offset, columns - offset);
  const int c = ring.piece();
  // Sums go back to where their products were; then each warp has whole heads of two tokens.
  finish_products(
      ring, mine, pending, tokens,
      [&](int t, int token, const uint4& sum) {
        *reinterpret_cast<uint4*>(ring.row(t, 0, token) + lane_output()) = sum;
      },
      [&](int t) {
        __syncthreads();
#pragma unroll
        for (int token = threadIdx.x / 32; token < kGroup; token += kTileThreads / 32) {
          const int present = min(t + token, tokens.count - 1);
          const Place place{part, 0, (at + c) / heads.dim, (at + c) % heads.dim,
                            t + token < tokens.count && c < columns};
          Vec<T> x{};
          if (place.valid) x = Vec<T>::load(ring.row(t, 0, token) + c);
          const int at_token = tokens.first + present;
          finish(x, query, pool, tables, heads, place,
                 [&] { return angles_of(tables, heads, place, at_token); }, at_token,
                 locations[present]);
        }
      });
}

template <typename T>
int rotary(void* query, const void* qkv, const void* cos, const void* sin, void* keys, void* values,
           const int64_t* locations, const void* q_norm, const void* k_norm, int tokens,
           const Heads& heads, float eps, const Pending* pending, cudaStream_t stream) {
  const int per_warp = 32 / heads.lanes;
  const int warps = (heads.num + per_warp - 1) / per_warp +
                    2 * ((heads.num_kv + per_warp - 1) / per_warp);
  const dim3 grid(tokens, (warps + kWarps - 1) / kWarps);
  const Pool<T> pool{static_cast<T*>(keys), static_cast<T*>(values), locations};
  const Tables<T> tables{static_cast<const T*>(cos), static_cast<const T*>(sin),
                         static_cast<const T*>(q_norm), static_cast<const T*>(k_norm), eps};
  T* q = static_cast<T*>(query);
  const T* x = static_cast<const T*>(qkv);
  if (pending != nullptr && pending->tiles != nullptr) {
    if (kTileOuts % heads.dim != 0) return cudaErrorInvalidValue;
    const dim3 tiles(tiles_in(heads.num * heads.dim) + 2 * tiles_in(heads.num_kv * heads.dim),
                     pending->num_tiles);
    return launch(rotary_tiles_kernel<T>, tiles, kTileThreads, 0, stream, q, x, pool, tables, heads,
                  *pending);
  }
  if (pending != nullptr)
    return launch(rotary_kernel<T, true>, grid, 32 * kWarps, 0, stream, q, x, pool, tables, heads,
                  *pending);
  return launch(rotary_kernel<T, false>, grid, 32 * kWarps, 0, stream, q, x, pool, tables, heads,
                Pending{});
}

int lanes_of(int head_dim) {
  int lanes = 1;
  while (lanes * kWide < head_dim) lanes *= 2;
  return lanes;
}

}  // namespace
}  // namespace lorafleet

using namespace lorafleet;

extern "C" int lorafleet_rotary_and_store(int is_half, void* query, const void* qkv,
                                          const void* cos, const void* sin, void* keys,
                                          void* values, const int64_t* locations,
                                          const void* q_norm, const void* k_norm, int tokens,
                                          int num_heads, int num_kv_heads, int head_dim,
                                          int rotary_dim, float eps, const Pending* pending,
                                          cudaStream_t stream) {
  const Heads heads{num_heads, num_kv_heads, head_dim, rotary_dim, lanes_of(head_dim)};
  return is_half ? rotary<__half>(query, qkv, cos, sin, keys, values, locations, q_norm, k_norm,
                                  tokens, heads, eps, pending, stream)
                 : rotary<__nv_bfloat16>(query, qkv, cos, sin, keys, values, locations, q_norm,
                                         k_norm, tokens, heads, eps, pending, stream);
}
