// What linear_cross_entropy does in backward with the gradients that its forward computed: signature.
#pragma once

#include "../kernels.h"

namespace fastlm {

// units[i] *= *factor, n of them one behind the other, of dtype. Where *factor is 1, as loss.backward() gives
// it, units are not touched. On a GPU only: a CPU knows the factor.
void scale_units(const Context& context, DType dtype, const float* factor, int64_t n, void* units);

}  // namespace fastlm
