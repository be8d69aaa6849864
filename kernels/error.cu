// What a status returned by an entry point means.
#include <cuda_runtime.h>

extern "C" const char* lorafleet_error_string(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
