#if defined(FASTLM_GPU)
#include "../contract/scale_units.h"

#include "tensors.h"

namespace fastlm::of_scale_units {
namespace {

// units: contiguous. factor: float32, one number.
void scale(const Tensor& units, const Tensor& factor) {
  scale_units(context_of(units), dtype_of(units), factor.const_data_ptr<float>(), units.numel(),
              units.mutable_data_ptr());
}

}  // namespace

FASTLM_LIBRARY(m) { m.impl("scale_units." BACKEND, &scale); }

}  // namespace fastlm::of_scale_units
#endif
