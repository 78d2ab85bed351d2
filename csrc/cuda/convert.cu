// Small tensors beside the rows, such as a weight of another type than the bias: converted, or filled with
// one number.
// Bound by the launch: 2 us, whatever their size.
#include "../contract/convert.h"
#include "launch.cuh"
#include "rows.cuh"

namespace fastlm {
namespace {

constexpr int kThreads = 256;

int64_t blocks_of(int64_t n) { return (n + kThreads - 1) / kThreads; }

__device__ int64_t index() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

template <class From, class To>
__global__ void convert_kernel(const From* from, int64_t n, To* to) {
  if (index() < n) to[index()] = rounded_to<To>(as_float(from[index()]));
}

template <class To>
__global__ void fill_kernel(float value, int64_t n, To* to) {
  if (index() < n) to[index()] = rounded_to<To>(value);
}

}  // namespace

void to_float32(const Context& context, DType dtype, const void* from, int64_t n, float* to) {
  with_device_dtype(dtype, [&]<class T>() {
    launch("convert", context, convert_kernel<T, float>, blocks_of(n), kThreads, 0,
           static_cast<const T*>(from), n, to);
  });
}

void from_float32(const Context& context, DType dtype, const float* from, int64_t n, void* to) {
  with_device_dtype(dtype, [&]<class T>() {
    launch("convert", context, convert_kernel<float, T>, blocks_of(n), kThreads, 0, from, n,
           static_cast<T*>(to));
  });
}

void fill(const Context& context, DType dtype, float value, int64_t n, void* to) {
  with_device_dtype(dtype, [&]<class T>() {
    launch("fill", context, fill_kernel<T>, blocks_of(n), kThreads, 0, value, n, static_cast<T*>(to));
  });
}

}  // namespace fastlm
