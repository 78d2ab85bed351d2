// rms_norm: a row is brought to float32 once, stays in cache for its sum of squares and is written once.
// Bound by memory; floor: forward reads x (and residual) and writes y (and h), backward reads dy (and dh) and
// h and writes dx (and dresidual).
#include "../contract/rms_norm.h"

#include <cmath>
#include <cstring>
#include <memory>

#include "norms.h"

namespace fastlm {
namespace {

template <class T>
void forward_row(const RmsNormForward& a, const DropoutScale& scale, int64_t row, float* buffer) {
  const int64_t cols = a.cols;
  const float* h = normed_row<T>(a, scale, row, buffer);
  const float squares = lane_sum(cols, [h](int64_t j) { return h[j] * h[j]; });
  const float rstd = 1.0f / std::sqrt(squares / static_cast<float>(cols) + a.eps);
  a.rstd[row] = rstd;
  T* y = static_cast<T*>(a.y) + row * cols;
  float* values = results_of(y, buffer);
  const float *weight = a.weight, offset = a.weight_offset;
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) values[j] = h[j] * rstd * (weight[j] + offset);
  if constexpr (!std::is_same_v<T, float>) store_row(values, cols, y);
}

// One row of dx and dresidual, and its addition to the sums of dweight (null where that is not wanted).
template <class T>
void backward_row(const RmsNormBackward& a, const DropoutScale& scale, int64_t row, float* buffer,
                  float* sums) {
  const int64_t cols = a.cols;
  float *dy_buffer = buffer + cols, *h_buffer = dy_buffer + cols;
  const float *weight = a.weight, offset = a.weight_offset, rstd = a.rstd[row];
  if (!a.dy) {
    std::memset(buffer, 0, static_cast<size_t>(cols) * sizeof(float));
    return store_gradients<T>(a, scale, row, buffer);
  }
  const float* dy = float_row(row_of<T>(a.dy, a.dy_stride, row), cols, dy_buffer);
  const float* h = float_row(row_of<T>(a.h, a.h_stride, row), cols, h_buffer);
  if (sums) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) sums[j] += dy[j] * (h[j] * rstd);
  }
  if (!a.dx && !a.dresidual) return;
  const auto product = [=](int64_t j) { return dy[j] * (weight[j] + offset) * (h[j] * rstd); };
  const float mean = lane_sum(cols, product) / static_cast<float>(cols);
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) {
    buffer[j] = rstd * (dy[j] * (weight[j] + offset) - h[j] * rstd * mean);
  }
  store_gradients<T>(a, scale, row, buffer);
}

}  // namespace

void rms_norm_forward(const Context& context, const RmsNormForward& a) {
  const DropoutScale scale(a.dropout);
  with_dtype(a.dtype, [&]<class T>() {
    parallel_rows(context, a.rows, a.cols, [&](int64_t first, int64_t last) {
      const std::unique_ptr<float[]> buffer(new float[static_cast<size_t>(a.cols)]);
      for (int64_t row = first; row < last; ++row) forward_row<T>(a, scale, row, buffer.get());
    });
  });
}

void rms_norm_backward(const Context& context, const RmsNormBackward& a) {
  const DropoutScale scale(a.dropout);
  const int64_t blocks = row_blocks(a.rows);
  with_dtype(a.dtype, [&]<class T>() {
    parallel_tasks(context, blocks, [&](int64_t block) {
      const std::unique_ptr<float[]> buffer(new float[static_cast<size_t>(3 * a.cols)]);
      float* sums = a.dweight ? a.partial + block * a.cols : nullptr;
      if (sums) std::memset(sums, 0, static_cast<size_t>(a.cols) * sizeof(float));
      const int64_t last = (block + 1) * a.rows / blocks;
      for (int64_t row = block * a.rows / blocks; row < last; ++row) {
        backward_row<T>(a, scale, row, buffer.get(), sums);
      }
    });
  });
  add_blocks(context, a.partial, a.cols, blocks, a.cols, a.dweight);
}

}  // namespace fastlm
