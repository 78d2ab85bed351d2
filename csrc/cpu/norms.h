// What the norms share: the row h = dropout(x) + residual that is normed, and where its gradient goes. `Args`
// is a norm's Forward or Backward struct.
#pragma once

#include <type_traits>

#include "philox.h"
#include "rows.h"

namespace fastlm {

template <class T>
const T* row_of(const void* base, int64_t stride, int64_t row) {
  return base ? static_cast<const T*>(base) + row * stride : nullptr;
}

// h of one row in float32: x itself where nothing has to be done to it, else computed into `buffer`.
template <class T, class Args>
const float* normed_row(const Args& a, const DropoutScale& scale, int64_t row, float* buffer) {
  const T* x = row_of<T>(a.x, a.x_stride, row);
  const T* residual = row_of<T>(a.residual, a.residual_stride, row);
  if constexpr (std::is_same_v<T, float>) {
    if (!a.h) return x;
  }
  load_row(x, a.cols, buffer);
  if (a.dropout.p > 0) scale.apply(row, 0, a.cols, buffer);
  if (residual) {
#pragma omp simd
    for (int64_t j = 0; j < a.cols; ++j) buffer[j] += to_float(residual[j]);
  }
  if (a.h) {
    T* h = static_cast<T*>(a.h) + row * a.cols;
#pragma omp simd
    for (int64_t j = 0; j < a.cols; ++j) {
      h[j] = from_float<T>(buffer[j]);
      buffer[j] = to_float(h[j]);
    }
  }
  return buffer;
}

// From `buffer`, the norm's own gradient of one row of h, to that row of dresidual and dx.
template <class T, class Args>
void store_gradients(const Args& a, const DropoutScale& scale, int64_t row, float* buffer) {
  if (const T* dh = row_of<T>(a.dh, a.dh_stride, row)) {
#pragma omp simd
    for (int64_t j = 0; j < a.cols; ++j) buffer[j] += to_float(dh[j]);
  }
  if (a.dresidual) store_row(buffer, a.cols, static_cast<T*>(a.dresidual) + row * a.cols);
  if (!a.dx) return;
  if (a.dropout.p > 0) scale.apply(row, 0, a.cols, buffer);
  store_row(buffer, a.cols, static_cast<T*>(a.dx) + row * a.cols);
}

}  // namespace fastlm
