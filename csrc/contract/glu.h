// glu: what its kernels compute, and their signatures.
#pragma once

#include "../kernels.h"
#include "activation.h"

namespace fastlm {

// y = act(gate) * up.
struct Glu {
  DType dtype;
  Activation activation;
  int64_t rows, cols;
  const void *gate, *up;
  int64_t gate_stride, up_stride;
  void* y;  // [rows, cols], contiguous
};
void glu(const Context& context, const Glu& a);

// dgate = dy * up * act'(gate); dup = dy * act(gate).
struct GluBackward {
  DType dtype;
  Activation activation;
  int64_t rows, cols;
  const void *dy, *gate, *up;
  int64_t dy_stride, gate_stride, up_stride;
  void *dgate, *dup;  // [rows, cols], contiguous; either may be null
};
void glu_backward(const Context& context, const GluBackward& a);

}  // namespace fastlm
