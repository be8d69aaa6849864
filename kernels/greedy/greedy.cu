// Likeliest token and its log-probability in one pass over the logits: contract in op.py.
#include "../common.cuh"

namespace lorafleet {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = kThreads * 8 * 2;  // logits of one block

struct Best {
  float value;
  int index;
  float total;  // of exp(logit - value)
};

// Of equal logits the first; NaN in either stays in the total.
__device__ Best merge(const Best& a, const Best& b) {
  const bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
  const Best& win = second ? b : a;
  const Best& lose = second ? a : b;
  const float rest = lose.total == 0.f ? 0.f : lose.total * __expf(lose.value - win.value);
  return {win.value, win.index, win.total + rest};
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
                  int vocab) {
  const int64_t row = blockIdx.y;
  const T* from = logits + row * vocab;
  const int begin = blockIdx.x * kChunk, end = min(begin + kChunk, vocab);
  float x[16];
  Best mine = {-INFINITY, 0x7fffffff, 0.f};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int at = begin + i * kThreads + threadIdx.x;
    x[i] = at < end ? Pair<T>::widen(from[at]) : -INFINITY;
    if (x[i] > mine.value) {
      mine.value = x[i];
      mine.index = at;
    }
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int at = begin + i * kThreads + threadIdx.x;
    if (at < end) mine.total += __expf(x[i] - mine.value);
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
    logprobs[row] = -spread;
  }
}

}  // namespace
}  // namespace lorafleet

using namespace lorafleet;

extern "C" int lorafleet_greedy(int is_half, int64_t* tokens, float* logprobs, void* partial,
                                int* arrived, const void* logits, int rows, int vocab,
                                cudaStream_t stream) {
  const dim3 grid((vocab + kChunk - 1) / kChunk, rows);
  Best* best = static_cast<Best*>(partial);
  if (is_half)
    greedy_kernel<<<grid, kThreads, 0, stream>>>(tokens, logprobs, best, arrived,
                                                 static_cast<const __half*>(logits), vocab);
  else
    greedy_kernel<<<grid, kThreads, 0, stream>>>(
        tokens, logprobs, best, arrived, static_cast<const __nv_bfloat16*>(logits), vocab);
  return cudaGetLastError();
}
