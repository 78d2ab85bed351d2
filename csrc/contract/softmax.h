// softmax: what its kernels compute, and their signatures.
#pragma once

#include "../kernels.h"

namespace fastlm {

// A boolean tensor read in place, whatever it broadcasts along: element (row, col) is at
// data[row_offset + col * col_stride], where row = (i_0, i_1, ...) over sizes, outermost first, and
// row_offset is the sum of i_k * strides[k]. data is null if there is no mask.
struct Mask {
  static constexpr int kDims = 8;
  const uint8_t* data = nullptr;
  int dims = 0;
  int64_t sizes[kDims] = {}, strides[kDims] = {}, col_stride = 0;
};

// y = e / sum(e), e = exp(s - max(s)), s = scale * x where attended and -inf elsewhere; 0 where s is nothing
// but -inf. causal: row r attends to its first r % cols + 1 columns, and reads no other.
struct SoftmaxForward {
  DType dtype;
  int64_t rows, cols;
  const void* x;
  int64_t x_stride;
  float scale;
  Mask mask;
  bool causal;
  void* y;  // [rows, cols], contiguous
};
void softmax_forward(const Context& context, const SoftmaxForward& a);

// dx = scale * y * (dy - sum(dy * y)).
struct SoftmaxBackward {
  DType dtype;
  int64_t rows, cols;
  const void *dy, *y;
  int64_t dy_stride, y_stride;
  float scale;
  bool causal;
  void* dx;  // [rows, cols], contiguous
};
void softmax_backward(const Context& context, const SoftmaxBackward& a);

}  // namespace fastlm
