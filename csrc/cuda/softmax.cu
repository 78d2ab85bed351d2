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
  Packed<kWidth, T> loaded[kItems / kWidth];
  load_items<kWidth, kItems>(x, at, start, n, loaded);
#pragma unroll
  for (float& v : s) v = -INFINITY;
  for_items<kWidth, kItems>(at, start, n, [&](int i, int64_t col) {
    float values[kWidth];
    unpack(loaded[i / kWidth], values);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) s[i + k] = a.scale * values[k];
    if (keep) {
      uint8_t kept[kWidth];
      load_mask<kWidth>(keep + col * a.mask.col_stride, a.mask.col_stride, kept);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        if (!kept[k]) s[i + k] = -INFINITY;
      }
    }
    if (col + kWidth > n) {  // only where the diagonal is
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        if (col + k >= n) s[i + k] = -INFINITY;
      }
    }
  });
}

__device__ float highest_of(const float (&s)[kItems]) {
  float highest = -INFINITY;
#pragma unroll
  for (float v : s) highest = fmaxf(highest, v);
  return highest;
}

// s becomes exp(s - shift) from column `start` to n; returns the sum of these.
template <int kWidth>
__device__ float exponentiate(const Place& at, int64_t start, int64_t n, float shift, float (&s)[kItems]) {
  float sum = 0;
  for_items<kWidth, kItems>(at, start, n, [&](int i, int64_t) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum += s[i + k] = exp_of(s[i + k] - shift);
  });
  return sum;
}

// What a warp has to multiply its exponentials with, from their maximum and their sum.
template <Team kTeam>
__device__ float factor_of(float highest, float sum) {
  if constexpr (kTeam == Team::kWarp) return sum == 0 ? 0 : 1 / sum;
  __shared__ float2 of_warps[32];
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (lane == 0) of_warps[threadIdx.x / 32] = {highest, sum};
  __syncthreads();
  const float2 other = lane < warps ? of_warps[lane] : make_float2(-INFINITY, 0);
  const float shift = shift_of(warp_all(other.x, Max{}));
  const float total = warp_all(other.y * exp_of(other.x - shift), Add{});
  return total == 0 ? 0 : exp_of(highest - shift) / total;
}

// Writes factor * values from column `start` on, of column n and on factor * 0.
template <int kWidth, class T>
__device__ void store_scaled(const float (&values)[kItems], float factor, const Place& at, int64_t start,
                             int64_t n, int64_t cols, T* to) {
  for_items<kWidth, kItems>(at, start, cols, [&](int i, int64_t col) {
    float out[kWidth];
    const float nothing = 0 * factor;  // NaN in a row makes all of it NaN
#pragma unroll
    for (float& v : out) v = nothing;
    if (col < n) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) out[k] = values[i + k] * factor;
    }
    store<kWidth>(out, to + col);
  });
}

template <class T, int kWidth, Team kTeam>
__global__ void __launch_bounds__(kMostThreads) softmax_forward_kernel(const SoftmaxForward a) {
  const Place at = place<kTeam>();
  if (at.row >= a.rows) return;
  assume_at_once<kTeam, kWidth>(a.cols);
  const int64_t n = attended(a.causal, at.row, a.cols), step = at.threads * kItems;
  const uint8_t* keep = mask_row(a.mask, at.row);
  const T* x = row_at<T>(a.x, a.x_stride, at.row);
  T* y = row_at<T>(a.y, a.cols, at.row);
  float s[kItems];
  if constexpr (kTeam != Team::kLoop) {
    scores<kWidth>(a, at, x, keep, n, 0, s);
    const float of_warp = warp_all(highest_of(s), Max{});  // one barrier joins the warps' maxima and sums
    const float sum = warp_all(exponentiate<kWidth>(at, 0, n, shift_of(of_warp), s), Add{});
    return store_scaled<kWidth>(s, factor_of<kTeam>(of_warp, sum), at, 0, n, a.cols, y);
  }
  float highest = -INFINITY, sum = 0;
  for (int64_t start = 0; start < n; start += step) {
    scores<kWidth>(a, at, x, keep, n, start, s);
    const float higher = fmaxf(highest, highest_of(s)), shift = shift_of(higher);
    sum = sum * exp_of(highest - shift) + exponentiate<kWidth>(at, start, n, shift, s);
    highest = higher;
  }
  const float shift = shift_of(team_max<kTeam>(highest));
  sum = team_sum<kTeam>(sum * exp_of(highest - shift));
  const float inverse = sum == 0 ? 0 : 1 / sum;
  for (int64_t start = 0; start < a.cols; start += step) {
    scores<kWidth>(a, at, x, keep, n, start, s);
    exponentiate<kWidth>(at, start, n, shift, s);
    store_scaled<kWidth>(s, inverse, at, start, n, a.cols, y);
  }
}

// dy and y from column `start` to n, 0 from there on; returns the sum of their products.
template <int kWidth, class T>
__device__ float gradients(const Place& at, const T* dy, const T* y, int64_t n, int64_t start,
                           float (&g)[kItems], float (&p)[kItems]) {
  Packed<kWidth, T> all_dy[kItems / kWidth], all_y[kItems / kWidth];
  load_items<kWidth, kItems>(dy, at, start, n, all_dy);
  load_items<kWidth, kItems>(y, at, start, n, all_y);
#pragma unroll
  for (int i = 0; i < kItems; ++i) g[i] = p[i] = 0;
  for_items<kWidth, kItems>(at, start, n, [&](int i, int64_t col) {
    float dys[kWidth], ys[kWidth];
    unpack(all_dy[i / kWidth], dys);
    unpack(all_y[i / kWidth], ys);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) g[i + k] = dys[k], p[i + k] = ys[k];
    if (col + kWidth > n) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        if (col + k >= n) g[i + k] = p[i + k] = 0;
      }
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
  assume_at_once<kTeam, kWidth>(a.cols);
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
    store_scaled<kWidth>(g, a.scale, at, start, a.cols, a.cols, dx);
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
