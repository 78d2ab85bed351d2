// What the norms share: the row h = dropout(x) + residual that is normed, and where its gradient goes. `Args`
// is a norm's Forward or Backward struct.
#pragma once

#include <type_traits>

#include "philox.h"
#include "streaming.h"

namespace fastlm {

constexpr int64_t kScaled = 256;  // columns whose dropout is drawn at a time: fewer calls, and while the
                                  // numbers of some are drawn, the stores of others are under way

template <class T>
const T* row_of(const void* base, int64_t stride, int64_t row) {
  return base ? static_cast<const T*>(base) + row * stride : nullptr;
}

// h of one row in float32: x itself where nothing has to be done to it, else computed into `buffer`. each(h,
// k) is called with every vector of it, in which lanes past the row are 0, and the partial sum to add to.
template <class T, class Args, class F>
const float* normed_row(const Args& a, const DropoutScale& scale, int64_t row, float* buffer, const F& each) {
  const int64_t cols = a.cols;
  const T* x = row_of<T>(a.x, a.x_stride, row);
  if constexpr (std::is_same_v<T, float>) {
    if (!a.h) {
      over_vectors(cols, [&](int64_t j, auto which, int k) { each(load(x + j, which), k); });
      return x;
    }
  }
  const T* residual = row_of<T>(a.residual, a.residual_stride, row);
  T* h = a.h ? static_cast<T*>(a.h) + row * cols : nullptr;
  const bool dropout = a.dropout.p > 0;
  for (int64_t begin = 0; begin < cols; begin += kScaled) {
    const int64_t n = std::min(kScaled, cols - begin);
    float scales[kScaled];
    if (dropout) scale.columns(row, begin, n, scales);
    over_vectors(n, [&](int64_t i, auto which, int k) {
      const int64_t j = begin + i;
      Vector v = load(x + j, which);
      if (dropout) v *= load_vector(scales + i);
      if (residual) v += load(residual + j, which);
      if (h) {
        store(v, h + j, which);
        v = load(h + j, which);  // rounded to T
      }
      store(v, buffer + j, which);
      each(v, k);
    });
  }
  return buffer;
}

// Writes one row of dresidual and dx. gradient(j, which) is a vector of the norm's own gradient.
template <class T, class Args, class F>
void store_gradients(const Args& a, const DropoutScale& scale, int64_t row, const F& gradient) {
  const int64_t cols = a.cols;
  const T* dh = row_of<T>(a.dh, a.dh_stride, row);
  T* dresidual = a.dresidual ? static_cast<T*>(a.dresidual) + row * cols : nullptr;
  T* dx = a.dx ? static_cast<T*>(a.dx) + row * cols : nullptr;
  const bool stream = streams_rows<T>(a, a.dx ? a.dx : a.dresidual);
  const auto piece = [&](int64_t begin, int64_t n, const float* scales) {
    over_vectors(n, [&](int64_t i, auto which, int) {
      const int64_t j = begin + i;
      Vector v = gradient(j, which);
      if (dh) v += load(dh + j, which);
      if (dresidual) store_result(v, dresidual + j, which, stream);
      if (scales) v *= load_vector(scales + i);
      if (dx) store_result(v, dx + j, which, stream);
    });
  };
  if (!dx || a.dropout.p == 0) return piece(0, cols, nullptr);
  for (int64_t begin = 0; begin < cols; begin += kScaled) {
    const int64_t n = std::min(kScaled, cols - begin);
    float scales[kScaled];
    scale.columns(row, begin, n, scales);
    piece(begin, n, scales);
  }
}

}  // namespace fastlm
