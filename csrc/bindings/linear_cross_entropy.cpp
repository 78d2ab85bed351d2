// linear_cross_entropy: rows in chunks; a chunk's logits by torch's matmul, their gradient by the kernel of
// cross_entropy.h, and two more matmuls: no row's logits outlive its chunk. In C++ because
// Python between the matmuls cost 180 us on a CPU, nine times what a small problem takes.
#include <ATen/ops/mul.h>

#include <string_view>

#if defined(FASTLM_GPU)
#include "loss_rows_gpu.h"
#else
#include "loss_rows_cpu.h"
#endif
#include "torch_ops.h"

namespace fastlm::of_linear_cross_entropy {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The loss, and the gradients for dloss = 1 as far as `early` says: with them, no logits are computed twice.
Four forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
             int64_t ignore_index, double label_smoothing, double z_loss, std::string_view reduction,
             bool widened, const Flags& early) {
  const WithinKernel guard;
  const Problem p = problem(x, weight, bias, target, {ignore_index, label_smoothing, z_loss});
  const bool mean = reduction == "mean";
  const Results r = run(p, {Tensor(), mean}, early);
  const Tensor loss = reduction == "none" ? r.losses : total(p, r.losses, mean);
  const at::ScalarType kept = kept_type(x);
  return {cast(loss, widened ? at::kFloat : x.scalar_type()), cast(r.dx, kept), cast(r.dweight, kept),
          cast(r.dbias, kept)};
}

// Scales what forward computed, or computes the logits again: with "none" each row has its own dloss.
Three backward(const Tensor& dloss, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
               const Tensor& target, const Tensor& unit_dx, const Tensor& unit_dweight,
               const Tensor& unit_dbias, int64_t ignore_index, double label_smoothing, double z_loss,
               std::string_view reduction, const Flags& early, const Flags& needs) {
  const WithinKernel guard;
  const Tensor gradient = floats_of(dloss);
  const at::ScalarType type = x.scalar_type();
  const auto known = [&](int i) { return early[i] || !needs[i]; };
  if (known(0) && known(1) && known(2)) {
    const Tensor factor = gradient.view({1});  // of no axis, it would be rounded to the unit's type
    const auto scaled = [&](const Tensor& unit, bool wanted) {
      Tensor made = new_tensor(unit.sizes(), type, wanted);
      if (wanted) at::mul_out(made, unit, factor);
      return made;
    };
    return {scaled(unit_dx, needs[0]), scaled(unit_dweight, needs[1]), scaled(unit_dbias, needs[2])};
  }
  const Problem p = problem(x, weight, bias, target, {ignore_index, label_smoothing, z_loss});
  const Results r = run(p, {gradient, reduction == "mean"}, needs);
  return {cast(r.dx, type), cast(r.dweight, type), cast(r.dbias, type)};
}

}  // namespace

FASTLM_LIBRARY(m) {
  m.impl("linear_cross_entropy." BACKEND, &forward);
  m.impl("linear_cross_entropy_backward." BACKEND, &backward);
}

}  // namespace fastlm::of_linear_cross_entropy
