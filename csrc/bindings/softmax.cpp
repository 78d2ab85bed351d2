#include "../contract/softmax.h"

#include "tensors.h"

namespace fastlm::of_softmax {
namespace {

// The mask's leading dimensions with neighbours of one stride joined; null data if more than Mask::kDims
// remain.
Mask joined(const Tensor& t) {
  Mask mask{.col_stride = t.dim() ? t.stride(-1) : 0};
  for (int64_t d = 0; d + 1 < t.dim(); ++d) {
    const int64_t size = t.size(d), stride = t.stride(d), last = mask.dims - 1;
    if (size == 1) continue;
    if (mask.dims > 0 && mask.strides[last] == stride * size) {
      mask.sizes[last] *= size;
      mask.strides[last] = stride;
      continue;
    }
    if (mask.dims == Mask::kDims) return mask;
    mask.sizes[mask.dims] = size;
    mask.strides[mask.dims++] = stride;
  }
  mask.data = static_cast<const uint8_t*>(t.const_data_ptr());
  return mask;
}

Tensor forward(const Tensor& x, double scale, const OptionalTensor& mask, bool causal) {
  const Rows in = rows_of(x);
  const Tensor y = output_like(x);
  Mask keep = given(mask) ? joined(*mask) : Mask{};
  const Tensor copy = given(mask) && !keep.data && mask->numel() ? mask->contiguous() : Tensor{};
  if (copy.defined()) keep = joined(copy);
  softmax_forward(context_of(x), {.dtype = dtype_of(x),
                                  .rows = in.rows,
                                  .cols = in.cols,
                                  .x = in.data(),
                                  .x_stride = in.stride,
                                  .scale = static_cast<float>(scale),
                                  .mask = keep,
                                  .causal = causal,
                                  .y = y.mutable_data_ptr()});
  return y;
}

Tensor backward(const Tensor& dy, const Tensor& y, double scale, bool causal) {
  const Rows gradient = rows_of(dy), probabilities = rows_of(y);
  const Tensor dx = output_like(y);
  softmax_backward(context_of(y), {.dtype = dtype_of(y),
                                   .rows = gradient.rows,
                                   .cols = gradient.cols,
                                   .dy = gradient.data(),
                                   .y = probabilities.data(),
                                   .dy_stride = gradient.stride,
                                   .y_stride = probabilities.stride,
                                   .scale = static_cast<float>(scale),
                                   .causal = causal,
                                   .dx = dx.mutable_data_ptr()});
  return dx;
}

}  // namespace

FASTLM_LIBRARY(m) {
  m.impl("softmax." BACKEND, &forward);
  m.impl("softmax_backward." BACKEND, &backward);
}

}  // namespace fastlm::of_softmax
