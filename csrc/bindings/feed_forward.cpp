// feed_forward: torch's own matmuls, and the kernels of bias_act between them.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "bias_act.h"
#include "torch_ops.h"

namespace fastlm::of_feed_forward {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor matrix_of(const Tensor& t) {
  if (t.dim() == 2) return t;
  return t.reshape({c10::multiply_integers(t.sizes().slice(0, t.dim() - 1)), t.size(-1)});
}

Tensor reshaped(const Tensor& matrix, const Tensor& like) {
  if (like.dim() == 2) return matrix;
  at::DimVector sizes(like.sizes());
  sizes.back() = matrix.size(1);
  return matrix.view(sizes);
}

Tensor projected(const Tensor& x, const Tensor& w, const OptionalTensor& b) {
  return given(b) ? at::addmm(*b, x, w.t()) : at::mm(x, w.t());
}

// y and z = x @ w1.T + b1, which is all that backward needs: eager torch keeps four such tensors with
// dropout. b1 is added by the matmul, before z is rounded: else relu's gradient meets wrong signs.
Two forward(const Tensor& x, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
            const OptionalTensor& b2, c10::string_view activation, double dropout_p,
            const OptionalTensor& seed) {
  const WithinKernel guard;
  const Tensor z = projected(matrix_of(x), w1, b1);
  const Tensor a = of_bias_act::output(z, {}, activation, dropout_p, seed);
  return {reshaped(projected(a, w2, b2), x), z};
}

// The activation is computed again, and its memory then holds its own gradient.
Five backward(const Tensor& dy_, const Tensor& x, const Tensor& w1, const OptionalTensor& b1,
              const Tensor& w2, const OptionalTensor&, const Tensor& z, c10::string_view activation,
              double dropout_p, const OptionalTensor& seed, const std::array<bool, 5>& needs) {
  const WithinKernel guard;
  const Tensor dy = matrix_of(dy_);
  const auto unwanted = [&] { return output_like(x, false); };
  Tensor da, dw2 = unwanted(), db2 = needs[4] ? dy.sum(0) : unwanted();
  if (needs[3]) {
    da = of_bias_act::output(z, {}, activation, dropout_p, seed);
    dw2 = at::mm(dy.t(), da);
  }
  if (!needs[0] && !needs[1] && !needs[2]) return {unwanted(), unwanted(), unwanted(), dw2, db2};
  da = da.defined() ? at::mm_out(da, dy, w2) : at::mm(dy, w2);
  const auto [dz, db1] =
      of_bias_act::gradients(da, z, {}, activation, dropout_p, seed, {needs[0] || needs[1], needs[2]});
  return {needs[0] ? reshaped(at::mm(dz, w1), x) : unwanted(),
          needs[1] ? at::mm(dz.t(), matrix_of(x)) : unwanted(),
          needs[2] ? like_parameter(db1, b1) : unwanted(), dw2, db2};
}

}  // namespace

FASTLM_LIBRARY(m) {
  m.impl("feed_forward." BACKEND, &forward);
  m.impl("feed_forward_backward." BACKEND, &backward);
}

}  // namespace fastlm::of_feed_forward
