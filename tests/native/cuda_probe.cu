// Launchers of a kernel that exchanges elements through shared memory, for tests/test_cuda_runtime.py.
#include "cuda/launch.cuh"

namespace {

// y[i] = x[i ^ 33] of 64 elements.
__global__ void exchange_kernel(const float* x, int n, float* y) {
  extern __shared__ float elements[];
  const int i = threadIdx.x;
  if (i < n) elements[i] = x[i];
  __syncthreads();
  if (i < n) y[i] = elements[i ^ 33];
}

thread_local std::string message;

}  // namespace

// Through launch(), as csrc/cuda does; returns what it throws, or "".
extern "C" __attribute__((visibility("default"))) const char* probe(const float* x, int n, float* y,
                                                                    int64_t blocks, int threads,
                                                                    size_t shared, void* stream) {
  message.clear();
  try {
    fastlm::launch("exchange", {nullptr, stream}, exchange_kernel, blocks, threads, shared, x, n, y);
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  return message.c_str();
}

// In CUDA's own words, with no opt-in; returns the runtime's error.
extern "C" __attribute__((visibility("default"))) int probe_without_opt_in(const float* x, int n, float* y,
                                                                           int threads, size_t shared) {
  exchange_kernel<<<1, threads, shared>>>(x, n, y);
  return cudaGetLastError();
}
