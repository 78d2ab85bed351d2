// bias_act on tensors, as its own op and feed_forward call it.
#pragma once

#include "tensors.h"

namespace fastlm {

Tensor bias_act_output(const Tensor& x, const OptionalTensor& bias, c10::string_view activation,
                       double dropout_p, const OptionalTensor& seed);

// dx and dbias; needs: which of them are wanted.
std::tuple<Tensor, Tensor> bias_act_gradients(const Tensor& dy, const Tensor& x, const OptionalTensor& bias,
                                              c10::string_view activation, double dropout_p,
                                              const OptionalTensor& seed, const std::array<bool, 2>& needs);

}  // namespace fastlm
