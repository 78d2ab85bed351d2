// layer_norm: what its kernels compute, and their signatures.
#pragma once

#include "../kernels.h"

namespace fastlm {

// h = dropout(x) + residual, rounded to dtype; y = (h - mean(h)) * rstd(h) * weight + bias,
// rstd = 1 / sqrt(mean((h - mean)^2) + eps). h may be null if there is neither dropout nor residual.
struct LayerNormForward {
  DType dtype;
  int64_t rows, cols;
  const void *x, *residual;
  int64_t x_stride, residual_stride;
  Parameter weight, bias;  // [cols], never null, of one type
  float eps;
  Dropout dropout;
  void *y, *h;         // [rows, cols], contiguous
  float *mean, *rstd;  // [rows]
};
void layer_norm_forward(const Context& context, const LayerNormForward& a);

// With g = dy * weight and n = (h - mean) * rstd: dresidual = rstd * (g - mean(g) - n * mean(g * n)) + dh;
// dx = dropout's mask and scale applied to dresidual; dweight = sum(dy * n), dbias = sum(dy) over rows.
// `partial` is scratch of row_blocks(rows) * 2 * cols floats: rows are cut by shape alone, so that
// the sums do not depend on the number of threads.
struct LayerNormBackward {
  DType dtype;
  int64_t rows, cols;
  const void *dy, *dh, *h;  // dy or dh may be null, not both
  int64_t dy_stride, dh_stride, h_stride;
  Parameter weight;  // as forward's
  const float *mean, *rstd;
  Dropout dropout;
  void *dx, *dresidual;  // [rows, cols], contiguous; either may be null
  ParameterGradient dweight, dbias;
  float* partial;
};
void layer_norm_backward(const Context& context, const LayerNormBackward& a);

}  // namespace fastlm
