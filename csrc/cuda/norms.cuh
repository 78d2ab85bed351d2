// What the norms share: a row of h = dropout(x) + residual in registers, and where its gradient goes. `Args`
// is a norm's Forward or Backward struct.
#pragma once

#include "philox.cuh"
#include "rows.cuh"

namespace fastlm {

// h from column `start` on, rounded to T, and written to a.h unless that is null; 0 past the row's end.
template <class T, int kWidth, int kItems, class Args>
__device__ void normed_items(const Args& a, const DropoutScale& dropout, const Place& at, int64_t start,
                             float (&h)[kItems]) {
  const T* x = row_at<T>(a.x, a.x_stride, at.row);
  const T* residual = row_at<T>(a.residual, a.residual_stride, at.row);
  T* out = row_at<T>(a.h, a.cols, at.row);
#pragma unroll
  for (float& v : h) v = 0;
  for_items<kWidth, kItems>(at, start, a.cols, [&](int i, int64_t col) {
    float values[kWidth], more[kWidth];
    load<kWidth>(x + col, values);
    if (dropout.seed) {
      dropout.columns<kWidth>(at.row, col, more);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) values[k] = __fmul_rn(values[k], more[k]);  // as dropout_add
    }
    if (residual) {
      load<kWidth>(residual + col, more);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) values[k] = __fadd_rn(values[k], more[k]);
    }
    if (out) store<kWidth>(values, out + col);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) h[i + k] = as_float(rounded_to<T>(values[k]));
  });
}

// Writes dresidual = gradient + dh, and dx: dropout's factor times that, from column `start` on.
template <class T, int kWidth, int kItems, class Args>
__device__ void store_gradients(const Args& a, const DropoutScale& dropout, const Place& at, int64_t start,
                                const float (&gradient)[kItems]) {
  const T* dh = row_at<T>(a.dh, a.dh_stride, at.row);
  T* dresidual = row_at<T>(a.dresidual, a.cols, at.row);
  T* dx = row_at<T>(a.dx, a.cols, at.row);
  for_items<kWidth, kItems>(at, start, a.cols, [&](int i, int64_t col) {
    float values[kWidth], more[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) values[k] = gradient[i + k];
    if (dh) {
      load<kWidth>(dh + col, more);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) values[k] += more[k];
    }
    if (dresidual) store<kWidth>(values, dresidual + col);
    if (dropout.seed && dx) {
      dropout.columns<kWidth>(at.row, col, more);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) values[k] *= more[k];
    }
    if (dx) store<kWidth>(values, dx + col);
  });
}

}  // namespace fastlm
