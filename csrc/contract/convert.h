// Converting small tensors: what the kernels compute, and their signatures.
#pragma once

#include "../kernels.h"

namespace fastlm {

// n numbers, one behind the other: weights and biases beside rows in half precision. torch's way through the
// dispatcher takes 1 us for each, a small call's whole work 2 us: so on a CPU they run on this thread.
void to_float32(const Context& context, DType dtype, const void* from, int64_t n, float* to);
void from_float32(const Context& context, DType dtype, const float* from, int64_t n, void* to);
void fill(const Context& context, DType dtype, float value, int64_t n, void* to);

}  // namespace fastlm
