// dropout_add: what its kernels compute, and their signatures.
#pragma once

#include "../kernels.h"

namespace fastlm {

// y = dropout(x) + residual. Its backward is the same kernel without a residual, applied to dy.
struct DropoutAdd {
  DType dtype;
  int64_t rows, cols;
  const void *x, *residual;
  int64_t x_stride, residual_stride;
  Dropout dropout;
  void* y;  // [rows, cols], contiguous
};
void dropout_add(const Context& context, const DropoutAdd& a);

}  // namespace fastlm
