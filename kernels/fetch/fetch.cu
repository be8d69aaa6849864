// fetch_ of op.py.
#include "../common.cuh"

namespace lorafleet {
namespace {

constexpr int kThreads = 512;

// One block; 16 bytes a thread and round, the rest byte by byte.
__global__ void fetch_kernel(unsigned char* to, const unsigned char* from, int64_t bytes) {
  const int64_t whole = bytes / 16 * 16;
  for (int64_t i = 16 * threadIdx.x; i < whole; i += 16 * kThreads)
    *reinterpret_cast<uint4*>(to + i) = load16(from + i);
  for (int64_t i = whole + threadIdx.x; i < bytes; i += kThreads) to[i] = from[i];
}

}  // namespace
}  // namespace lorafleet

// Not by `launch`: the kernel in front may still read `to`.
extern "C" int lorafleet_fetch(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  lorafleet::fetch_kernel<<<1, lorafleet::kThreads, 0, stream>>>(
      static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes);
  return cudaGetLastError();
}
