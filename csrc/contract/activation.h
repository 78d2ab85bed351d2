// The activations that bias_act and glu know.
#pragma once

#include <cstdint>

namespace fastlm {

// gelu(z) = z * (1 + erf(z / sqrt(2))) / 2; gelu_tanh(z) = z * sigmoid(2 u), u = sqrt(2 / pi) * (z + 0.044715
// z^3); relu(z) = max(z, 0), NaN for NaN; silu(z) = z * sigmoid(z).
enum class Activation : int32_t { kGelu, kGeluTanh, kRelu, kSilu };

}  // namespace fastlm
