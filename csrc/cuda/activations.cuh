// The activations and their derivatives on float32: the formulas of csrc/cpu/activations.h.
#pragma once

#include "../contract/activation.h"
#include "rows.cuh"

namespace fastlm {

// Each activation: value(z), and gradient(z, g) = g * value'(z). NaN stays, for both have z as a factor.
struct Gelu {
  // The normal distribution at z, and its exponential exp(-z^2 / 2): one exp and one division, where erf has
  // an exp and two polynomials. For z <= 0 it is exp(-z^2 / 2) * t * P(t), t = 1 / (1 + 0.305 |z|), the form
  // of Abramowitz and Stegun 26.2.17, with the P of csrc/cpu/activations.h, fitted to 1.1e-7 relative error.
  struct Normal {
    float distribution, exponential;
    __device__ explicit Normal(float z) : exponential(exp_of(-0.5f * z * z)) {
      const float t = reciprocal(fabsf(z) * 0.305f + 1.0f);
      float p = t * 0.036773404f - 0.153303191f;
      p = p * t + 0.186270812f;
      p = p * t - 0.0384986577f;
      p = p * t + 0.121304937f;
      p = p * t + 0.103332617f;
      p = p * t + 0.122481374f;
      p = p * t + 0.121638755f;
      const float tail = p * t * exponential;
      distribution = z < 0 ? tail : 1.0f - tail;
    }
  };
  __device__ static float value(float z) { return z * Normal(z).distribution; }
  __device__ static float gradient(float z, float g) {
    const Normal n(z);
    return g * (z * (n.exponential * 0.398942280f) + n.distribution);
  }
};

// sigmoid(z), of which an exp that overflows makes the right 0.
__device__ inline float sigmoid(float z) { return reciprocal(1.0f + exp_of(-z)); }

// sigmoid(z) and its derivative, by exp(-|z|), which neither overflows nor cancels.
struct Sigmoid {
  float value, slope;
  __device__ explicit Sigmoid(float z) {
    const float e = exp_of(-fabsf(z)), high = reciprocal(1.0f + e), low = e * high;
    value = z < 0 ? low : high;
    slope = low * high;
  }
};

// 1 + tanh(u) = 2 sigmoid(2 u).
struct GeluTanh {
  static constexpr float kLinear = 1.59576912f;   // 2 sqrt(2 / pi)
  static constexpr float kCubic = 0.0713548163f;  // that times 0.044715
  __device__ static float value(float z) { return z * sigmoid(z * (z * z * kCubic + kLinear)); }
  __device__ static float gradient(float z, float g) {
    const float square = z * z;
    const Sigmoid s(z * (square * kCubic + kLinear));
    return g * (z * (square * (3.0f * kCubic) + kLinear) * s.slope + s.value);
  }
};

struct Relu {
  __device__ static float value(float z) { return z <= 0 ? 0.0f : z; }
  __device__ static float gradient(float z, float g) { return z <= 0 ? 0.0f : g; }
};

struct Silu {
  __device__ static float value(float z) { return z * sigmoid(z); }
  __device__ static float gradient(float z, float g) {
    const Sigmoid s(z);
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
