// From torch tensors to the plain arguments of kernels.h. The only headers of torch that the project
// includes; and the only file of the bindings that knows which backend they are compiled for: the CPU's
// kernels; FASTLM_CUDA, those of csrc/cuda on CUDA tensors; FASTLM_SIMULATED, those on CPU tensors, their
// launches executed by fastlm.testing.ptxsim.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <optional>
#include <tuple>

#include "../contract/convert.h"
#include "backend.h"

namespace fastlm {

using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, "fastlm: no kernel takes ", t.scalar_type());
  }
}

inline bool given(const OptionalTensor& t) { return t.has_value() && t->defined(); }

// A tensor as rows of `cols` contiguous elements, `stride` elements apart; copied only if its leading
// dimensions are not one even stride.
struct Rows {
  Tensor tensor;  // keeps a copy alive
  int64_t rows = 0, cols = 0, stride = 0;
  const void* data() const { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }
};

inline Rows rows_of(const Tensor& t) {
  if (t.dim() == 0) return {t, 1, 1, 1};
  const int64_t cols = t.size(-1), rows = cols == 0 ? 0 : t.numel() / cols;
  if (rows == 0) return {t, rows, cols, cols};
  bool even = cols == 1 || t.stride(-1) == 1;
  int64_t stride = cols, inner = -1;  // inner: the last leading dimension of more than one element
  for (int64_t d = t.dim() - 2; d >= 0 && even; --d) {
    if (t.size(d) == 1) continue;
    if (inner < 0) {
      stride = t.stride(d);
    } else {
      even = t.stride(d) == t.stride(inner) * t.size(inner);
    }
    inner = d;
  }
  if (!even) return {t.contiguous(), rows, cols, cols};
  return {t, rows, cols, stride};
}

inline Rows rows_of(const OptionalTensor& t) { return given(t) ? rows_of(*t) : Rows{}; }

inline Dropout dropout_of(double p, const OptionalTensor& seed) {
  return {p, p > 0 ? seed->const_data_ptr<int64_t>() : nullptr};
}

// A new contiguous tensor, or an empty one where it is not wanted: functional ops may neither return nothing
// nor alias their inputs. Not at::empty: its way through the dispatcher costs a small op 0.3 us a tensor.
inline Tensor new_tensor(at::IntArrayRef sizes, at::ScalarType type, bool wanted = true) {
  return empty_tensor(wanted ? sizes : at::IntArrayRef{0}, type);
}

inline Tensor output_like(const Tensor& t, bool wanted = true) {
  return new_tensor(t.sizes(), t.scalar_type(), wanted);
}

inline Tensor float_output(at::IntArrayRef sizes, const Tensor&, bool wanted = true) {
  return new_tensor(sizes, at::kFloat, wanted);
}

// A small tensor as contiguous float32.
inline Tensor floats_of(const Tensor& t) {
  if (t.scalar_type() == at::kFloat) return t.contiguous();
  const Tensor from = t.contiguous(), made = new_tensor(t.sizes(), at::kFloat);
  to_float32(context_of(t), dtype_of(t), from.const_data_ptr(), t.numel(), made.mutable_data_ptr<float>());
  return made;
}

#if defined(FASTLM_GPU)
constexpr bool kNarrowParameters = true;
inline Parameter parameter_data(const Tensor& t) {
  if (!t.defined()) return {};
  return {t.const_data_ptr(), t.scalar_type() != at::kFloat};
}
inline ParameterGradient gradient_data(const Tensor& t) {
  return {t.numel() ? t.mutable_data_ptr() : nullptr, t.scalar_type() != at::kFloat};
}
#else
constexpr bool kNarrowParameters = false;
inline Parameter parameter_data(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }
inline ParameterGradient gradient_data(const Tensor& t) {
  return t.numel() ? t.mutable_data_ptr<float>() : nullptr;
}
#endif

// The type in which kernels take a weight, bias or table, and write its gradient.
inline at::ScalarType parameter_type(const OptionalTensor& t) {
  return kNarrowParameters && given(t) ? t->scalar_type() : at::kFloat;
}

// What kernels take: its own memory, or a copy, which the caller keeps.
inline Tensor parameter(const Tensor& t) { return kNarrowParameters ? t.contiguous() : floats_of(t); }

// `value`, of `type`, where it was not given.
inline Tensor parameter(const OptionalTensor& t, int64_t cols, float value,
                        at::ScalarType type = at::kFloat) {
  if (given(t)) return parameter(*t);
  const Tensor made = new_tensor({cols}, type);
  fill(context_of(made), dtype_of(made), value, cols, made.mutable_data_ptr());
  return made;
}

// Two that a kernel takes in one type.
inline std::array<Tensor, 2> of_one_type(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() == b.scalar_type()) return {a, b};
  return {floats_of(a), floats_of(b)};
}

// What kernels write the gradient of a weight or bias to.
inline Tensor gradient_output(int64_t cols, const OptionalTensor& t, bool wanted) {
  return new_tensor({cols}, parameter_type(t), wanted);
}

// That gradient, contiguous, in the parameter's own type.
inline Tensor like_parameter(const Tensor& gradient, const OptionalTensor& t) {
  if (!given(t) || t->scalar_type() == gradient.scalar_type()) return gradient;
  const Tensor made = new_tensor(gradient.sizes(), t->scalar_type());
  from_float32(context_of(gradient), dtype_of(*t), gradient.const_data_ptr<float>(), gradient.numel(),
               made.mutable_data_ptr());
  return made;
}

inline void* data_or_null(const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }
inline float* floats_or_null(const Tensor& t) { return t.numel() ? t.mutable_data_ptr<float>() : nullptr; }

}  // namespace fastlm
