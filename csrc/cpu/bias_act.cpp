// bias_act: one pass, bound by memory (floor: forward reads x and writes y, backward reads dy and x and
// writes dx). A row is worked on in pieces that stay in the first-level cache; backward computes the
// activation again.
#include <algorithm>
#include <cmath>

#include "../kernels.h"
#include "philox.h"
#include "rows.h"

namespace fastlm {
namespace {

constexpr int64_t kPiece = 1024;  // columns; a multiple of kPhiloxNumbers, 4 KB of float32

// Each activation: value(z), and gradient(z, g) = g * value'(z).
struct Gelu {
  static float distribution(float z) { return 0.5f * (1.0f + erf(z * 0.707106781f)); }
  static float value(float z) { return z * distribution(z); }
  static float gradient(float z, float g) {
    const float density = 0.398942280f * exp_nonpositive(-0.5f * z * z);
    return g * (distribution(z) + z * density);
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

// z = x + bias, columns [begin, begin + n) of a row.
template <class T>
void load_biased(const void* x, int64_t offset, const float* bias, int64_t n, float* z) {
  load_row(static_cast<const T*>(x) + offset, n, z);
  if (!bias) return;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) z[j] += bias[j];
}

template <class T, class Act>
void forward_piece(const BiasAct& a, const DropoutScale& scale, int64_t row, int64_t begin, int64_t n) {
  float values[kPiece];
  T* y = static_cast<T*>(a.y) + row * a.cols + begin;
  load_biased<T>(a.x, row * a.x_stride + begin, a.bias ? a.bias + begin : nullptr, n, values);
  if (a.dropout.p > 0) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) values[j] = Act::value(values[j]);
    scale.apply(row, begin, n, values);
    return store_row(values, n, y);
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] = from_float<T>(Act::value(values[j]));
}

// sums: where to add the piece of dbias, or null.
template <class T, class Act>
void backward_piece(const BiasActBackward& a, const DropoutScale& scale, int64_t row, int64_t begin,
                    int64_t n, float* sums) {
  float z[kPiece], grads[kPiece];
  load_biased<T>(a.x, row * a.x_stride + begin, a.bias ? a.bias + begin : nullptr, n, z);
  load_row(static_cast<const T*>(a.dy) + row * a.dy_stride + begin, n, grads);
  if (a.dropout.p > 0) scale.apply(row, begin, n, grads);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) grads[j] = Act::gradient(z[j], grads[j]);
  if (a.dx) store_row(grads, n, static_cast<T*>(a.dx) + row * a.cols + begin);
  if (!sums) return;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) sums[j] += grads[j];
}

// Adds the blocks' sums in their order.
void add_blocks(const Context& context, const BiasActBackward& a, int64_t blocks) {
  parallel_tasks(context, divide_up(a.cols, kPiece), [&](int64_t index) {
    const int64_t begin = index * kPiece, end = std::min(a.cols, begin + kPiece);
    std::fill(a.dbias + begin, a.dbias + end, 0.0f);
    for (int64_t block = 0; block < blocks; ++block) {
      const float* sums = a.partial + block * a.cols;
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) a.dbias[j] += sums[j];
    }
  });
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

// At least 32 rows a block, so that adding the blocks up is 3% of the work; at most 64 blocks.
int64_t bias_act_blocks(int64_t rows) { return std::clamp<int64_t>(rows / 32, 1, 64); }

void bias_act_backward(const Context& context, const BiasActBackward& a) {
  const DropoutScale scale(a.dropout);
  const int64_t pieces = divide_up(a.cols, kPiece), blocks = bias_act_blocks(a.rows);
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
  if (a.dbias) add_blocks(context, a, blocks);
}

}  // namespace fastlm
