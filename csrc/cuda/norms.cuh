// What the norms share: a row of h = dropout(x) + residual in registers, and where its gradient goes. `Args`
// is a norm's Forward or Backward struct.
#pragma once

#include "philox.cuh"
#include "rows.cuh"
#include "sums.cuh"

namespace fastlm {

// h from column `start` on, rounded to T, and written to a.h unless that is null; 0 past the row's end.
template <class T, int kWidth, int kItems, class Args>
__device__ void normed_items(const Args& a, const DropoutScale& dropout, const Place& at, int64_t start,
                             float (&h)[kItems]) {
  const T* x = row_at<T>(a.x, a.x_stride, at.row);
  const T* residual = row_at<T>(a.residual, a.residual_stride, at.row);
  T* out = row_at<T>(a.h, a.cols, at.row);
  Packed<kWidth, T> xs[kItems / kWidth], residuals[kItems / kWidth];
  load_items<kWidth, kItems>(x, at, start, a.cols, xs);
  if (residual) load_items<kWidth, kItems>(residual, at, start, a.cols, residuals);
#pragma unroll
  for (float& v : h) v = 0;
  for_items<kWidth, kItems>(at, start, a.cols, [&](int i, int64_t col) {
    float values[kWidth], more[kWidth];
    unpack(xs[i / kWidth], values);
    if (dropout.seed) {
      dropout.columns<kWidth>(at.row, col, more);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) values[k] = __fmul_rn(values[k], more[k]);  // as dropout_add
    }
    if (residual) {
      unpack(residuals[i / kWidth], more);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) values[k] = __fadd_rn(values[k], more[k]);
    }
    if (out) {  // without dropout and residual x is rounded already
      const Packed<kWidth, T> rounded = packed<T>(values);
      store(rounded, out + col);
      unpack(rounded, values);
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) h[i + k] = values[k];
  });
}

// Each of 2 sums, over all threads of a row's team, of which each calls it with its rows in turn even and
// odd: who is a row ahead then writes where nobody reads any more, and a row takes one barrier. A half of a
// warp adds up one of them: 23 instructions, where each on its own takes 40.
template <Team kTeam>
__device__ void sums_of_row(float (&v)[2], bool odd) {
  const int lane = threadIdx.x % 32, half = lane / 16;
  float sum = (half ? v[1] : v[0]) + __shfl_xor_sync(0xffffffffu, half ? v[0] : v[1], 16);
  const auto add_up_halves = [&] {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  };
  add_up_halves();
  if constexpr (kTeam != Team::kWarp) {
    __shared__ float of_warps[2][2][16];
    if (lane % 16 == 0) of_warps[odd][half][threadIdx.x / 32] = sum;
    __syncthreads();
    sum = lane % 16 < blockDim.x / 32 ? of_warps[odd][half][lane % 16] : 0;
    add_up_halves();
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) v[k] = __shfl_sync(0xffffffffu, sum, 16 * k);
}

// One sum alike.
template <Team kTeam>
__device__ float sum_of_row(float v, bool odd) {
  v = warp_all(v, Add{});
  if constexpr (kTeam == Team::kWarp) return v;
  __shared__ float of_warps[2][32];
  const int lane = threadIdx.x % 32;
  if (lane == 0) of_warps[odd][threadIdx.x / 32] = v;
  __syncthreads();
  return warp_all(lane < blockDim.x / 32 ? of_warps[odd][lane] : 0, Add{});
}

// The rows that a thread's team goes down, of a block's range: all of them, or every kWarpThreads / 32-th.
template <Team kTeam>
__device__ int64_t first_row(const RowRange& range) {
  return range.first + (kTeam == Team::kWarp ? threadIdx.x / 32 : 0);
}
template <Team kTeam>
constexpr int kRowStep = kTeam == Team::kWarp ? kWarpThreads / 32 : 1;

// What backward reads of a row, on its way while the row before it is worked on; by the element that would
// take a register each, more than there are.
template <class T, int kWidth, int kItems>
struct RowAhead {
  static constexpr bool kAhead = kWidth > 1;
  Packed<kWidth, T> dy[kItems / kWidth], h[kItems / kWidth];
  float statistic =
      0;  // lane 0: mean, others: rstd. One number for all would be waited for as soon as loaded

  template <class Args>
  __device__ void fetch(const Args& a, const float* mean, const Place& at) {
    load_items<kWidth, kItems>(static_cast<const T*>(a.dy) + at.row * a.dy_stride, at, 0, a.cols, dy);
    load_items<kWidth, kItems>(static_cast<const T*>(a.h) + at.row * a.h_stride, at, 0, a.cols, h);
    statistic = (mean && threadIdx.x % 32 == 0 ? mean : a.rstd)[at.row];
  }
  // dy, and n = (h - mean) * rstd; 0 past the row's end. Returns rstd.
  template <bool kCentred>
  __device__ float take(const Place& at, int64_t cols, float (&d)[kItems], float (&n)[kItems]) const {
    const float rstd = __shfl_sync(0xffffffffu, statistic, 1);
    const float mean = kCentred ? __shfl_sync(0xffffffffu, statistic, 0) : 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) d[i] = n[i] = 0;
    for_items<kWidth, kItems>(at, 0, cols, [&](int i, int64_t) {
      float dys[kWidth], hs[kWidth];
      unpack(dy[i / kWidth], dys);
      unpack(h[i / kWidth], hs);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) d[i + k] = dys[k], n[i + k] = (hs[k] - mean) * rstd;
    });
    return rstd;
  }
};

// Writes dresidual = gradient + dh, and dx: dropout's factor times that, from column `start` on. kWhole: by
// store_whole.
template <class T, int kWidth, bool kWhole, int kItems, class Args>
__device__ void store_gradients(const Args& a, const DropoutScale& dropout, const Place& at, int64_t start,
                                const float (&gradient)[kItems]) {
  const T* dh = row_at<T>(a.dh, a.dh_stride, at.row);
  const int64_t row = at.row * a.cols;
  const auto write = [](const float (&from)[kWidth], T* to) {
    kWhole ? store_whole<kWidth>(from, to) : store<kWidth>(from, to);
  };
  for_items<kWidth, kItems>(at, start, a.cols, [&](int i, int64_t col) {
    float values[kWidth], more[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) values[k] = gradient[i + k];
    if (dh) {
      load<kWidth>(dh + col, more);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) values[k] += more[k];
    }
    if (a.dresidual) write(values, static_cast<T*>(a.dresidual) + row + col);
    if (!a.dx) return;
    if (dropout.seed) {
      dropout.columns<kWidth>(at.row, col, more);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) values[k] *= more[k];
    }
    write(values, static_cast<T*>(a.dx) + row + col);
  });
}

}  // namespace fastlm
