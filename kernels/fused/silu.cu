// silu_mul of op.py.
#include "../lora/tile.cuh"

namespace lorafleet {
namespace {

template <typename T>
__device__ Vec<T> silu_times(Vec<T> gate, const Vec<T>& up) {
#pragma unroll
  for (int j = 0; j < kWide; ++j) gate.x[j] = gated<T>(gate.x[j], up.x[j]);
  return gate;
}

// grid (pieces of a row, rows); 16 bytes a thread.
template <typename T>
__global__ void silu_mul_kernel(T* out, const T* gate_up, int width) {
  let_next_begin();
  wait_for_inputs();
  const int at = (blockIdx.x * blockDim.x + threadIdx.x) * kWide;
  if (at >= width) return;
  const T* gate = gate_up + static_cast<int64_t>(blockIdx.y) * 2 * width + at;
  silu_times(Vec<T>::load(gate), Vec<T>::load(gate + width))
      .store(out + static_cast<int64_t>(blockIdx.y) * width + at);
}

// The same with the LoRA part of gate_up still to be added, for rows of few tokens. A block has 8
// tokens and 256 outputs of gate and of up, a warp 128 of either: its B comes through stages of its
// own in shared memory, the first of them while the product is still computed. Every slot of the 8
// tokens takes part in turn; for it the others' h counts as zero.
// Two blocks find room on a multiprocessor beside one of the product: that bounds their registers,
// and makes the tile wide, since blocks that have to wait for room are late with all they read.
constexpr int kStages = 3;
constexpr int kTileRanks = 16;
constexpr int kHalf = 256;  // outputs of gate, and of up
constexpr int kWarps = 4;
constexpr int kHalfWarp = kHalf / 2;  // outputs of a warp
constexpr int kBoxBytes = kTileRanks * 128;  // 16 ranks of 64 outputs
constexpr int kBoxes = kHalfWarp / 64;  // of a warp
constexpr int kPieces = kHalf / kHalfWarp;  // of 8 outputs that a thread ends with
constexpr int kSumWidth = 2 * kHalf + 4;  // one more bank for each token
constexpr int kStageBytes = kWarps * kBoxes * kBoxBytes;
constexpr int kStagesBytes = kStages * kStageBytes;
static_assert(kGroup * kSumWidth * sizeof(float) <= kStagesBytes, "sums take the stages' place");

// What is left of a warp's way through the group: the lanes of the slots to come, the ranks done.
struct Cursor {
  unsigned left;
  int r0;

  __device__ int lane() const { return __ffs(left) - 1; }
  __device__ void advance(int rank) {
    r0 += kTileRanks;
    if (r0 < rank) return;
    r0 = 0;
    left &= left - 1;
  }
};

// A lane's token, of the first 8 lanes of a warp: its slot and, where no token before it in the
// group has the same, the slot's B at the warp's first output.
template <typename T>
struct GroupLane {
  int slot = 0, rank = 0, h_start = 0, width = 0;
  bool leads = false;
  const T* b = nullptr;

  __device__ GroupLane(const Pending& pending, int first_token, int output) {
    const int lane = threadIdx.x % 32, token = first_token + lane;
    if (lane < kGroup && token < pending.num_tokens) slot = pending.row_slots[token];
    if (slot != 0 && output >= 0) {
      const Part<T> part = part_at<T>(pending.site, row_of(pending.site, slot), output);
      rank = part.rank, h_start = part.h_start, width = part.width, b = part.b;
    }
    const unsigned equal = __match_any_sync(kFullWarp, slot);
    leads = rank != 0 && (equal & ((1u << lane) - 1)) == 0;
  }
};

// h[token][is_up][rank], rounded and zero where there is none: ranks [2][kGroup] and starts say
// which of the token's sums belong there.
template <typename T>
__device__ void sum_h(T* h, const Pending& pending, const int (*ranks)[kGroup],
                      const int (*starts)[kGroup], int first_token, int max_rank) {
  const int64_t split_stride = static_cast<int64_t>(pending.num_tokens) * pending.capacity;
  // A warp has 8 tokens' sums of 4 ranks: 2 values a lane at once.
  constexpr int kAtOnce = 6;  // splits
  const int warp = threadIdx.x / 32, place = threadIdx.x % 32 / 4;
  const float* token = pending.partial +
                       static_cast<int64_t>(first_token + place) * pending.capacity;
  for (int r = 4 * warp + threadIdx.x % 4; r < max_rank; r += 4 * kWarps) {
    float sums[2] = {};
    for (int s = 0; s < pending.splits; s += kAtOnce) {
      float found[2][kAtOnce];
#pragma unroll
      for (int part = 0; part < 2; ++part)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          found[part][i] = s + i < pending.splits && r < ranks[part][place]
                               ? token[(s + i) * split_stride + starts[part][place] + r]
                               : 0.f;
#pragma unroll
      for (int part = 0; part < 2; ++part)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) sums[part] += found[part][i];
    }
    h[place * 2 * max_rank + r] = Pair<T>::round(sums[0]);
    h[(place * 2 + 1) * max_rank + r] = Pair<T>::round(sums[1]);
  }
}

// Eight outputs of the product and what is added, rounded as a finished product is.
template <typename T>
__device__ Vec<T> sum_of(const uint4& product, const float* added) {
  const float4 low = *reinterpret_cast<const float4*>(added);
  const float4 high = *reinterpret_cast<const float4*>(added + 4);
  const float all[kWide] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  Vec<T> sum = Vec<T>::unpack(product).plus(all);
  sum.round();
  return sum;
}

// grid (tiles of 256 outputs, groups of 8 tokens). Dynamic shared memory: the stages, then h.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps, 6)
    silu_mul_pending_kernel(T* out, const T* gate_up, int width, Pending pending, int max_rank) {
  extern __shared__ __align__(128) unsigned char bytes[];
  __shared__ int ranks[2][kGroup], starts[2][kGroup];
  let_next_begin();
  T* h = reinterpret_cast<T*>(bytes + kStagesBytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const int is_up = warp / 2, first_token = blockIdx.y * kGroup;
  const int column = blockIdx.x * kHalf + warp % 2 * kHalfWarp, columns = width - column;
  const GroupLane<T> mine(pending, first_token, columns > 0 ? column + is_up * width : -1);
  if (warp % 2 == 0 && lane < kGroup) ranks[is_up][lane] = mine.rank, starts[is_up][lane] = mine.h_start;
  const uint32_t boxes = shared_address(bytes) + warp * kBoxes * kBoxBytes;
  const auto start = [&](const Cursor& at, int stage) {
    const int from = at.left ? at.lane() : 0;
    const T* b = reinterpret_cast<const T*>(
        __shfl_sync(kFullWarp, reinterpret_cast<unsigned long long>(mine.b), from));
    const int rank = __shfl_sync(kFullWarp, mine.rank, from);
    const int64_t stride = __shfl_sync(kFullWarp, mine.width, from);
    if (at.left) {
#pragma unroll
      for (int i = 0; i < kTileRanks * kBoxes / 4; ++i) {
        const int r = i / kBoxes * 4 + lane / 8, piece = lane % 8, box = i % kBoxes;
        const int output = box * 64 + piece * kWide;
        const bool valid = at.r0 + r < rank && output < columns;
        copy_async(boxes + stage * kStageBytes + box * kBoxBytes + swizzled(r, piece),
                   b + (at.r0 + r) * stride + output, valid);
      }
    }
    asm volatile("cp.async.commit_group;");
    return rank;
  };
  Cursor now{__ballot_sync(kFullWarp, mine.leads), 0}, ahead = now;
  for (int i = 0; i < kStages - 1; ++i) {
    const int rank = start(ahead, i);
    if (ahead.left) ahead.advance(rank);
  }
  __syncthreads();
  wait_for_inputs();

  const int place = threadIdx.x / 16, piece = threadIdx.x % 16 * kWide;
  const int64_t token = first_token + place;
  const int at = blockIdx.x * kHalf + piece;
  const T* product = gate_up + token * 2 * width + at;
  uint4 gates[kPieces], ups[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const bool is_there = token < pending.num_tokens && at + i * kHalfWarp < width;
    gates[i] = is_there ? load16(product + i * kHalfWarp) : make_uint4(0, 0, 0, 0);
    ups[i] = is_there ? load16(product + width + i * kHalfWarp) : make_uint4(0, 0, 0, 0);
  }
  sum_h(h, pending, ranks, starts, first_token, max_rank);
  __syncthreads();

  const int my_slot = __shfl_sync(kFullWarp, mine.slot, group);
  const T* my_h = h + (group * 2 + is_up) * max_rank;
  float d[kHalfWarp / 16][4] = {};  // [16 outputs x 8 tokens] each
  for (int stage = 0; now.left; stage = (stage + 1) % kStages) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2));
    __syncwarp();
    const int rank = start(ahead, (stage + kStages - 1) % kStages);
    if (ahead.left) ahead.advance(rank);
    const bool counts = my_slot == __shfl_sync(kFullWarp, mine.slot, now.lane());
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(my_h + now.r0 + 2 * quad);
    const uint32_t low = counts ? pairs[0] : 0, high = counts ? pairs[4] : 0;
#pragma unroll
    for (int m = 0; m < kHalfWarp / 16; ++m) {
      uint32_t b[4];
      load_transposed(b, boxes + stage * kStageBytes + m / 4 * kBoxBytes +
                             swizzled(lane / 16 * 8 + lane % 8, 2 * (m % 4) + lane / 8 % 2));
      mma<T>(d[m], b[0], b[1], b[2], b[3], low, high);
    }
    now.advance(__shfl_sync(kFullWarp, mine.rank, now.lane()));
  }
  asm volatile("cp.async.wait_all;");
  __syncthreads();
  float* sums = reinterpret_cast<float*>(bytes);
#pragma unroll
  for (int m = 0; m < kHalfWarp / 16; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sums[(2 * quad + i % 2) * kSumWidth + warp * kHalfWarp + 16 * m + group + 8 * (i / 2)] =
          d[m][i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    if (token >= pending.num_tokens || at + i * kHalfWarp >= width) continue;
    const float* added = sums + place * kSumWidth + i * kHalfWarp + piece;
    silu_times(sum_of<T>(gates[i], added), sum_of<T>(ups[i], added + kHalf))
        .store(out + token * width + at + i * kHalfWarp);
  }
}

// The same for tiles. grid (tiles of 256 outputs, token tiles); a warp has 64 of gate and of up.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, 4)
    silu_mul_tiles_kernel(T* out, const T* gate_up, int width, Pending pending) {
  let_next_begin();
  wait_for_inputs();
  const TileTokens tokens(pending, blockIdx.y);
  if (tokens.count == 0) return;  // a captured step has room for more tiles
  const int start = blockIdx.x * kTileOuts;
  ProductRing<T, 2> ring(gate_up + static_cast<int64_t>(tokens.first) * 2 * width + start,
                         2 * width, width, tokens.count, width - start);
  const SiteRow& row = row_of(pending.site, tokens.slot);
  const int first = start + threadIdx.x / 32 * kWarpOuts, columns = width - first;
  WarpOuts<T> gate(warp_part_at<T>(pending.site, row, first, columns));
  WarpOuts<T> up(warp_part_at<T>(pending.site, row, width + first, columns));
  uint2 gate_h = gate.load_h(pending, tokens, 0, 0), up_h = up.load_h(pending, tokens, 0, 0);
  const int output = start + lane_output();
#pragma unroll 1
  for (int t = 0; t < tokens.count; t += kGroup) {
    uint4 sums[2][2];
    ring.take(sums, t);
    gate.finish(sums[0], gate_h, pending, tokens, t);
    up.finish(sums[1], up_h, pending, tokens, t);
    gate_h = gate.load_h(pending, tokens, t + kGroup, 0);
    up_h = up.load_h(pending, tokens, t + kGroup, 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = t + lane_token() + i;
      if (token < tokens.count && output < width)
        silu_times(Vec<T>::unpack(sums[0][i]), Vec<T>::unpack(sums[1][i]))
            .store(out + static_cast<int64_t>(tokens.first + token) * width + output);
    }
  }
}

template <typename T>
int silu_mul_pending(T* out, const T* gate_up, int rows, int width, const Pending& pending,
                     cudaStream_t stream) {
  if (pending.tiles != nullptr) {
    const dim3 grid((width + kTileOuts - 1) / kTileOuts, pending.num_tiles);
    return launch(silu_mul_tiles_kernel<T>, grid, kTileThreads, 0, stream, out, gate_up, width,
                  pending);
  }
  const int targets = pending.site.outs[1] == 0 ? 1 : 2;
  const int max_rank = (pending.capacity / targets + kTileRanks - 1) / kTileRanks * kTileRanks;
  const int bytes = kStagesBytes + kGroup * 2 * max_rank * static_cast<int>(sizeof(T));
  static const cudaError_t allowed = cudaFuncSetAttribute(
      silu_mul_pending_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, 96 << 10);
  if (allowed != cudaSuccess) return allowed;
  const dim3 grid((width + kHalf - 1) / kHalf, (rows + kGroup - 1) / kGroup);
  return launch(silu_mul_pending_kernel<T>, grid, 32 * kWarps, bytes, stream, out, gate_up, width,
                pending, max_rank);
}

template <typename T>
int silu_mul(void* out, const void* gate_up, int rows, int width, const Pending* pending,
             cudaStream_t stream) {
  T* o = static_cast<T*>(out);
  const T* g = static_cast<const T*>(gate_up);
  if (pending != nullptr) return silu_mul_pending(o, g, rows, width, *pending, stream);
  constexpr int kThreads = 256;
  const dim3 grid((width + kThreads * kWide - 1) / (kThreads * kWide), rows);
  return launch(silu_mul_kernel<T>, grid, kThreads, 0, stream, o, g, width);
}

}  // namespace
}  // namespace lorafleet

using namespace lorafleet;

extern "C" int lorafleet_silu_mul(int is_half, void* out, const void* gate_up, int rows, int width,
                                  const Pending* pending, cudaStream_t stream) {
  return is_half ? silu_mul<__half>(out, gate_up, rows, width, pending, stream)
                 : silu_mul<__nv_bfloat16>(out, gate_up, rows, width, pending, stream);
}
