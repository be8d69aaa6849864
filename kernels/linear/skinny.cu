// y = x W^T for a few rows of x: contract in cuda.py. W streams from memory to registers once.
//
// A block takes 16 rows of W and its warps share k; the 16 rows are the row operand of the tensor
// cores, up to 8 rows of x their column operand. Lanes load 16 consecutive bytes, so k comes in
// another order than the instruction names it, alike in both operands. The same launch can carry
// the LoRA shrink of the same x: its blocks come first, and cost no launch of their own.
#include "../lora/shrink.cuh"

namespace lorafleet {
namespace {

constexpr int kWarps = 8;
constexpr int kTileRows = 16;

struct Shrink {
  Site site;
  const int* row_slots;
  float* partial;
  int capacity, rank_tiles, splits;
  int blocks;  // rank_tiles * tokens * splits; 0 where there is no adapter
};

template <typename T, int kColumnTiles>
__global__ void __launch_bounds__(32 * kWarps)
    skinny_kernel(T* y, const T* x, const T* w, const T* bias, int rows, int outs, int k_size,
                  Shrink shrink) {
  int block = blockIdx.x;
  if (block < shrink.blocks) {
    const int rank_tile = block % shrink.rank_tiles;
    const int token = block / shrink.rank_tiles % rows;
    const int split = block / (shrink.rank_tiles * rows);
    shrink_decode<T, kWarps>(shrink.partial, x, shrink.site, shrink.row_slots, rows,
                             shrink.capacity, rank_tile, token, split, shrink.splits);
    return;
  }
  block -= shrink.blocks;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, quad = lane % 4;
  const int first = block * kTileRows;
  const bool has_low = first + group < outs, has_high = first + group + 8 < outs;
  const T* w_low = w + static_cast<int64_t>(first + group) * k_size + quad * 16;
  const T* w_high = w_low + static_cast<int64_t>(8) * k_size;
  const T* x_row = x + static_cast<int64_t>(group) * k_size + quad * 16;

  float d[kColumnTiles][4] = {};
#pragma unroll 2
  for (int k = 64 * warp; k < k_size; k += 64 * kWarps) {
    uint4 low[2], high[2];
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      const bool inside = k + quad * 16 + piece * 8 < k_size;
      low[piece] = load_or_zero(w_low + k + 8 * piece, inside && has_low);
      high[piece] = load_or_zero(w_high + k + 8 * piece, inside && has_high);
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int piece = 0; piece < 2; ++piece) {
        const bool inside = k + quad * 16 + piece * 8 < k_size && 8 * n + group < rows;
        const T* at = x_row + static_cast<int64_t>(8 * n) * k_size + k + 8 * piece;
        const uint4 xs = inside ? load16(at) : make_uint4(0, 0, 0, 0);
        mma_pieces<T>(d[n], low[piece], high[piece], xs);
      }
    }
  }
  __shared__ float sums[kWarps][8 * kColumnTiles][kTileRows + 1];
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
    sums[warp][8 * n + 2 * quad][group] = d[n][0];
    sums[warp][8 * n + 2 * quad + 1][group] = d[n][1];
    sums[warp][8 * n + 2 * quad][group + 8] = d[n][2];
    sums[warp][8 * n + 2 * quad + 1][group + 8] = d[n][3];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * kTileRows; i += 32 * kWarps) {
    const int token = i / kTileRows, out = i % kTileRows;
    if (first + out >= outs) continue;
    float sum = bias != nullptr ? Pair<T>::widen(bias[first + out]) : 0.f;
#pragma unroll
    for (int each = 0; each < kWarps; ++each) sum += sums[each][token][out];
    y[static_cast<int64_t>(token) * outs + first + out] = Pair<T>::round(sum);
  }
}

template <typename T>
int launch(void* y, const void* x, const void* w, const void* bias, int rows, int outs, int k_size,
           const Shrink& shrink, cudaStream_t stream) {
  const int blocks = shrink.blocks + (outs + kTileRows - 1) / kTileRows;
  T* to = static_cast<T*>(y);
  const T* from = static_cast<const T*>(x);
  const T* weight = static_cast<const T*>(w);
  const T* added = static_cast<const T*>(bias);
  constexpr int kThreads = 32 * kWarps;
#define LAUNCH(N) \
  skinny_kernel<T, N><<<blocks, kThreads, 0, stream>>>(to, from, weight, added, rows, outs, k_size, shrink)
  if (rows <= 8) LAUNCH(1);
  else if (rows <= 16) LAUNCH(2);
  else if (rows <= 32) LAUNCH(4);
  else return cudaErrorInvalidValue;
#undef LAUNCH
  return cudaGetLastError();
}

}  // namespace
}  // namespace lorafleet

using namespace lorafleet;

extern "C" int lorafleet_skinny_linear(int is_half, void* y, const void* x, const void* w,
                                       const void* bias, int rows, int outs, int k_size,
                                       float* partial, const void* arena, const int64_t* table,
                                       int64_t stride, const int* row_slots, int capacity,
                                       int splits, cudaStream_t stream) {
  const int rank_tiles = (capacity + kRankTile - 1) / kRankTile;
  const Shrink shrink{{arena, table, stride, k_size, {0, 0, 0}},
                      row_slots,
                      partial,
                      capacity,
                      rank_tiles,
                      splits,
                      rank_tiles * rows * splits};
  return is_half ? launch<__half>(y, x, w, bias, rows, outs, k_size, shrink, stream)
                 : launch<__nv_bfloat16>(y, x, w, bias, rows, outs, k_size, shrink, stream);
}
