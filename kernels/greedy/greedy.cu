// Likeliest token and its log-probability in one pass over the logits: contract in op.py.
#include "../common.cuh"

namespace lorafleet {
namespace {

constexpr int kThreads = 256;
constexpr int kVecs = 8;  // of 8 logits, of a thread
constexpr int kChunk = kThreads * kWide * kVecs;  // logits of one block

struct Best {
  float value;
  int index;
  float total;  // of exp(logit - value)
};

// Of equal logits the first; NaN in either stays in the total.
__device__ Best merge(const Best& a, const Best& b) {
  const bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
  const float value = second ? b.value : a.value, less = second ? a.value : b.value;
  const float total = second ? b.total : a.total, rest = second ? a.total : b.total;
  return {value, second ? b.index : a.index,
          total + (rest == 0.f ? 0.f : rest * __expf(less - value))};
}

__device__ Best merge_block(Best mine) {
  __shared__ Best partial[kThreads / 32];
  for (int offset = 16; offset; offset >>= 1) {
    const Best other = {__shfl_xor_sync(kFullWarp, mine.value, offset),
                        __shfl_xor_sync(kFullWarp, mine.index, offset),
                        __shfl_xor_sync(kFullWarp, mine.total, offset)};
    mine = merge(mine, other);
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
  __syncthreads();
  Best all = partial[0];
  for (int w = 1; w < kThreads / 32; ++w) all = merge(all, partial[w]);
  __syncthreads();
  return all;
}

// grid (chunks, rows)
template <typename T>
__global__ void __launch_bounds__(kThreads)
    greedy_kernel(int64_t* tokens, float* logprobs, Best* partial, int* arrived, const T* logits,
                  int vocab, int64_t* table, const int64_t* places) {
  const int64_t row = blockIdx.y;
  const T* from = logits + row * vocab;
  const int begin = blockIdx.x * kChunk, end = min(begin + kChunk, vocab);
  const bool is_aligned = vocab % kWide == 0;
  const auto load = [&](int at) {
    if (is_aligned && at < end) return Vec<T>::load(from + at);
    Vec<T> x;
#pragma unroll
    for (int j = 0; j < kWide; ++j)
      x.x[j] = at + j < end ? Pair<T>::widen(from[at + j]) : -INFINITY;
    return x;
  };
  Best mine = {-INFINITY, 0x7fffffff, 0.f};
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int at = begin + (i * kThreads + threadIdx.x) * kWide;
    const Vec<T> x = load(at);
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      if (x.x[j] > mine.value) {
        mine.value = x.x[j];
        mine.index = at + j;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {  // again, from the nearest cache
    const Vec<T> x = load(begin + (i * kThreads + threadIdx.x) * kWide);
#pragma unroll
    for (int j = 0; j < kWide; ++j)
      mine.total += x.x[j] == -INFINITY ? 0.f : __expf(x.x[j] - mine.value);
  }
  mine = merge_block(mine);
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    partial[row * gridDim.x + blockIdx.x] = mine;
    __threadfence();
    is_last = atomicAdd(arrived + row, 1) == gridDim.x - 1;
    if (is_last) arrived[row] = 0;  // as the next launch expects it
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  Best all = {-INFINITY, 0x7fffffff, 0.f};
  for (int c = threadIdx.x; c < gridDim.x; c += kThreads) {
    const Best* one = partial + row * gridDim.x + c;
    all = merge(all, {__ldcg(&one->value), __ldcg(&one->index), __ldcg(&one->total)});
  }
  all = merge_block(all);
  if (threadIdx.x == 0) {
    const float spread = logf(all.total);  // the best logit less the sum's logarithm
    const bool is_finite = isfinite(all.value) && isfinite(spread);
    tokens[row] = is_finite ? all.index : -1;
    table[places[row]] = is_finite ? all.index : 0;
    logprobs[row] = -spread;
  }
}

}  // namespace
}  // namespace lorafleet

using namespace lorafleet;

extern "C" int lorafleet_greedy(int is_half, int64_t* tokens, float* logprobs, void* partial,
                                int* arrived, const void* logits, int rows, int vocab,
                                int64_t* table, const int64_t* places, cudaStream_t stream) {
  const dim3 grid((vocab + kChunk - 1) / kChunk, rows);
  Best* best = static_cast<Best*>(partial);
  if (is_half)
    greedy_kernel<<<grid, kThreads, 0, stream>>>(tokens, logprobs, best, arrived,
                                                 static_cast<const __half*>(logits), vocab,
                                                 table, places);
  else
    greedy_kernel<<<grid, kThreads, 0, stream>>>(
        tokens, logprobs, best, arrived, static_cast<const __nv_bfloat16*>(logits), vocab, table,
        places);
  return cudaGetLastError();
}
