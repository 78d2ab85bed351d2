// softmax: y = e / sum(e), e = exp(s - max(s)), s = scale * x, -inf where excluded; 0 where s is nothing
// else.
//
// A warp takes a row of up to 512 columns, a block one of up to 8192: its threads hold the row in registers,
// 16 float32 each, from its one read to its one write. A longer row is read twice by a block that goes along
// it, the second time from the second-level cache where it fits, with each thread's maximum and sum kept as
// they grow (Milakov, Gimelshein, https://arxiv.org/abs/1805.02867). What causal excludes is not read but for
// the rest of 16 bytes. Backward: dx = scale * y * (dy - sum(dy * y)), both rows in registers. Bound by
// bytes: x (and the mask) read, y written; dy and y read, dx written. Source: Vaswani et al., section 3.2.1,
// https://arxiv.org/abs/1706.03762.
#include "../contract/softmax.h"
#include "launch.cuh"
#include "rows.cuh"

namespace fastlm {
namespace {

constexpr int kItems = 16;         // elements a thread: two loads of 16 bytes of half precision
constexpr int kMostThreads = 512;  // with 128 registers each: with 64, as 1024 have, these kernels spill

__device__ int64_t attended(bool causal, int64_t row, int64_t cols) { return causal ? row % cols + 1 : cols; }

// Where `row` starts in the mask.
__device__ const uint8_t* mask_row(const Mask& mask, int64_t row) {
  if (!mask.data) return nullptr;
  int64_t offset = 0;
#pragma unroll
  for (int d = Mask::kDims - 1; d >= 0; --d) {
    if (d < mask.dims) {
      offset += row % mask.sizes[d] * mask.strides[d];
      row /= mask.sizes[d];
    }
  }
  return mask.data + offset;
}

// The mask of kWidth columns: one access where they lie side by side.
template <int kWidth>
__device__ void load_mask(const uint8_t* keep, int64_t stride, uint8_t (&kept)[kWidth]) {
  if constexpr (kWidth > 1) {
    using Bytes = std::conditional_t<kWidth == 8, uint64_t, uint32_t>;
    if (stride == 1 && reinterpret_cast<uintptr_t>(keep) % kWidth == 0) {
      const Bytes bytes = *reinterpret_cast<const Bytes*>(keep);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) kept[k] = static_cast<uint8_t>(bytes >> 8 * k);
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kWidth; ++k) kept[k] = keep[k * stride];
}

// scale * x from column `start` on, -inf where excluded and from column n on.
template <int kWidth, class T>
__device__ void scores(const SoftmaxForward& a, const Place& at, const T* x, const uint8_t* keep, int64_t n,
                       int64_t start, float (&s)[kItems]) {
#pragma unroll
  for (float& v : s) v = -INFINITY;
  for_items<kWidth, kItems>(at, start, n, [&](int i, int64_t col) {
    float values[kWidth];
    load<kWidth>(x + col, values);
    uint8_t kept[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) kept[k] = 1;
    if (keep) load_mask<kWidth>(keep + col * a.mask.col_stride, a.mask.col_stride, kept);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      if (kept[k] && col + k < n) s[i + k] = a.scale * values[k];
    }
  });
}

__device__ float shift_of(float highest) {
  return highest == -INFINITY ? 0.0f : highest;
}  // -inf - -inf is NaN

__device__ float highest_of(const float (&s)[kItems]) {
  float highest = -INFINITY;
#pragma unroll
  for (float v : s) highest = fmaxf(highest, v);
  return highest;
}

// s becomes exp(s - shift); returns the sum of these.
__device__ float exponentiate(float (&s)[kItems], float shift) {
  float sum = 0;
#pragma unroll
  for (float& v : s) sum += v = expf(v - shift);
  return sum;
}

// Writes factor * values from column `start` on.
template <int kWidth, class T>
__device__ void store_scaled(const float (&values)[kItems], float factor, const Place& at, int64_t start,
                             int64_t cols, T* to) {
  for_items<kWidth, kItems>(at, start, cols, [&](int i, int64_t col) {
    float out[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) out[k] = values[i + k] * factor;
    store<kWidth>(out, to + col);
  });
}

template <class T, int kWidth, Team kTeam>
__global__ void __launch_bounds__(kMostThreads) softmax_forward_kernel(const SoftmaxForward a) {
  const Place at = place<kTeam>();
  if (at.row >= a.rows) return;
  const int64_t n = attended(a.causal, at.row, a.cols), step = at.threads * kItems;
  const uint8_t* keep = mask_row(a.mask, at.row);
  const T* x = row_at<T>(a.x, a.x_stride, at.row);
  T* y = row_at<T>(a.y, a.cols, at.row);
  float s[kItems];
  if constexpr (kTeam != Team::kLoop) {
    scores<kWidth>(a, at, x, keep, n, 0, s);
    const float shift = shift_of(team_max<kTeam>(highest_of(s)));
    const float sum = team_sum<kTeam>(exponentiate(s, shift));
    return store_scaled<kWidth>(s, sum == 0 ? 0 : 1 / sum, at, 0, a.cols, y);
  }
  float highest = -INFINITY, sum = 0;
  for (int64_t start = 0; start < n; start += step) {
    scores<kWidth>(a, at, x, keep, n, start, s);
    const float higher = fmaxf(highest, highest_of(s)), shift = shift_of(higher);
    sum = sum * expf(highest - shift) + exponentiate(s, shift);
    highest = higher;
  }
  const float shift = shift_of(team_max<kTeam>(highest));
  sum = team_sum<kTeam>(sum * expf(highest - shift));
  const float inverse = sum == 0 ? 0 : 1 / sum;
  for (int64_t start = 0; start < a.cols; start += step) {
    scores<kWidth>(a, at, x, keep, n, start, s);
    exponentiate(s, shift);
    store_scaled<kWidth>(s, inverse, at, start, a.cols, y);
  }
}

// dy and y from column `start` to n, 0 from there on; returns the sum of their products.
template <int kWidth, class T>
__device__ float gradients(const Place& at, const T* dy, const T* y, int64_t n, int64_t start,
                           float (&g)[kItems], float (&p)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) g[i] = p[i] = 0;
  for_items<kWidth, kItems>(at, start, n, [&](int i, int64_t col) {
    float dys[kWidth], ys[kWidth];
    load<kWidth>(dy + col, dys);
    load<kWidth>(y + col, ys);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      if (col + k < n) g[i + k] = dys[k], p[i + k] = ys[k];
    }
  });
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) sum += g[i] * p[i];
  return sum;
}

template <class T, int kWidth, Team kTeam>
__global__ void __launch_bounds__(kMostThreads) softmax_backward_kernel(const SoftmaxBackward a) {
  const Place at = place<kTeam>();
  if (at.row >= a.rows) return;
  const int64_t n = attended(a.causal, at.row, a.cols), step = at.threads * kItems;
  const T* dy = row_at<T>(a.dy, a.dy_stride, at.row);
  const T* y = row_at<T>(a.y, a.y_stride, at.row);
  T* dx = row_at<T>(a.dx, a.cols, at.row);
  float g[kItems], p[kItems], sum = 0;
  for (int64_t start = 0; start < n; start += step) {
    sum += gradients<kWidth>(at, dy, y, n, start, g, p);
    if (kTeam != Team::kLoop) break;
  }
  sum = team_sum<kTeam>(sum);
  for (int64_t start = 0; start < a.cols; start += step) {
    if (kTeam == Team::kLoop) gradients<kWidth>(at, dy, y, n, start, g, p);
#pragma unroll
    for (int i = 0; i < kItems; ++i) g[i] = p[i] * (g[i] - sum);
    store_scaled<kWidth>(g, a.scale, at, start, a.cols, dx);
    if (kTeam != Team::kLoop) break;
  }
}

}  // namespace

void softmax_forward(const Context& context, const SoftmaxForward& a) {
  with_device_dtype(a.dtype, [&]<class T>() {
    with_width<T>(wide_rows<T>(a.cols, {{a.x, a.x_stride}, {a.y}}), [&]<int kWidth>() {
      with_team<kItems, kMostThreads>(a.cols, [&]<Team kTeam>(int threads) {
        launch("softmax", context, softmax_forward_kernel<T, kWidth, kTeam>,
               blocks_for<kTeam>(a.rows, threads), threads, 0, a);
      });
    });
  });
}

void softmax_backward(const Context& context, const SoftmaxBackward& a) {
  with_device_dtype(a.dtype, [&]<class T>() {
    const bool wide = wide_rows<T>(a.cols, {{a.dy, a.dy_stride}, {a.y, a.y_stride}, {a.dx}});
    with_width<T>(wide, [&]<int kWidth>() {
      with_team<kItems, kMostThreads>(a.cols, [&]<Team kTeam>(int threads) {
        launch("softmax_backward", context, softmax_backward_kernel<T, kWidth, kTeam>,
               blocks_for<kTeam>(a.rows, threads), threads, 0, a);
      });
    });
  });
}

}  // namespace fastlm
