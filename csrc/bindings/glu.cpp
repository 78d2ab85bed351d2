#include "../contract/glu.h"

#include "activation.h"
#include "tensors.h"

namespace fastlm::of_glu {
namespace {

Tensor forward(const Tensor& gate, const Tensor& up, c10::string_view activation) {
  const Rows g = rows_of(gate), u = rows_of(up);
  const Tensor y = output_like(gate);
  glu(context_of(gate), {.dtype = dtype_of(gate),
                         .activation = activation_of(activation),
                         .rows = g.rows,
                         .cols = g.cols,
                         .gate = g.data(),
                         .up = u.data(),
                         .gate_stride = g.stride,
                         .up_stride = u.stride,
                         .y = y.mutable_data_ptr()});
  return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& gate, const Tensor& up,
                                    c10::string_view activation, const std::array<bool, 2>& needs) {
  const Rows d = rows_of(dy), g = rows_of(gate), u = rows_of(up);
  const Tensor dgate = output_like(gate, needs[0]), dup = output_like(gate, needs[1]);
  glu_backward(context_of(gate), {.dtype = dtype_of(gate),
                                  .activation = activation_of(activation),
                                  .rows = g.rows,
                                  .cols = g.cols,
                                  .dy = d.data(),
                                  .gate = g.data(),
                                  .up = u.data(),
                                  .dy_stride = d.stride,
                                  .gate_stride = g.stride,
                                  .up_stride = u.stride,
                                  .dgate = data_or_null(dgate),
                                  .dup = data_or_null(dup)});
  return {dgate, dup};
}

}  // namespace

FASTLM_LIBRARY(m) {
  m.impl("glu." BACKEND, &forward);
  m.impl("glu_backward." BACKEND, &backward);
}

}  // namespace fastlm::of_glu
