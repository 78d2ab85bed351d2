// bias_act: what its kernels compute, and their signatures.
#pragma once

#include "../kernels.h"
#include "activation.h"

namespace fastlm {

// y = dropout(act(x + bias)).
struct BiasAct {
  DType dtype;
  Activation activation;
  int64_t rows, cols;
  const void* x;
  int64_t x_stride;
  Parameter bias;  // [cols], or null
  Dropout dropout;
  void* y;  // [rows, cols], contiguous
};
void bias_act(const Context& context, const BiasAct& a);

// dx = act'(x + bias) * dropout's mask and scale applied to dy; dbias = sum(dx) over rows, before dx is
// rounded. `partial` is scratch of row_blocks(rows) * cols floats, needed with dbias: rows are cut by
// shape alone.
struct BiasActBackward {
  DType dtype;
  Activation activation;
  int64_t rows, cols;
  const void *dy, *x;
  int64_t dy_stride, x_stride;
  Parameter bias;  // [cols], or null
  Dropout dropout;
  void* dx;  // [rows, cols], contiguous
  ParameterGradient dbias;
  float* partial;
};
void bias_act_backward(const Context& context, const BiasActBackward& a);

}  // namespace fastlm
