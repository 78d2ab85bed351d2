#include "bias_act.h"

#include "../contract/bias_act.h"
#include "activation.h"

namespace fastlm::of_bias_act {
namespace {

Tensor bias_of(const OptionalTensor& bias) { return given(bias) ? parameter(*bias) : Tensor(); }

}  // namespace

Tensor output(const Tensor& x, const OptionalTensor& bias, c10::string_view activation, double dropout_p,
              const OptionalTensor& seed) {
  const Rows in = rows_of(x);
  const Tensor b = bias_of(bias), y = output_like(x);
  bias_act(context_of(x), {.dtype = dtype_of(x),
                           .activation = activation_of(activation),
                           .rows = in.rows,
                           .cols = in.cols,
                           .x = in.data(),
                           .x_stride = in.stride,
                           .bias = parameter_data(b),
                           .dropout = dropout_of(dropout_p, seed),
                           .y = y.mutable_data_ptr()});
  return y;
}

std::tuple<Tensor, Tensor> gradients(const Tensor& dy, const Tensor& x, const OptionalTensor& bias,
                                     c10::string_view activation, double dropout_p,
                                     const OptionalTensor& seed, const std::array<bool, 2>& needs) {
  const Rows in = rows_of(x), gy = rows_of(dy);
  const Tensor b = bias_of(bias), dx = output_like(x, needs[0]);
  const Tensor dbias = gradient_output(in.cols, bias, needs[1]);
  const Tensor partial = float_output({row_blocks(in.rows), in.cols}, x, needs[1]);
  bias_act_backward(context_of(x), {.dtype = dtype_of(x),
                                    .activation = activation_of(activation),
                                    .rows = in.rows,
                                    .cols = in.cols,
                                    .dy = gy.data(),
                                    .x = in.data(),
                                    .dy_stride = gy.stride,
                                    .x_stride = in.stride,
                                    .bias = parameter_data(b),
                                    .dropout = dropout_of(dropout_p, seed),
                                    .dx = data_or_null(dx),
                                    .dbias = gradient_data(dbias),
                                    .partial = floats_or_null(partial)});
  return {dx, like_parameter(dbias, bias)};
}

FASTLM_LIBRARY(m) {
  m.impl("bias_act." BACKEND, &output);
  m.impl("bias_act_backward." BACKEND, &gradients);
}

}  // namespace fastlm::of_bias_act
