// The LoRA update of gate and up, in the launch of their product.
//
// Some warps of every block shrink a part of x, wait until all blocks have, and put the sums, h, into
// the block's shared memory. The warps that multiply add B of the rows' slots times h to the sums of
// their tile, a piece at a time, with the last columns of W. What they wait for comes while the memory
// is busy with W, so this is for few pieces: more are faster in a launch of their own.
#pragma once

#include "../lora/shrink.cuh"
#include "copy_engine.cuh"

namespace lorafleet {

constexpr int kShrinkWarps = 4;
constexpr int kPieceRanks = 16;
constexpr int kMostPieces = 8;  // as cuda.py counts them
constexpr int kMostTokens = 64;

// Of a product's rows. Its h: [tokens][gate, up][ranks], rounded, zero where a slot has less, the
// tokens `stride()` elements apart.
struct Update {
  Shrink shrink;
  int ranks;  // the most of gate or up, up to a multiple of 16
  int* met;   // blocks that have shrunk, blocks that know of all; zero between launches

  __host__ __device__ int stride() const { return 2 * ranks + kWide; }  // and no bank conflicts
};

inline Update update_of(const Shrink& shrink, int* met) {
  const int targets = shrink.site.outs[1] == 0 ? 1 : 2;
  const int ranks = (shrink.capacity / targets + kPieceRanks - 1) / kPieceRanks * kPieceRanks;
  return {shrink, ranks, met};
}

// 16 ranks of one slot's B, for those of a group of 8 tokens that have the slot.
template <typename T>
struct Piece {
  const T* b[2];  // the first of the ranks, at the first output of gate and of up
  int left[2];    // of the ranks from there on, 0 or less where there are none
  int token, first;  // the first token with the slot; the first of the ranks
};

// What of an update a block's warps share, besides h.
template <typename T>
struct Pieces {
  Piece<T> at[kMostPieces];
  int slots[kMostTokens];  // 0 beyond the last token
  int count;
};

#if __CUDA_ARCH__ >= 900

// What a slot has for gate, or up: of targets of their own, or of one that they share.
template <typename T>
struct Side {
  const T* b;
  int rank, h_start;

  __device__ Side(const Site& site, int slot, bool is_up) {
    const SiteRow& row = row_of(site, slot);
    const bool is_shared = site.outs[1] == 0, is_second = is_up && !is_shared;
    b = static_cast<const T*>(site.arena) + row.pairs[is_second ? 3 : 1];
    if (is_up && is_shared) b += site.outs[0] / 2;
    rank = static_cast<int>(row.pairs[is_second ? 2 : 0]);
    h_start = is_second ? static_cast<int>(row.pairs[0]) : 0;
  }
};

// The warps that shrink: returns when those of all blocks have come here. All blocks get their place:
// they are as many as multiprocessors or less, with room for one on each; what runs before them does
// not wait for them, and what follows in the stream begins when all of them have. Two such launches at
// once could wait for each other: one engine a device, which MPS must not share.
__device__ inline void meet_blocks(int* met, int thread) {
  meet<kShrinkWarps, 2>();
  if (thread == 0) {
    const int blocks = gridDim.x;
    __threadfence();  // for what the others have written as well
    atomicAdd(met, 1);
    int there;
    do {
      asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(there) : "l"(met) : "memory");
    } while (there < blocks);
    __threadfence();  // once: an acquire would empty the L1 at every look
    if (atomicAdd(met + 1, 1) == blocks - 1) met[0] = met[1] = 0;  // as the next launch expects it
  }
  meet<kShrinkWarps, 2>();
}

// The warps that shrink: h of all tokens.
template <typename T>
__device__ void sum_h(T* h, const Update& of, int thread) {
  constexpr int kAtOnce = 4, kThreads = 32 * kShrinkWarps;  // elements of a thread, and splits
  const Shrink& shrink = of.shrink;
  const int width = 2 * of.ranks, count = shrink.tokens * width;
  const int64_t split_stride = static_cast<int64_t>(shrink.tokens) * shrink.capacity;
  for (int first = thread; first < count; first += kAtOnce * kThreads) {
    const float* at[kAtOnce];
    float sums[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int index = first + i * kThreads, token = index / width, r = index % of.ranks;
      at[i] = nullptr;
      if (index >= count) continue;
      const Side<T> side(shrink.site, shrink.row_slots[token], index % width >= of.ranks);
      if (r < side.rank) at[i] = shrink.partial + token * shrink.capacity + side.h_start + r;
    }
    for (int split = 0; split < shrink.splits; split += kAtOnce) {
      float found[kAtOnce][kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int s = 0; s < kAtOnce; ++s)
          found[i][s] = at[i] != nullptr && split + s < shrink.splits
                            ? __ldcg(at[i] + (split + s) * split_stride)
                            : 0.f;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int s = 0; s < kAtOnce; ++s) sums[i] += found[i][s];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int index = first + i * kThreads;
      if (index < count) h[index / width * of.stride() + index % width] = Pair<T>::round(sums[i]);
    }
  }
}

// One warp: all pieces, in the order of the tokens. Needs nothing that a kernel of this step writes.
template <typename T>
__device__ void list_pieces(Pieces<T>& pieces, const Update& of) {
  const Shrink& shrink = of.shrink;
  static_assert(kGroup == 8, "as many bits");
  const int lane = threadIdx.x % 32;
  const unsigned group = 0xffu << lane / kGroup * kGroup, below = (1u << lane) - 1;
  int listed = 0;
  for (int first = 0; first < kMostTokens; first += 32) {
    const int token = first + lane, slot = token < shrink.tokens ? shrink.row_slots[token] : 0;
    pieces.slots[token] = slot;
    const Side<T> gate(shrink.site, slot, false), up(shrink.site, slot, true);
    const unsigned equal = __match_any_sync(kFullWarp, slot);
    const bool leads = slot != 0 && (equal & group & below) == 0;
    const int mine = leads ? (max(gate.rank, up.rank) + kPieceRanks - 1) / kPieceRanks : 0;
    int end = mine;  // of the pieces of lanes up to this one
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(kFullWarp, end, step);
      if (lane >= step) end += before;
    }
    for (int i = 0; i < mine; ++i) {
      const int r = i * kPieceRanks, index = listed + end - mine + i;
      const int64_t skipped = static_cast<int64_t>(r) * shrink.site.outs[0];
      if (index < kMostPieces)
        pieces.at[index] = {
            {gate.b + skipped, up.b + skipped}, {gate.rank - r, up.rank - r}, token, r};
    }
    listed += __shfl_sync(kFullWarp, end, 31);
  }
  if (lane == 0) pieces.count = min(listed, kMostPieces);
}

// The update of a warp's 16 rows of a tile: 8 outputs of gate and the same of up, from `output` on, of
// which it holds the sums as `mma` has them.
template <typename T, int kTokens>
class TileUpdate {
 public:
  static constexpr int kAhead = 4;  // pieces on their way to registers

  // `staged`: 512 bytes of the warp's own. h is there when `shrunk` has come to its end.
  __device__ TileUpdate(const Update& of, const Pieces<T>& pieces, const T* h, T* staged,
                        uint64_t* shrunk, int output, bool exists, bool is_ours)
      : pieces_(pieces), staged_(staged), shrunk_(shrunk), ranks_(of.ranks),
        stride_(of.stride()), end_(is_ours ? pieces.count : 0), exists_(exists) {
    const int lane = threadIdx.x % 32;
    h_ = h + lane / 4 * stride_ + lane % 4 * 2;
    offset_ = lane % 16 * of.shrink.site.outs[0] + output;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) rows_[i] = load(i);
  }

  __device__ int left() const { return end_ - next_; }

  // Adds the next piece. Waits for h.
  __device__ void advance(float (&sums)[kTokens / 2]) {
    wait(shrunk_, 0);
    // Rows are in registers, which have no index: the code is one loop's for all pieces all the same.
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i != next_ % kAhead) continue;
      reinterpret_cast<uint4*>(staged_)[threadIdx.x % 32] = rows_[i];
      rows_[i] = load(next_ + kAhead);
    }
    add_staged(sums, pieces_.at[next_]);
    ++next_;
  }

 private:
  // A lane's 8 outputs of a rank: of gate in the warp's first half, of up in the second.
  __device__ uint4 load(int index) const {
    if (index >= end_ || !exists_) return make_uint4(0, 0, 0, 0);
    const Piece<T>& piece = pieces_.at[index];
    const int lane = threadIdx.x % 32;
    if (lane % 16 >= piece.left[lane / 16]) return make_uint4(0, 0, 0, 0);
    return __ldg(reinterpret_cast<const uint4*>(piece.b[lane / 16] + offset_));
  }

  __device__ void add_staged(float (&sums)[kTokens / 2], const Piece<T>& piece) {
    const int lane = threadIdx.x % 32, group = piece.token / kGroup;
    __syncwarp();
    uint32_t b[4];  // ranks 0 to 7 and 8 to 15 of gate, then of up
    load_transposed(b, shared_address(staged_) + 16 * lane);
    __syncwarp();
    const bool counts = pieces_.slots[group * kGroup + lane / 4] == pieces_.slots[piece.token];
    const T* h = h_ + group * kGroup * stride_ + piece.first;
    const auto pair = [&](int at) {
      return counts ? *reinterpret_cast<const uint32_t*>(h + at) : 0;
    };
    float d[4] = {};
    mma<T>(d, b[0], 0, b[1], 0, pair(0), pair(8));
    mma<T>(d, 0, b[2], 0, b[3], pair(ranks_), pair(ranks_ + 8));
    // Written out for each group, so that sums stay in registers.
#pragma unroll
    for (int i = 0; i < kTokens / kGroup; ++i) {
      if (i != group) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[4 * i + j] += d[j];
    }
  }

  const Pieces<T>& pieces_;
  T* staged_;
  uint64_t* shrunk_;
  const T* h_;
  int ranks_, stride_, offset_, next_ = 0, end_;  // of the pieces
  bool exists_;
  uint4 rows_[kAhead];
};

#endif

}  // namespace lorafleet
