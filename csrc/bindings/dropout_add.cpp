#include "../contract/dropout_add.h"

#include "tensors.h"

namespace fastlm::of_dropout_add {
namespace {

Tensor forward(const Tensor& x, const OptionalTensor& residual, double dropout_p,
               const OptionalTensor& seed) {
  const Rows in = rows_of(x), add = rows_of(residual);
  const Tensor y = output_like(x);
  dropout_add(context_of(x), {.dtype = dtype_of(x),
                              .rows = in.rows,
                              .cols = in.cols,
                              .x = in.data(),
                              .residual = add.data(),
                              .x_stride = in.stride,
                              .residual_stride = add.stride,
                              .dropout = dropout_of(dropout_p, seed),
                              .y = y.mutable_data_ptr()});
  return y;
}

Tensor backward(const Tensor& dy, double dropout_p, const OptionalTensor& seed) {
  return forward(dy, std::nullopt, dropout_p, seed);
}

}  // namespace

FASTLM_LIBRARY(m) {
  m.impl("dropout_add." BACKEND, &forward);
  m.impl("dropout_add_backward." BACKEND, &backward);
}

}  // namespace fastlm::of_dropout_add
