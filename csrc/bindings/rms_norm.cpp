#include "../contract/rms_norm.h"

#include "tensors.h"

namespace fastlm::of_rms_norm {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

// Without a weight its ones are the whole factor: the offset belongs to a weight.
float offset_of(const OptionalTensor& weight, double offset) {
  return given(weight) ? static_cast<float>(offset) : 0.0f;
}

Three forward(const Tensor& x, const OptionalTensor& weight, double eps, double weight_offset,
              const OptionalTensor& residual, double dropout_p, const OptionalTensor& seed) {
  const Rows in = rows_of(x), add = rows_of(residual);
  const Tensor w = parameter(weight, in.cols, 1);
  const Tensor y = output_like(x), h = output_like(x, given(residual) || dropout_p > 0);
  const Tensor rstd = float_output(x.sizes().slice(0, x.dim() - 1), x);
  rms_norm_forward(context_of(x), {.dtype = dtype_of(x),
                                   .rows = in.rows,
                                   .cols = in.cols,
                                   .x = in.data(),
                                   .residual = add.data(),
                                   .x_stride = in.stride,
                                   .residual_stride = add.stride,
                                   .weight = parameter_data(w),
                                   .weight_offset = offset_of(weight, weight_offset),
                                   .eps = static_cast<float>(eps),
                                   .dropout = dropout_of(dropout_p, seed),
                                   .y = y.mutable_data_ptr(),
                                   .h = data_or_null(h),
                                   .rstd = rstd.mutable_data_ptr<float>()});
  return {y, h, rstd};
}

Three backward(const OptionalTensor& dy, const OptionalTensor& dh, const Tensor& x, const Tensor& h,
               const OptionalTensor& weight, double weight_offset, const Tensor& rstd, double dropout_p,
               const OptionalTensor& seed, const std::array<bool, 3>& needs) {
  // needs: dx, dweight, dresidual. Without dropout dx is dresidual: computed once, returned as dx.
  const Rows normed = rows_of(h.numel() ? h : x), gy = rows_of(dy), gh = rows_of(dh);
  const Tensor w = parameter(weight, normed.cols, 1);
  const Tensor dx = output_like(x, needs[0] || (needs[2] && dropout_p == 0));
  const Tensor dresidual = output_like(x, needs[2] && dropout_p > 0);
  const Tensor dweight = gradient_output(normed.cols, weight, needs[1]);
  const Tensor partial = float_output({row_blocks(normed.rows), normed.cols}, x, needs[1]);
  rms_norm_backward(context_of(x), {.dtype = dtype_of(x),
                                    .rows = normed.rows,
                                    .cols = normed.cols,
                                    .dy = gy.data(),
                                    .dh = gh.data(),
                                    .h = normed.data(),
                                    .dy_stride = gy.stride,
                                    .dh_stride = gh.stride,
                                    .h_stride = normed.stride,
                                    .weight = parameter_data(w),
                                    .rstd = rstd.const_data_ptr<float>(),
                                    .weight_offset = offset_of(weight, weight_offset),
                                    .dropout = dropout_of(dropout_p, seed),
                                    .dx = data_or_null(dx),
                                    .dresidual = data_or_null(dresidual),
                                    .dweight = gradient_data(dweight),
                                    .partial = floats_or_null(partial)});
  return {dx, like_parameter(dweight, weight), dresidual};
}

}  // namespace

FASTLM_LIBRARY(m) {
  m.impl("rms_norm." BACKEND, &forward);
  m.impl("rms_norm_backward." BACKEND, &backward);
}

}  // namespace fastlm::of_rms_norm
