// Weights, biases and tables beside rows of T: of float32, or of T where they are narrow. Kernels
// have them as a type: to ask at run time takes up to 22 registers more.
#pragma once

#include "rows.cuh"

namespace fastlm {

// Calls f.operator()<W, kWidth>(): the parameters' type, and elements of an access.
template <class T, class F>
void with_parameters(bool narrow, bool wide, F&& f) {
  with_width<T>(wide, [&]<int kWidth>() {
    if constexpr (!std::is_same_v<T, float>) {
      if (narrow) return f.template operator()<T, kWidth>();
    }
    f.template operator()<float, kWidth>();
  });
}

template <class W, int kWidth>
__device__ void load_parameter(const Parameter& p, int64_t at, float (&to)[kWidth]) {
  load<kWidth>(static_cast<const W*>(p.data) + at, to);
}

// Writes one number of a gradient; dtype: the rows'.
__device__ inline void store_parameter(float v, const ParameterGradient& to, DType dtype, int64_t at) {
  if (!to.narrow) {
    static_cast<float*>(to.data)[at] = v;
  } else if (dtype == DType::kFloat16) {
    static_cast<__half*>(to.data)[at] = rounded_to<__half>(v);
  } else {
    static_cast<__nv_bfloat16*>(to.data)[at] = rounded_to<__nv_bfloat16>(v);
  }
}

}  // namespace fastlm
