// softmax: a row's scores are brought to float32 once and stay in cache for their maximum, their sum of exps
// and the division; a causal row is not read past its diagonal. Bound by memory; floor: forward reads x (and
// the mask) and writes y, backward reads dy and y and writes dx.
#include <cstring>
#include <memory>
#include <type_traits>

#include "../kernels.h"
#include "rows.h"

namespace fastlm {
namespace {

int64_t attended(bool causal, int64_t row, int64_t cols) { return causal ? row % cols + 1 : cols; }

const uint8_t* mask_row(const Mask& mask, int64_t row) {
  int64_t offset = 0;
  for (int d = mask.dims - 1; d >= 0; --d) {
    offset += row % mask.sizes[d] * mask.strides[d];
    row /= mask.sizes[d];
  }
  return mask.data + offset;
}

// s = scale * x, -inf where keep is 0; returns the maximum of s, which no NaN changes.
template <class T, bool kMasked>
float scores(const T* x, const uint8_t* keep, float scale, int64_t n, float* s) {
  float maximum = -INFINITY;
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < n; ++j) {
    const float scaled = scale * to_float(x[j]);
    s[j] = kMasked ? select(keep[j] != 0, scaled, -INFINITY) : scaled;
    maximum = maximum < s[j] ? s[j] : maximum;
  }
  return maximum;
}

// One row of y. `buffer`: cols floats. keep: null, or one byte for each of the n columns.
template <class T>
void forward_row(const T* x, const uint8_t* keep, float scale, int64_t n, int64_t cols, float* buffer, T* y) {
  const float maximum =
      keep ? scores<T, true>(x, keep, scale, n, buffer) : scores<T, false>(x, keep, scale, n, buffer);
  const float shift = maximum == -INFINITY ? 0.0f : maximum;  // -inf - -inf is NaN
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    buffer[j] = exp(buffer[j] - shift);
    sum += buffer[j];
  }
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] = from_float<T>(buffer[j] * inverse);
  std::memset(static_cast<void*>(y + n), 0, static_cast<size_t>(cols - n) * sizeof(T));
}

template <class T>
void backward_row(const T* dy, const T* y, float scale, int64_t n, int64_t cols, T* dx) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += to_float(dy[j]) * to_float(y[j]);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) dx[j] = from_float<T>(scale * to_float(y[j]) * (to_float(dy[j]) - sum));
  std::memset(static_cast<void*>(dx + n), 0, static_cast<size_t>(cols - n) * sizeof(T));
}

// What a thread needs beside the row that it works on.
struct Scratch {
  Scratch(int64_t floats, int64_t bytes)
      : scores(new float[static_cast<size_t>(floats)]), keep(new uint8_t[static_cast<size_t>(bytes)]) {}
  std::unique_ptr<float[]> scores;
  std::unique_ptr<uint8_t[]> keep;
};

template <class T>
void forward_masked_row(const SoftmaxForward& a, int64_t row, const Scratch& scratch) {
  const int64_t stride = a.mask.col_stride;
  int64_t n = attended(a.causal, row, a.cols);
  const uint8_t* keep = a.mask.data ? mask_row(a.mask, row) : nullptr;
  if (keep && stride == 0) {
    n = *keep ? n : 0;
    keep = nullptr;
  } else if (keep && stride != 1) {
    for (int64_t j = 0; j < n; ++j) scratch.keep[j] = keep[j * stride];
    keep = scratch.keep.get();
  }
  T* y = static_cast<T*>(a.y) + row * a.cols;
  float* buffer = scratch.scores.get();
  if constexpr (std::is_same_v<T, float>) buffer = y;
  forward_row<T>(static_cast<const T*>(a.x) + row * a.x_stride, keep, a.scale, n, a.cols, buffer, y);
}

}  // namespace

void softmax_forward(const Context& context, const SoftmaxForward& a) {
  const bool gathers = a.mask.data && a.mask.col_stride > 1;
  with_dtype(a.dtype, [&]<class T>() {
    parallel_rows(context, a.rows, a.cols, [&](int64_t first, int64_t last) {
      const Scratch scratch(std::is_same_v<T, float> ? 0 : a.cols, gathers ? a.cols : 0);
      for (int64_t row = first; row < last; ++row) forward_masked_row<T>(a, row, scratch);
    });
  });
}

void softmax_backward(const Context& context, const SoftmaxBackward& a) {
  with_dtype(a.dtype, [&]<class T>() {
    parallel_rows(context, a.rows, a.cols, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        backward_row<T>(static_cast<const T*>(a.dy) + row * a.dy_stride,
                        static_cast<const T*>(a.y) + row * a.y_stride, a.scale,
                        attended(a.causal, row, a.cols), a.cols, static_cast<T*>(a.dx) + row * a.cols);
      }
    });
  });
}

}  // namespace fastlm
