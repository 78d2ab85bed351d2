// NVIDIA's own occupancy calculator as a function: tests/test_static_bars.py compares ours with it.
#include <cuda_occupancy.h>

// Blocks resident on a multiprocessor, or -1 where it refuses. `shared` is dynamic, as Triton's is.
extern "C" int resident_blocks(int arch, int threads_per_sm, int shared_per_sm, int shared_per_block, int registers,
                               int shared, int threads) {
  cudaOccDeviceProp device;
  device.computeMajor = arch / 10;
  device.computeMinor = arch % 10;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = threads_per_sm;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32;
  device.sharedMemPerBlock = 48 << 10;
  device.sharedMemPerMultiprocessor = shared_per_sm;
  device.numSms = 1;
  device.sharedMemPerBlockOptin = shared_per_block;
  device.reservedSharedMemPerBlock = 1024;
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = 1024;
  kernel.numRegs = registers;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = shared;
  kernel.numBlockBarriers = 1;
  cudaOccDeviceState state;
  state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
  cudaOccResult result;
  const cudaOccError error =
      cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared);
  return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1;
}
