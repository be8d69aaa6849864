// Decode attention over pages of 16 tokens: contract in op.py.
//
// A block takes one row, one key/value head and one chunk of the row's keys; each of its warps takes
// every kWarps-th page, with kStages pages on their way to its own part of shared memory. Blocks have
// 4 warps, or 2 where there are so many that all at once are better than each sooner: a
// multiprocessor holds 8 warps either way. Scores are [16 keys, 8 heads] products of the tensor
// cores, outputs [16 dimensions, 8 heads] ones, so that the heads which share the keys are the
// columns of both. The chunks of a row meet through float32 partials; the block that comes last
// merges them (flash-decoding, Dao 2023).
#include "../common.cuh"

namespace lorafleet {
namespace {

constexpr int kPage = 16;
constexpr int kResidentWarps = 8;  // of a multiprocessor: what its shared memory holds
constexpr int kStages = 3;
constexpr int kGroupHeads = 8;  // query heads of one key/value head, at most
constexpr int kPad = 8;         // elements after each row: ldmatrix then meets every bank once

template <typename T, int kDim>
struct PageTile {
  T keys[kPage][kDim + kPad];
  T values[kPage][kDim + kPad];
};

// From (key = lane group, heads = quad's pair) to (head = lane group, keys = quad's pair).
__device__ inline uint32_t transposed(uint32_t m) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(m));
  return result;
}

// The whole warp: rows of a page that are not `valid` become zeros, so that what an earlier sequence
// left there (perhaps not finite) takes no part even with weight 0.
template <typename T, int kDim>
__device__ void load_page(PageTile<T, kDim>& tile, const T* keys, const T* values,
                          int64_t token_stride, int first_valid, int end_valid, int lane) {
  constexpr int kChunks = kDim / 8;
#pragma unroll
  for (int i = lane; i < kPage * kChunks; i += 32) {
    const int t = i / kChunks, c = 8 * (i % kChunks);
    const bool valid = t >= first_valid && t < end_valid;
    copy_async(shared_address(&tile.keys[t][c]), keys + t * token_stride + c, valid);
    copy_async(shared_address(&tile.values[t][c]), values + t * token_stride + c, valid);
  }
}

// grid (rows * kv_heads, chunks)
template <typename T, int kDim, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kResidentWarps / kWarps)
    decode_attention_kernel(T* out, float* partial, int* arrived, const T* query, const T* keys,
                            const T* values, const int64_t* page_table, int64_t table_stride,
                            const int64_t* rows, const int64_t* positions, const int64_t* fresh,
                            int kv_heads, int group, int least_pages, float scale, int window,
                            float softcap) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  let_next_begin();
  const int row = blockIdx.x / kv_heads, kv_head = blockIdx.x % kv_heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int lane_group = lane / 4, quad = lane % 4;
  auto* tiles = reinterpret_cast<PageTile<T, kDim>*>(shared_bytes) + warp * kStages;
  const int length = static_cast<int>(positions[row]) + 1;
  const int first_key = window > 0 && length > window ? length - window : 0;
  const int64_t* pages = page_table + rows[row] * table_stride;
  const int first_page = first_key / kPage;
  const int num_pages = (length + kPage - 1) / kPage - first_page;
  // Chunks are cut by pages; how many are in use follows from the row alone.
  const int pieces = min(max(num_pages / least_pages, 1), static_cast<int>(gridDim.y));
  const int per_chunk = (num_pages + pieces - 1) / pieces;
  const int chunks = (num_pages + per_chunk - 1) / per_chunk;
  if (blockIdx.y >= chunks) {
    wait_for_inputs();
    return;
  }
  const int begin = first_page + blockIdx.y * per_chunk;
  const int end = min(begin + per_chunk, first_page + num_pages);
  const int64_t heads = static_cast<int64_t>(kv_heads) * group;
  const int64_t token_stride = static_cast<int64_t>(kv_heads) * kDim;

  // Lane i knows the number of the warp's i-th page of the 32 from `known` on.
  int known = begin + warp;
  const auto read_numbers = [&] {
    const int p = known + kWarps * lane;
    return p < end ? pages[p] : 0;
  };
  int64_t numbers = read_numbers();
  const auto start_page = [&](int p, int stage) {
    if (p < end) {
      int index = (p - known) / kWarps;
      if (index == 32) {
        known = p;
        numbers = read_numbers();
        index = 0;
      }
      const int64_t base =
          __shfl_sync(kFullWarp, numbers, index) * kPage * token_stride + kv_head * kDim;
      load_page<T, kDim>(tiles[stage], keys + base, values + base, token_stride,
                         first_key - p * kPage, length - p * kPage, lane);
    }
    asm volatile("cp.async.commit_group;");
  };
  // Older pages need not wait for the kernel that stores this step's keys and values.
  const int newest = static_cast<int>(fresh[row]) / kPage;
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    const int p = begin + warp + kWarps * stage;
    if (p >= newest) wait_for_inputs();
    start_page(p, stage);
  }
  wait_for_inputs();

  uint32_t q[kDim / 16][2];
  const T* q_row = query + (row * heads + kv_head * group + lane_group) * kDim;
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      q[i][half] = lane_group < group ? *reinterpret_cast<const uint32_t*>(
                                            q_row + 16 * i + 8 * half + 2 * quad)
                                      : 0;

  // Of the heads 2 * quad and 2 * quad + 1; totals of this lane's keys only.
  float best[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};
  float sums[kDim / 16][4] = {};
  int stage = 0;
  for (int p = begin + warp; p < end; p += kWarps) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1));
    __syncwarp();
    const PageTile<T, kDim>& tile = tiles[stage];
    float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      uint32_t k[4];
      load_matrices(k, shared_address(&tile.keys[lane % 16][16 * i + 8 * (lane / 16)]));
      mma<T>(d, k[0], k[1], k[2], k[3], q[i][0], q[i][1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int position = p * kPage + lane_group + 8 * (i / 2);
      float score = d[i] * scale;
      if (softcap > 0.f) score = softcap * tanhf(score / softcap);
      d[i] = position < length && position >= first_key ? score : -INFINITY;
    }
    float keep[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = fmaxf(d[h], d[h + 2]);
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2)
        most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, offset));
      const float now = fmaxf(best[h], most);  // finite: every page taken has a key that is seen
      keep[h] = __expf(best[h] - now);
      best[h] = now;
      d[h] = __expf(d[h] - now);
      d[h + 2] = __expf(d[h + 2] - now);
      total[h] = total[h] * keep[h] + d[h] + d[h + 2];
    }
    const uint32_t low = transposed(Pair<T>::pack(d[0], d[1]));
    const uint32_t high = transposed(Pair<T>::pack(d[2], d[3]));
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      uint32_t v[4];
      load_transposed(v, shared_address(&tile.values[lane % 8 + 8 * (lane / 16)]
                                                    [16 * i + 8 * (lane / 8 % 2)]));
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] *= keep[j % 2];
      mma<T>(sums[i], v[0], v[1], v[2], v[3], low, high);
    }
    __syncwarp();
    start_page(p + kWarps * kStages, stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  asm volatile("cp.async.wait_all;");
  __syncthreads();

  // The warps' results meet in shared memory, head by head.
  __shared__ float warp_best[kWarps][kGroupHeads], warp_total[kWarps][kGroupHeads];
  auto* warp_sums = reinterpret_cast<float(*)[kGroupHeads][kDim]>(shared_bytes);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2)
      total[h] += __shfl_xor_sync(kFullWarp, total[h], offset);
    if (lane_group == 0) {
      warp_best[warp][2 * quad + h] = best[h];
      warp_total[warp][2 * quad + h] = total[h];
    }
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      warp_sums[warp][2 * quad + h][16 * i + lane_group] = sums[i][h];
      warp_sums[warp][2 * quad + h][16 * i + lane_group + 8] = sums[i][h + 2];
    }
  }
  __syncthreads();
  const int64_t unit = blockIdx.x;
  T* target = out + (row * heads + kv_head * group) * kDim;
  // Per chunk: [group][kDim] sums, then [group] of (best, total), on 16-byte boundaries.
  const int64_t record = static_cast<int64_t>(group) * (kDim + 4);
  float* mine = partial + (unit * gridDim.y + blockIdx.y) * record;
  for (int i = threadIdx.x; i < group * kDim; i += 32 * kWarps) {
    const int h = i / kDim, c = i % kDim;
    float most = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, warp_best[w][h]);
    float sum = 0.f, all = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float keep = __expf(warp_best[w][h] - most);
      sum += keep * warp_sums[w][h][c];
      all += keep * warp_total[w][h];
    }
    if (chunks == 1) {
      target[i] = Pair<T>::round(sum / all);
    } else {
      mine[i] = sum;
      if (c == 0) {
        mine[group * kDim + 2 * h] = most;
        mine[group * kDim + 2 * h + 1] = all;
      }
    }
  }
  if (chunks == 1) return;

  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(arrived + unit, 1) == chunks - 1;
    if (is_last) arrived[unit] = 0;  // as the next launch expects it
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  // A warp merges a head: lanes know the chunks' weights, then hold kDim / 32 outputs each.
  constexpr int kOuts = kDim / 32;
  const float* records = partial + unit * gridDim.y * record;
  for (int h = warp; h < group; h += kWarps) {
    const auto pair = [&](int c) {
      return __ldcg(reinterpret_cast<const float2*>(records + c * record + group * kDim) + h);
    };
    float most = -INFINITY;
    for (int c = lane; c < chunks; c += 32) most = fmaxf(most, pair(c).x);
#pragma unroll
    for (int offset = 16; offset; offset /= 2)
      most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, offset));
    float sums[kOuts] = {}, all = 0.f;
    for (int first = 0; first < chunks; first += 32) {
      float keep = 0.f;
      if (first + lane < chunks) {
        const float2 chunk = pair(first + lane);
        keep = __expf(chunk.x - most);
        all += keep * chunk.y;
      }
      const int count = min(32, chunks - first);
#pragma unroll 4
      for (int c = 0; c < count; ++c) {
        const float weight = __shfl_sync(kFullWarp, keep, c);
        const float* from = records + (first + c) * record + h * kDim + kOuts * lane;
#pragma unroll
        for (int j = 0; j < kOuts; j += 2) {
          const float2 value = __ldcg(reinterpret_cast<const float2*>(from + j));
          sums[j] += weight * value.x;
          sums[j + 1] += weight * value.y;
        }
      }
    }
    all = warp_sum(all);
#pragma unroll
    for (int j = 0; j < kOuts; ++j)
      target[h * kDim + kOuts * lane + j] = Pair<T>::round(sums[j] / all);
  }
}

template <typename T, int kDim, int kWarps>
int attend(void* out, float* partial, int* arrived, const void* query, const void* keys,
           const void* values, const int64_t* page_table, int64_t table_stride, const int64_t* rows,
           const int64_t* positions, const int64_t* fresh, int num_rows, int kv_heads, int group,
           int chunks, int least_pages, float scale, int window, float softcap,
           cudaStream_t stream) {
  constexpr int kBytes = kWarps * kStages * sizeof(PageTile<T, kDim>);
  static const cudaError_t allowed =
      cudaFuncSetAttribute(decode_attention_kernel<T, kDim, kWarps>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (allowed != cudaSuccess) return allowed;
  const dim3 grid(num_rows * kv_heads, chunks);
  return lorafleet::launch(decode_attention_kernel<T, kDim, kWarps>, grid, 32 * kWarps, kBytes,
                           stream, static_cast<T*>(out), partial, arrived,
                           static_cast<const T*>(query), static_cast<const T*>(keys),
                           static_cast<const T*>(values), page_table, table_stride, rows, positions,
                           fresh, kv_heads, group, least_pages, scale, window, softcap);
}

}  // namespace
}  // namespace lorafleet

using namespace lorafleet;

extern "C" int lorafleet_decode_attention(int is_half, int head_dim, void* out, float* partial,
                                          int* arrived, const void* query, const void* keys,
                                          const void* values, const int64_t* page_table,
                                          int64_t table_stride, const int64_t* rows,
                                          const int64_t* positions, const int64_t* fresh,
                                          int num_rows, int kv_heads, int group, int chunks,
                                          int warps, int least_pages, float scale, int window,
                                          float softcap, cudaStream_t stream) {
#define ATTEND(T, D, W)                                                                        \
  attend<T, D, W>(out, partial, arrived, query, keys, values, page_table, table_stride, rows, \
                  positions, fresh, num_rows, kv_heads, group, chunks, least_pages, scale,     \
                  window, softcap, stream)
#define LAUNCH(T, D) return warps == 2 ? ATTEND(T, D, 2) : ATTEND(T, D, 4)
  if (head_dim == 64) {
    if (is_half) LAUNCH(__half, 64);
    LAUNCH(__nv_bfloat16, 64);
  }
  if (head_dim == 128) {
    if (is_half) LAUNCH(__half, 128);
    LAUNCH(__nv_bfloat16, 128);
  }
#undef LAUNCH
#undef ATTEND
  return cudaErrorInvalidValue;
}
