// rms_norm: what its kernels compute, and their signatures.
#pragma once

#include "../kernels.h"

namespace fastlm {

// h = dropout(x) + residual, rounded to dtype; y = h * rstd(h) * (weight + weight_offset),
// rstd = 1 / sqrt(mean(h^2) + eps). h may be null if there is neither dropout nor residual.
struct RmsNormForward {
  DType dtype;
  int64_t rows, cols;
  const void *x, *residual;
  int64_t x_stride, residual_stride;
  Parameter weight;  // [cols], never null
  float weight_offset, eps;
  Dropout dropout;
  void *y, *h;  // [rows, cols], contiguous
  float* rstd;  // [rows]
};
void rms_norm_forward(const Context& context, const RmsNormForward& a);

// With g = dy * (weight + weight_offset) and n = h * rstd: dresidual = rstd * (g - n * mean(g * n)) + dh;
// dx = dropout's mask and scale applied to dresidual; dweight = sum(dy * n) over rows. `partial` is scratch
// of row_blocks(rows) * cols floats, needed with dweight: rows are cut by shape alone.
struct RmsNormBackward {
  DType dtype;
  int64_t rows, cols;
  const void *dy, *dh, *h;  // dy or dh may be null, not both
  int64_t dy_stride, dh_stride, h_stride;
  Parameter weight;  // as forward's
  const float* rstd;
  float weight_offset;
  Dropout dropout;
  void *dx, *dresidual;  // [rows, cols], contiguous; either may be null
  ParameterGradient dweight;
  float* partial;
};
void rms_norm_backward(const Context& context, const RmsNormBackward& a);

}  // namespace fastlm
