// The activations and their derivatives, written so that the compiler vectorises loops over them.
#pragma once

#include <cmath>

#include "../contract/activation.h"
#include "math.h"

namespace fastlm {

// Each activation: value(z), and gradient(z, g) = g * value'(z).
struct Gelu {
  // The normal distribution at z, and its exponential exp(-z^2 / 2): one exp and one division, where erf has
  // an exp and two polynomials. For z <= 0 it is exp(-z^2 / 2) * t * P(t), t = 1 / (1 + 0.305 |z|), the form
  // of Abramowitz and Stegun 26.2.17; P was fitted to 1.1e-7 relative error (iterated weighted least squares,
  // 200001 points).
  struct Normal {
    float distribution, exponential;
    explicit Normal(float z) : exponential(exp_nonpositive(-0.5f * z * z)) {
      const float t = 1.0f / (1.0f + 0.305f * std::fabs(z));
      float p = 0.036773404f;
      p = p * t - 0.153303191f;
      p = p * t + 0.186270812f;
      p = p * t - 0.0384986577f;
      p = p * t + 0.121304937f;
      p = p * t + 0.103332617f;
      p = p * t + 0.122481374f;
      p = p * t + 0.121638755f;
      const float tail = p * t * exponential;
      distribution = select(z < 0.0f, tail, 1.0f - tail);
    }
  };
  static float value(float z) { return z * Normal(z).distribution; }
  static float gradient(float z, float g) {
    const Normal n(z);
    return g * (n.distribution + z * (0.398942280f * n.exponential));
  }
};

// sigmoid(v) and its derivative sigmoid(v) * (1 - sigmoid(v)), without overflow or cancellation.
struct Sigmoid {
  float value, slope;
  explicit Sigmoid(float v) {
    const float e = exp_nonpositive(-std::fabs(v));
    const float large = 1.0f / (1.0f + e), small = e * large;
    value = select(v < 0.0f, small, large);
    slope = small * large;
  }
};

struct GeluTanh {
  static constexpr float kLinear = 1.59576912f;   // 2 sqrt(2 / pi)
  static constexpr float kCubic = 0.0713548163f;  // that times 0.044715
  static float value(float z) { return z * Sigmoid(z * (kLinear + kCubic * (z * z))).value; }
  static float gradient(float z, float g) {
    const float square = z * z;
    const Sigmoid s(z * (kLinear + kCubic * square));
    return g * (s.value + z * (kLinear + 3.0f * kCubic * square) * s.slope);
  }
};

struct Relu {
  static float value(float z) { return select(z < 0.0f, 0.0f, z); }
  static float gradient(float z, float g) { return select(z <= 0.0f, 0.0f, g); }
};

struct Silu {
  static float value(float z) { return z * Sigmoid(z).value; }
  static float gradient(float z, float g) {
    const Sigmoid s(z);
    return g * (s.value + z * s.slope);
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
