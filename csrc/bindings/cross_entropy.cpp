#include "../contract/cross_entropy.h"

#include <string_view>

#include "tensors.h"

namespace fastlm::of_cross_entropy {
namespace {

CrossEntropyInput input(const Rows& logits, const Tensor& target, int64_t ignore_index,
                        double label_smoothing, double z_loss, std::string_view reduction) {
  return {.dtype = dtype_of(logits.tensor),
          .rows = target.numel(),
          .cols = logits.cols,
          .logits = logits.data(),
          .logits_stride = logits.stride,
          .target = target.const_data_ptr<int64_t>(),
          .ignore_index = ignore_index,
          .label_smoothing = static_cast<float>(label_smoothing),
          .z_loss = static_cast<float>(z_loss),
          .reduction = reduction == "none"  ? Reduction::kNone
                       : reduction == "sum" ? Reduction::kSum
                                            : Reduction::kMean};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& target,
                                                   int64_t ignore_index, double label_smoothing,
                                                   double z_loss, std::string_view reduction) {
  const Rows in = rows_of(logits);
  const Tensor targets = target.contiguous();
  const Tensor maximum = float_output(target.sizes(), logits), exp_sum = float_output(target.sizes(), logits);
  const Tensor row_loss = float_output(target.sizes(), logits), count = new_tensor({}, at::kLong);
  const Tensor loss =
      new_tensor(reduction == "none" ? target.sizes() : at::IntArrayRef{}, logits.scalar_type());
  cross_entropy_forward(context_of(logits),
                        {.in = input(in, targets, ignore_index, label_smoothing, z_loss, reduction),
                         .loss = loss.mutable_data_ptr(),
                         .row_loss = row_loss.mutable_data_ptr<float>(),
                         .maximum = maximum.mutable_data_ptr<float>(),
                         .exp_sum = exp_sum.mutable_data_ptr<float>(),
                         .count = count.mutable_data_ptr<int64_t>()});
  return {loss, maximum, exp_sum, count};
}

Tensor backward(const Tensor& dloss, const Tensor& logits, const Tensor& target, const Tensor& maximum,
                const Tensor& exp_sum, const Tensor& count, int64_t ignore_index, double label_smoothing,
                double z_loss, std::string_view reduction) {
  const Rows in = rows_of(logits);
  const Tensor targets = target.contiguous(), gradient = dloss.contiguous(), dlogits = output_like(logits);
  cross_entropy_backward(context_of(logits),
                         {.in = input(in, targets, ignore_index, label_smoothing, z_loss, reduction),
                          .dloss = gradient.const_data_ptr(),
                          .maximum = maximum.const_data_ptr<float>(),
                          .exp_sum = exp_sum.const_data_ptr<float>(),
                          .count = count.const_data_ptr<int64_t>(),
                          .dlogits = dlogits.mutable_data_ptr()});
  return dlogits;
}

}  // namespace

FASTLM_LIBRARY(m) {
  m.impl("cross_entropy." BACKEND, &forward);
  m.impl("cross_entropy_backward." BACKEND, &backward);
}

}  // namespace fastlm::of_cross_entropy
