// bias_act on tensors, as its own op and feed_forward call it.
#pragma once

#include "tensors.h"

namespace fastlm::of_bias_act {

Tensor output(const Tensor& x, const OptionalTensor& bias, c10::string_view activation, double dropout_p,
              const OptionalTensor& seed);

// dx and dbias; needs: which of them are wanted.
std::tuple<Tensor, Tensor> gradients(const Tensor& dy, const Tensor& x, const OptionalTensor& bias,
                                     c10::string_view activation, double dropout_p,
                                     const OptionalTensor& seed, const std::array<bool, 2>& needs);

}  // namespace fastlm::of_bias_act
