// Starting a kernel, and saying in one sentence why it could not be started.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../kernels.h"

namespace fastlm {

constexpr size_t kSharedWithoutOptIn = 48 << 10;  // more dynamic shared memory must be asked for, per kernel
constexpr int64_t kMostBlocks = 0x7fffffff;       // of a grid's first axis

inline void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next call of anybody would report it again
  throw std::runtime_error(what + " failed: " + cudaGetErrorString(error));
}

// Starts blocks of `threads` threads on context.stream, with `shared` bytes of dynamic shared memory each.
// Throws std::runtime_error naming the op and the cause; no blocks: nothing happens.
template <class... Args>
void launch(const char* op, const Context& context, void (*kernel)(Args...), int64_t blocks, int threads,
            size_t shared, const std::type_identity_t<Args>&... args) {
  if (blocks == 0) return;
  const std::string what = std::string(op) + ": a launch of " + std::to_string(blocks) + " blocks of " +
                           std::to_string(threads) + " threads with " + std::to_string(shared) +
                           " bytes of shared memory";
  if (blocks > kMostBlocks) throw std::runtime_error(what + " failed: a grid has at most 2147483647 blocks");
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared > kSharedWithoutOptIn) {
    check(
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        what);
  }
  const void* pointers[] = {&args...};
  check(cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                         const_cast<void**>(pointers), shared, static_cast<cudaStream_t>(context.stream)),
        what);
}

}  // namespace fastlm
