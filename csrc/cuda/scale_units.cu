// Gradients for a loss's gradient of 1, times what it is: in place, and nothing to do where it is 1, which
// only the GPU knows.
//
// Few blocks, each going along the whole: of a factor 1 all are gone at once. Bound by bytes: 16 at a time,
// each read and written once; torch's multiplication by a number that is on the GPU reaches half of the
// bandwidth (docs/gpu.md).
#include "../contract/scale_units.h"
#include "launch.cuh"
#include "rows.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlocks = 2048;  // two or three times what an A100 or H100 holds at once

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) scale_units_kernel(const float* factor, int64_t n, T* units) {
  const float by = *factor;
  if (by == 1.0f) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * kWidth;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth; i < n; i += step) {
    float values[kWidth];
    load<kWidth>(units + i, values);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) values[k] *= by;
    store<kWidth>(values, units + i);
  }
}

}  // namespace

void scale_units(const Context& context, DType dtype, const float* factor, int64_t n, void* units) {
  with_device_dtype(dtype, [&]<class T>() {
    with_width<T>(wide_rows<T>(n, {{units}}), [&]<int kWidth>() {
      const int64_t all = (n + kThreads * kWidth - 1) / (kThreads * kWidth);
      launch("scale_units", context, scale_units_kernel<T, kWidth>, all < kBlocks ? all : kBlocks, kThreads,
             0, factor, n, static_cast<T*>(units));
    });
  });
}

}  // namespace fastlm
