// An activation by its public name.
#pragma once

#include "../contract/activation.h"
#include "tensors.h"

namespace fastlm {

inline Activation activation_of(c10::string_view name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  TORCH_CHECK_VALUE(name == "silu", "fastlm: no kernel has the activation ", name);
  return Activation::kSilu;
}

}  // namespace fastlm
