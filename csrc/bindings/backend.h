// What differs between the backends that the bindings are compiled for: the name, where kernels are
// registered, how they are run, where outputs come from.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#if defined(FASTLM_CUDA)
#include <ATen/cuda/EmptyTensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#elif defined(FASTLM_SIMULATED)
#include "../simulated/runtime.h"
#endif

#include "../kernels.h"

namespace fastlm {

using at::Tensor;

#if defined(FASTLM_CUDA)

#define BACKEND "cuda"

// FASTLM_LIBRARY's m: registers a kernel that runs on the device of its first tensor.
struct GuardedLibrary {
  torch::Library& library;

  template <class Result, class... Args>
  void impl(const char* name, Result (*kernel)(Args...)) {
    library.impl(name, [kernel](Args... args) -> Result {
      c10::cuda::OptionalCUDAGuard guard;
      (guard_with(guard, args), ...);
      return kernel(args...);
    });
  }

  static void guard_with(c10::cuda::OptionalCUDAGuard& guard, const Tensor& t) {
    if (!guard.current_device() && t.defined()) guard.set_device(t.device());
  }
  static void guard_with(c10::cuda::OptionalCUDAGuard& guard, const std::optional<Tensor>& t) {
    if (t) guard_with(guard, *t);
  }
  template <class Other>
  static void guard_with(c10::cuda::OptionalCUDAGuard&, const Other&) {}
};

#define FASTLM_LIBRARY(m)                                                                  \
  static void register_kernels(GuardedLibrary m);                                          \
  TORCH_LIBRARY_IMPL(fastlm, CUDA, library) { register_kernels(GuardedLibrary{library}); } \
  static void register_kernels([[maybe_unused]] GuardedLibrary m)

inline Context context_of(const Tensor&) { return {nullptr, c10::cuda::getCurrentCUDAStream().stream()}; }

inline c10::Device current_device() { return c10::Device(c10::kCUDA, c10::cuda::current_device()); }

inline Tensor empty_tensor(at::IntArrayRef sizes, at::ScalarType type) {
  return at::detail::empty_cuda(sizes, type, current_device(), std::nullopt);
}

inline Tensor empty_strided_tensor(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType type) {
  return at::detail::empty_strided_cuda(sizes, strides, type, current_device());
}

#else

#if defined(FASTLM_SIMULATED)

#define FASTLM_LIBRARY(m) TORCH_LIBRARY_IMPL(fastlm_simulated, CPU, m)
#define BACKEND "cuda"

inline Context context_of(const Tensor&) { return {nullptr, simulated::stream()}; }

#else

#define FASTLM_LIBRARY(m) TORCH_LIBRARY_IMPL(fastlm, CPU, m)
#define BACKEND "cpu"

// Tasks are handed out one by one: threads that a neighbour slows down take fewer.
inline void run_parallel(int64_t tasks, void (*task)(const void*, int64_t), const void* self) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = next.fetch_add(1); i < tasks; i = next.fetch_add(1)) task(self, i);
    }
  });
}

inline Context context_of(const Tensor&) { return {&run_parallel, nullptr}; }

#endif

inline Tensor empty_tensor(at::IntArrayRef sizes, at::ScalarType type) {
  return at::detail::empty_cpu(sizes, type);
}

inline Tensor empty_strided_tensor(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType type) {
  return at::detail::empty_strided_cpu(sizes, strides, type);
}

#endif

}  // namespace fastlm
