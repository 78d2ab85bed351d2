// bias_act: one pass, bound by memory (floor: forward reads x and writes y, backward reads dy and x and
// writes dx). A row is worked on in pieces that stay in the first-level cache; backward computes the
// activation again.
#include "../contract/bias_act.h"

#include <algorithm>
#include <cmath>

#include "philox.h"
#include "rows.h"

namespace fastlm {
namespace {

constexpr int64_t kPiece = 1024;  // columns; a multiple of kPhiloxNumbers, 4 KB of float32

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

// sigmoid(v) and 1 - sigmoid(v) without overflow or cancellation.
struct Sigmoid {
  float value, rest;
  explicit Sigmoid(float v) {
    const float e = exp_nonpositive(-std::fabs(v));
    const float large = 1.0f / (1.0f + e), small = e * large;
    value = select(v < 0.0f, small, large);
    rest = select(v < 0.0f, large, small);
  }
};

struct GeluTanh {
  static constexpr float kLinear = 1.59576912f;   // 2 sqrt(2 / pi)
  static constexpr float kCubic = 0.0713548163f;  // that times 0.044715
  static float value(float z) { return z * Sigmoid(z * (kLinear + kCubic * (z * z))).value; }
  static float gradient(float z, float g) {
    const float square = z * z;
    const Sigmoid s(z * (kLinear + kCubic * square));
    return g * (s.value + z * (kLinear + 3.0f * kCubic * square) * (s.value * s.rest));
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
    return g * (s.value + z * (s.value * s.rest));
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

// Stands for a bias that was not given: adding it costs less than a second code path.
constexpr float kZeros[kPiece] = {};

// Columns [begin, begin + n) of a row. float32 is read and written in place, without the buffer.
template <class T, class Act>
void forward_piece(const BiasAct& a, const DropoutScale& scale, int64_t row, int64_t begin, int64_t n) {
  float buffer[kPiece];
  const float* x = float_row(static_cast<const T*>(a.x) + row * a.x_stride + begin, n, buffer);
  const float* bias = a.bias ? a.bias + begin : kZeros;
  T* y = static_cast<T*>(a.y) + row * a.cols + begin;
  float* values = results_of(y, buffer);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) values[j] = Act::value(x[j] + bias[j]);
  if (a.dropout.p > 0) scale.apply(row, begin, n, values);
  if constexpr (!std::is_same_v<T, float>) store_row(values, n, y);
}

// sums: where to add the piece of dbias, or null.
template <class T, class Act>
void backward_piece(const BiasActBackward& a, const DropoutScale& scale, int64_t row, int64_t begin,
                    int64_t n, float* sums) {
  float x_buffer[kPiece], buffer[kPiece];
  const float* x = float_row(static_cast<const T*>(a.x) + row * a.x_stride + begin, n, x_buffer);
  const float* dy = float_row(static_cast<const T*>(a.dy) + row * a.dy_stride + begin, n, buffer);
  const float* bias = a.bias ? a.bias + begin : kZeros;
  T* dx = a.dx ? static_cast<T*>(a.dx) + row * a.cols + begin : nullptr;
  float* grads = dx ? results_of(dx, buffer) : buffer;
  if (a.dropout.p > 0) {
    if (dy != buffer) std::copy(dy, dy + n, buffer);
    scale.apply(row, begin, n, buffer);
    dy = buffer;
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) grads[j] = Act::gradient(x[j] + bias[j], dy[j]);
  if constexpr (!std::is_same_v<T, float>) {
    if (dx) store_row(grads, n, dx);
  }
  if (!sums) return;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) sums[j] += grads[j];
}

}  // namespace

void bias_act(const Context& context, const BiasAct& a) {
  const DropoutScale scale(a.dropout);
  const int64_t pieces = divide_up(a.cols, kPiece);  // long rows are cut too: a 1-d tensor is one row
  with_dtype(a.dtype, [&]<class T>() {
    with_activation(a.activation, [&]<class Act>() {
      parallel_rows(context, a.rows * pieces, std::min(a.cols, kPiece), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          const int64_t begin = i % pieces * kPiece;
          forward_piece<T, Act>(a, scale, i / pieces, begin, std::min(kPiece, a.cols - begin));
        }
      });
    });
  });
}

void bias_act_backward(const Context& context, const BiasActBackward& a) {
  const DropoutScale scale(a.dropout);
  const int64_t pieces = divide_up(a.cols, kPiece), blocks = row_blocks(a.rows);
  with_dtype(a.dtype, [&]<class T>() {
    with_activation(a.activation, [&]<class Act>() {
      parallel_tasks(context, blocks * pieces, [&](int64_t index) {
        const int64_t block = index / pieces, begin = index % pieces * kPiece;
        const int64_t n = std::min(kPiece, a.cols - begin), last = (block + 1) * a.rows / blocks;
        float* sums = a.dbias ? a.partial + block * a.cols + begin : nullptr;
        if (sums) std::fill(sums, sums + n, 0.0f);
        for (int64_t row = block * a.rows / blocks; row < last; ++row) {
          backward_piece<T, Act>(a, scale, row, begin, n, sums);
        }
      });
    });
  });
  add_blocks(context, a.partial, a.cols, blocks, a.cols, a.dbias);
}

}  // namespace fastlm
