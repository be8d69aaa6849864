// y = x W^T for up to 64 rows of x: contract in cuda.py. W streams through shared memory once.
//
// The product is cut into units of 128 rows of W by 64 columns, and the units, tile by tile, into
// one run of equal length for each multiprocessor (Stream-K, Osama 2023), so that all of them read
// W all the time. A block's warps have roles: eight multiply, W as the row operand of the tensor
// cores and x as the column operand, both from shared memory; one keeps the copy engine busy,
// kStages units ahead; some may compute the LoRA shrink of the same x. W needs nothing from the
// kernel before, so a block asks for the first units of its run before it waits for x.
//
// A tile's rows are eights from the first half of W and from the second in turn, so that a thread
// that holds an output of the gate also holds the same of up, and may give silu(gate) * up instead.
// Then the LoRA update is added first, see update.cuh.
//
// Tiles that several blocks share meet through float32 partials; the block that comes last adds
// them, in the order of the blocks.
#include "copy_engine.cuh"
#include "update.cuh"
#include "warp_group.cuh"

#include <algorithm>
#include <type_traits>

namespace lorafleet {

// What a launch is given, in bytes that ctypes knows; cuda.py has the same structure.
struct Arguments {
  void* y;
  const void *x, *w, *bias;
  int rows, outs, wide, is_gated;
  float* partial;
  int* counters;         // two of an update, then the tiles'
  const Shrink* shrink;  // or null
};

namespace {

constexpr int kTileRows = 128;
constexpr int kUnitColumns = 64;
constexpr int kWarps = kTileRows / 16;  // that multiply: a warp takes 16 rows of W; one more copies

template <int kTokens>
struct Plan {
  // Of shared memory: more than half of a multiprocessor's, since two blocks on one would leave
  // another without; little enough for a block of the attention beside it.
  static constexpr int kBlockBytes = 120 << 10;
  static constexpr int kWeightBytes = kTileRows * 128, kInputBytes = kTokens * 128;
  static constexpr int kStageBytes = kWeightBytes + kInputBytes;
  static constexpr int kOutStride = 16 + 8;  // elements: 16 outputs of a token, and no conflicts
  static constexpr int kOutBytes = kWarps * 16 * kOutStride * 2;
  static constexpr int kStages = (kBlockBytes - 1024 - kOutBytes) / kStageBytes;
  static constexpr int kLeftBytes = kBlockBytes - 1024 - kOutBytes - kStages * kStageBytes;
  static constexpr int kHeld = kTokens / 2;  // float32 sums of a thread
};

// How a weight is cut into units, and the units into runs.
struct Cut {
  int tiles, chunks, blocks;  // chunks: units of a tile
};

struct Problem {
  int tokens, outs;
  int parts;  // of W that a tile has rows of: 2, or 1 where they cannot be cut into eights
  bool is_gated;
  Cut cut;
  float* partial;  // [blocks, 2, threads that multiply, kHeld]
  int* arrived;    // [tiles], zero between launches
};

#if __CUDA_ARCH__ >= 900

// The block's run [begin, end) of units, of all the units.
struct Run {
  int begin, end;
};

__device__ Run run_of(int block, const Cut& cut) {
  const uint32_t units = cut.tiles * cut.chunks;
  return {static_cast<int>(units * block / cut.blocks),
          static_cast<int>(units * (block + 1) / cut.blocks)};
}

__device__ int block_of(int unit, const Cut& cut) {
  const uint32_t units = cut.tiles * cut.chunks;
  return static_cast<int>(((unit + 1u) * cut.blocks - 1) / units);
}

// The blocks [first, last] whose runs have units of a tile, this one's among them.
struct Owners {
  int first = blockIdx.x, last = blockIdx.x;

  __device__ Owners(const Cut& cut, const Run& run, int tile) {
    const int begin = tile * cut.chunks, end = begin + cut.chunks;
    if (run.begin > begin) first = block_of(begin, cut);
    if (run.end < end) last = block_of(end - 1, cut);
  }
  __device__ int count() const { return last - first + 1; }
};

template <int kTokens>
struct Stages {
  unsigned char* bytes;  // kStages of W's box, then x's
  uint64_t *full, *empty;

  __device__ unsigned char* weights(int stage) const {
    return bytes + stage * Plan<kTokens>::kStageBytes;
  }
  __device__ unsigned char* inputs(int stage) const {
    return weights(stage) + Plan<kTokens>::kWeightBytes;
  }
};

// One thread: every unit's boxes, as stages become free.
template <int kTokens>
__device__ void copy_units(const Stages<kTokens>& stages, const CUtensorMap* w_map,
                           const CUtensorMap* x_map, const Run& run, const Problem& problem) {
  using P = Plan<kTokens>;
  const int chunks = problem.cut.chunks, eights = kTileRows / 8 / problem.parts;
  const auto copy_weights = [&](int i) {
    const int unit = run.begin + i, stage = i % P::kStages;
    expect_bytes(&stages.full[stage], P::kStageBytes);
    copy_parts(stages.weights(stage), w_map, unit % chunks * kUnitColumns, unit / chunks * eights,
               &stages.full[stage], kEvictFirst);
  };
  const auto copy_inputs = [&](int i) {
    const int stage = i % P::kStages;
    copy_box(stages.inputs(stage), x_map, (run.begin + i) % chunks * kUnitColumns, 0,
             &stages.full[stage], kEvictLast);
  };
  const int count = run.end - run.begin, ahead = min(count, P::kStages);
  for (int i = 0; i < ahead; ++i) copy_weights(i);
  wait_for_inputs();
  for (int i = 0; i < ahead; ++i) copy_inputs(i);
  for (int i = ahead; i < count; ++i) {
    wait(&stages.empty[i % P::kStages], (i / P::kStages - 1) % 2);
    copy_weights(i);
    copy_inputs(i);
  }
}

// Four warps: add a unit's part to their 64 rows by kTokens tokens. Each holds 16 rows, as `mma`
// has them for one tile of 8 tokens after the other.
template <typename T, int kTokens>
__device__ void multiply_unit(float (&sums)[Plan<kTokens>::kHeld], const unsigned char* weights,
                              const unsigned char* inputs) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  const uint64_t w = describe_tile(weights), x = describe_tile(inputs);
  begin_products(sums);
#pragma unroll
  for (int step = 0; step < kUnitColumns / 16; ++step)
    multiply_tile<T>(sums, w + kStep * step, x + kStep * step);
  end_products(sums);
#else
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int w_row = 16 * warp + lane % 16, x_row = lane / 16 * 8 + lane % 8;
#pragma unroll
  for (int step = 0; step < kUnitColumns / 16; ++step) {
    uint32_t w[4];
    load_matrices(w, shared_address(weights) + swizzled(w_row, 2 * step + lane / 16));
#pragma unroll
    for (int i = 0; i < Plan<kTokens>::kHeld; i += 8) {
      uint32_t x[4];
      load_matrices(x, shared_address(inputs) + swizzled(2 * i + x_row, 2 * step + lane / 8 % 2));
      auto& low = reinterpret_cast<float(&)[4]>(sums[i]);
      auto& high = reinterpret_cast<float(&)[4]>(sums[i + 4]);
      mma<T>(low, w[0], w[1], w[2], w[3], x[0], x[1]);
      mma<T>(high, w[0], w[1], w[2], w[3], x[2], x[3]);
    }
  }
#endif
}

// Replaces `sums`, this block's part of a tile, by the whole tile's, in the block that comes last.
template <int kTokens>
__device__ bool gather(float (&sums)[Plan<kTokens>::kHeld], const Problem& problem, int tile,
                       const Owners& owners) {
  constexpr int kThreads = 32 * kWarps, kPieces = Plan<kTokens>::kHeld / 4;
  // Parts on their way: a block's registers have to leave room for what follows.
  constexpr int kAtOnce = kTokens == 16 ? 5 : kTokens == 32 ? 3 : 1;
  __shared__ bool is_last;
  // A block's part is its first if the run began inside of the tile, which all but one did.
  const auto part_of = [&](int owner) {
    const int64_t index = 2 * owner + (owner > owners.first ? 0 : 1);
    return reinterpret_cast<float4*>(problem.partial) + index * kThreads * kPieces + threadIdx.x;
  };
  float4* mine = part_of(blockIdx.x);
#pragma unroll
  for (int i = 0; i < kPieces; ++i)
    mine[i * kThreads] =
        make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
  meet<kWarps>();
  if (threadIdx.x == 0) {
    __threadfence();  // for what the others have written as well
    is_last = atomicAdd(problem.arrived + tile, 1) == owners.count() - 1;
    if (is_last) problem.arrived[tile] = 0;  // as the next launch expects it
    __threadfence();
  }
  meet<kWarps>();
  if (!is_last) return false;
#pragma unroll
  for (float& sum : sums) sum = 0.f;
#pragma unroll kAtOnce
  for (int owner = owners.first; owner <= owners.last; ++owner) {
    const float4* part = part_of(owner);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const float4 added = __ldcg(part + i * kThreads);
      sums[4 * i] += added.x;
      sums[4 * i + 1] += added.y;
      sums[4 * i + 2] += added.z;
      sums[4 * i + 3] += added.w;
    }
  }
  return true;
}

// One warp: finishes 16 rows of tiles, from `row` on, and writes them, 16 tokens at a time through
// its part of shared memory.
template <typename T, int kTokens>
__device__ void store_rows(T* y, const T* bias, T* out, const float (&sums)[Plan<kTokens>::kHeld],
                           const Problem& problem, int row) {
  using P = Plan<kTokens>;
  const int lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  // The outputs that the first eight rows are, and the second.
  const int low = row / problem.parts;
  const int high = low + (problem.parts == 2 ? problem.outs / 2 : 8);
  if (low >= problem.outs / problem.parts) return;
  float added[2] = {0.f, 0.f};
  if (bias != nullptr) {
    added[0] = Pair<T>::widen(bias[low + group]);
    if (high < problem.outs) added[1] = Pair<T>::widen(bias[high + group]);
  }
  const int sides = problem.is_gated ? 1 : 2;
  const int width = problem.is_gated ? problem.outs / 2 : problem.outs;
#pragma unroll
  for (int first_token = 0; first_token < kTokens; first_token += 16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* held = sums + first_token / 2 + i / 2 * 4;
      T* to = out + (8 * (i / 2) + 2 * quad + i % 2) * P::kOutStride + group;
      const float first = held[i % 2] + added[0], second = held[2 + i % 2] + added[1];
      if (problem.is_gated) {
        *to = Pair<T>::round(gated<T>(rounded<T>(first), rounded<T>(second)));
      } else {
        to[0] = Pair<T>::round(first);
        to[8] = Pair<T>::round(second);
      }
    }
    __syncwarp();
    const int token = lane / sides, at = first_token + token;
    const int start = lane % sides ? high : low;
    if (token < 16 && at < problem.tokens && start < problem.outs)
      *reinterpret_cast<uint4*>(y + static_cast<int64_t>(at) * width + start) =
          *reinterpret_cast<const uint4*>(out + token * P::kOutStride + lane % sides * 8);
    __syncwarp();
  }
}

#endif

// grid: at most one block a multiprocessor. Blocks have kShrinkWarps more warps where the launch
// carries a shrink; kUpdates: the whole update, of a product that is gated.
template <typename T, int kTokens, bool kUpdates>
__global__ void __launch_bounds__(32 * (kWarps + 1 + kShrinkWarps), 1)
    stream_kernel(const __grid_constant__ CUtensorMap w_map,
                  const __grid_constant__ CUtensorMap x_map, T* y, const T* bias, Problem problem,
                  const T* x, const __grid_constant__ Update update) {
#if __CUDA_ARCH__ >= 900
  using P = Plan<kTokens>;
  extern __shared__ unsigned char unaligned[];
  __shared__ __align__(8) uint64_t full[P::kStages], empty[P::kStages], shrunk;
  unsigned char* bytes = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  const Stages<kTokens> stages{bytes, full, empty};
  const int warp = threadIdx.x / 32, chunks = problem.cut.chunks;
  let_next_begin();
  if (threadIdx.x == 0) {
    for (int i = 0; i < P::kStages; ++i) {
      init_barrier(&full[i], 1);
      init_barrier(&empty[i], kWarps);
    }
    init_barrier(&shrunk, 1);
    publish_barriers();
  }
  __syncthreads();
  const Run run = run_of(blockIdx.x, problem.cut);
  T* outs = reinterpret_cast<T*>(bytes + P::kStages * P::kStageBytes);
  auto& pieces = *reinterpret_cast<Pieces<T>*>(outs + P::kOutBytes / sizeof(T));
  T* h = reinterpret_cast<T*>(&pieces + 1);
  if (warp > kWarps) {
    const int thread = threadIdx.x - 32 * (kWarps + 1);
    shrink_items<T, kShrinkWarps>(update.shrink, x, thread);
    if constexpr (kUpdates) {
      meet_blocks(update.met, thread);
      sum_h(h, update, thread);
      meet<kShrinkWarps, 2>();
      if (thread == 0) arrive(&shrunk);
    }
    return;
  }
  if (warp == kWarps) {
    if (threadIdx.x % 32 == 0) copy_units<kTokens>(stages, &w_map, &x_map, run, problem);
    return;
  }
  if constexpr (kUpdates) {
    if (warp == 0) list_pieces(pieces, update);
    meet<kWarps>();
  }
  wait_for_inputs();
  T* out = outs + warp * 16 * P::kOutStride;
  int done = 0;  // units
  for (int unit = run.begin; unit < run.end;) {
    const int tile = unit / chunks, row = tile * kTileRows + 16 * warp;
    const int stop = min(run.end, (tile + 1) * chunks);
    const Owners owners(problem.cut, run, tile);
    float sums[P::kHeld] = {};
    const auto multiply_next = [&] {
      const int stage = done % P::kStages;
      wait(&full[stage], done / P::kStages % 2);
      multiply_unit<T, kTokens>(sums, stages.weights(stage) + warp / 4 * 64 * 128,
                                stages.inputs(stage));
      __syncwarp();
      if (threadIdx.x % 32 == 0) arrive(&empty[stage]);
      ++unit, ++done;
    };
    if constexpr (kUpdates) {
      // Of those who share a tile the first adds the update: it comes last in its run, so that h is
      // there. When it is added depends on nothing but the cut: the sums are the same each time.
      TileUpdate<T, kTokens> added(update, pieces, h, out, &shrunk, row / 2, row < problem.outs,
                                   blockIdx.x == owners.first);
      while (unit < stop || added.left() > 0) {
        if (unit < stop) multiply_next();
        if (stop - unit < added.left()) added.advance(sums);
      }
    } else {
      while (unit < stop) multiply_next();
    }
    if (owners.count() > 1 && !gather<kTokens>(sums, problem, tile, owners)) continue;
    store_rows<T, kTokens>(y, bias, out, sums, problem, row);
  }
#endif
}

constexpr int kMinUnits = 2;  // of a run: less is not worth a block's start

Cut cut_of(int outs, int wide) {
  static const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int tiles = (outs + kTileRows - 1) / kTileRows;
  const int chunks = (wide + kUnitColumns - 1) / kUnitColumns;
  const int units = tiles * chunks;
  const int most = std::max(1, std::min(processors, units / kMinUnits));
  // Runs all as long as the longest end where tiles do more often: fewer parts to gather.
  const int longest = (units + most - 1) / most;
  return {tiles, chunks, units % longest == 0 ? units / longest : most};
}

template <typename T, int kTokens, bool kUpdates>
int launch_stream(const Arguments& given, cudaStream_t stream) {
  using P = Plan<kTokens>;
  constexpr bool kIsHalf = std::is_same_v<T, __half>;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(stream_kernel<T, kTokens, kUpdates>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, P::kBlockBytes);
  if (allowed != cudaSuccess) return allowed;
  const int parts = given.outs % 16 == 0 ? 2 : 1;
  if (given.is_gated && parts == 1) return cudaErrorInvalidValue;
  CUtensorMap w_map, x_map;
  int status = describe_parts(&w_map, kIsHalf, given.w, given.outs, given.wide, kTileRows, parts);
  if (status == cudaSuccess)
    status = describe_matrix(&x_map, kIsHalf, given.x, given.rows, given.wide, kTokens);
  if (status != cudaSuccess) return status;
  const Cut cut = cut_of(given.outs, given.wide);
  const Problem problem{given.rows, given.outs,    parts,        given.is_gated != 0,
                        cut,        given.partial, given.counters + 2};
  Update update{};
  if (given.shrink != nullptr) update = update_of(*given.shrink, given.counters);
  const int h_bytes = given.rows * update.stride() * static_cast<int>(sizeof(T));
  if (kUpdates && static_cast<int>(sizeof(Pieces<T>)) + h_bytes > P::kLeftBytes)
    return cudaErrorInvalidValue;
  const int warps = kWarps + 1 + (given.shrink != nullptr ? kShrinkWarps : 0);
  return launch(stream_kernel<T, kTokens, kUpdates>, dim3(cut.blocks), 32 * warps, P::kBlockBytes,
                stream, w_map, x_map, static_cast<T*>(given.y), static_cast<const T*>(given.bias),
                problem, static_cast<const T*>(given.x), update);
}

template <typename T, bool kUpdates>
int launch_for(const Arguments& given, cudaStream_t stream) {
  if (given.rows <= 16) return launch_stream<T, 16, kUpdates>(given, stream);
  if (given.rows <= 32) return launch_stream<T, 32, kUpdates>(given, stream);
  if (given.rows <= kMostTokens) return launch_stream<T, kMostTokens, kUpdates>(given, stream);
  return cudaErrorInvalidValue;
}

template <typename T>
int stream_linear(const Arguments& given, cudaStream_t stream) {
  const bool updates = given.is_gated && given.shrink != nullptr;
  return updates ? launch_for<T, true>(given, stream) : launch_for<T, false>(given, stream);
}

}  // namespace
}  // namespace lorafleet

using namespace lorafleet;

extern "C" int lorafleet_stream_linear(int is_half, const Arguments* given, cudaStream_t stream) {
  return is_half ? stream_linear<__half>(*given, stream)
                 : stream_linear<__nv_bfloat16>(*given, stream);
}
