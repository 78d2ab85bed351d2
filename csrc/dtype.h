// Data types of the kernels, and how a run-time value becomes a compile-time constant.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace fastlm {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Calls f.operator()<T>() with T = float, Half or BFloat16.
template <class F>
auto with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f.template operator()<float>();
    case DType::kFloat16:
      return f.template operator()<Half>();
    case DType::kBFloat16:
      return f.template operator()<BFloat16>();
  }
  throw std::logic_error("fastlm: unknown DType");
}

// Calls f.operator()<true>() or f.operator()<false>().
template <class F>
auto with_bool(bool value, F&& f) {
  return value ? f.template operator()<true>() : f.template operator()<false>();
}

// Calls f.operator()<N>() for the N of Values that equals value.
template <int... Values, class F>
void with_int(int value, F&& f) {
  const bool found = ((value == Values && (f.template operator()<Values>(), true)) || ...);
  if (!found) throw std::logic_error("fastlm: with_int met a value that was not listed");
}

}  // namespace fastlm
