// The activations and their derivatives, on packs of vectors.
#pragma once

#include "../contract/activation.h"
#include "packs.h"

namespace fastlm {

// Each activation: value(z), and gradient(z, g) = g * value'(z). NaN stays, for both have z as a factor.
struct Gelu {
  // The normal distribution at z, and its exponential exp(-z^2 / 2): one exp and one division, where erf has
  // an exp and two polynomials. For z <= 0 it is exp(-z^2 / 2) * t * P(t), t = 1 / (1 + 0.305 |z|), the form
  // of Abramowitz and Stegun 26.2.17; P was fitted to 1.1e-7 relative error (iterated weighted least squares,
  // 200001 points).
  struct Normal {
    Pack distribution, exponential;
    FASTLM_INLINE explicit Normal(const Pack& z) : exponential(exp_bounded(at_least(-88.0f, z * z * -0.5f))) {
      const Pack t = 1.0f / (magnitude(z) * 0.305f + 1.0f);
      Pack p = t * 0.036773404f - 0.153303191f;
      p = p * t + 0.186270812f;
      p = p * t - 0.0384986577f;
      p = p * t + 0.121304937f;
      p = p * t + 0.103332617f;
      p = p * t + 0.122481374f;
      p = p * t + 0.121638755f;
      const Pack tail = p * t * exponential;
      distribution = where_negative(z, tail, 1.0f - tail);
    }
  };
  FASTLM_INLINE static Pack value(const Pack& z) { return z * Normal(z).distribution; }
  FASTLM_INLINE static Pack gradient(const Pack& z, const Pack& g) {
    const Normal n(z);
    return g * (z * (n.exponential * 0.398942280f) + n.distribution);
  }
};

// sigmoid(v) and its derivative, of -v: exp(-v) / (1 + exp(-v))^2 neither overflows nor cancels while
// exp(-v) is a float. Beyond 88 both are flushed to 0, as their products with an infinity should be.
struct Sigmoid {
  Pack value, slope;
  FASTLM_INLINE explicit Sigmoid(const Pack& minus_v) {
    const Pack e = exp_bounded(at_most(88.0f, at_least(-88.0f, minus_v)));
    value = 1.0f / (e + 1.0f);
    slope = e * value * value;
  }
};

struct GeluTanh {
  static constexpr float kLinear = 1.59576912f;   // 2 sqrt(2 / pi)
  static constexpr float kCubic = 0.0713548163f;  // that times 0.044715
  FASTLM_INLINE static Pack value(const Pack& z) {
    return z * Sigmoid(z * (z * z * -kCubic - kLinear)).value;
  }
  FASTLM_INLINE static Pack gradient(const Pack& z, const Pack& g) {
    const Pack square = z * z;
    const Sigmoid s(z * (square * -kCubic - kLinear));
    return g * (z * (square * (3.0f * kCubic) + kLinear) * s.slope + s.value);
  }
};

struct Relu {
  FASTLM_INLINE static Pack value(const Pack& z) { return at_least(0.0f, z); }
  FASTLM_INLINE static Pack gradient(const Pack& z, const Pack& g) { return zero_unless_positive(z, g); }
};

struct Silu {
  FASTLM_INLINE static Pack value(const Pack& z) { return z * Sigmoid(z * -1.0f).value; }
  FASTLM_INLINE static Pack gradient(const Pack& z, const Pack& g) {
    const Sigmoid s(z * -1.0f);
    return g * (z * s.slope + s.value);
  }
};

template <class F>
void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kGelu:
      return f.template operator()<Gelu>();
    case Activation::kGeluTanh:
      return f.template operator()<GeluTanh>();
    case Activation::kRelu:
      return f.template operator()<Relu>();
    case Activation::kSilu:
      return f.template operator()<Silu>();
  }
}

}  // namespace fastlm
