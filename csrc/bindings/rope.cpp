#include "../contract/rope.h"

#include <ATen/ops/empty_like.h>

#include "tensors.h"

namespace fastlm::of_rope {
namespace {

Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool transposed) {
  const Tensor in = x.stride(3) == 1 ? x : x.contiguous();
  const auto [c, s] = of_one_type(parameter(cos), parameter(sin));
  const Tensor y = at::empty_like(in);  // heads and positions lie in memory as in x
  if (y.numel() == 0) return y;
  const bool per_sequence = c.dim() == 3 && c.size(0) > 1;
  rope(context_of(x), {.dtype = dtype_of(x),
                       .batch = x.size(0),
                       .heads = x.size(1),
                       .seq = x.size(2),
                       .dim = x.size(3),
                       .rotated = c.size(-1),
                       .interleaved = interleaved,
                       .transposed = transposed,
                       .x = in.const_data_ptr(),
                       .x_stride = {in.stride(0), in.stride(1), in.stride(2)},
                       .cos = parameter_data(c),
                       .sin = parameter_data(s),
                       .table_batch_stride = per_sequence ? c.size(1) * c.size(2) : 0,
                       .y = y.mutable_data_ptr(),
                       .y_stride = {y.stride(0), y.stride(1), y.stride(2)}});
  return y;
}

Tensor forward(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return rotate(x, cos, sin, interleaved, false);
}

Tensor backward(const Tensor& dy, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return rotate(dy, cos, sin, interleaved, true);
}

}  // namespace

FASTLM_LIBRARY(m) {
  m.impl("rope." BACKEND, &forward);
  m.impl("rope_backward." BACKEND, &backward);
}

}  // namespace fastlm::of_rope
