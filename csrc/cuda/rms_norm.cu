// rms_norm: h = dropout(x) + residual; y = h * rstd(h) * (weight + weight_offset).
//
// Forward: a warp takes a row of up to 512 columns, a block one of up to 8192: its threads hold h in
// registers from its one read to its one write. Longer rows are read twice. Backward, with g = dy * (weight +
// weight_offset) and n = h * rstd: dresidual = rstd * (g - n * mean(g * n)) + dh, dx = dropout's factor *
// dresidual; dweight = sum(dy * n) over rows. A block goes down row_blocks' share of the rows and keeps this
// sum in registers, the next row under way; add_partials adds the blocks up in order. Above 8192 columns a
// row is read twice, and dweight has a kernel of its own, which reads a third time. Bound by bytes: x
// (residual) in, y (h) out; dy (dh) and h in, dx (dresidual) out; 8 bytes a column and block to dweight.
// Source: Zhang, Sennrich, https://arxiv.org/abs/1910.07467.
#include "../contract/rms_norm.h"
#include "launch.cuh"
#include "norms.cuh"
#include "parameters.cuh"
#include "sums.cuh"

namespace fastlm {
namespace {

constexpr int kItems = 16;  // a thread: two loads of 16 bytes of half precision
template <int kWidth>
constexpr int kSumItems = kWidth == 1 ? 8 : 16;  // backward: as many of g, n and dweight
constexpr int kMostThreads = 512;                // with 128 registers each

// Writes h * rstd * (weight + weight_offset) from column `start` on.
template <class T, class W, int kWidth>
__device__ void store_normed(const RmsNormForward& a, const Place& at, int64_t start, float rstd,
                             const float (&h)[kItems]) {
  T* y = row_at<T>(a.y, a.cols, at.row);
  for_items<kWidth, kItems>(at, start, a.cols, [&](int i, int64_t col) {
    float w[kWidth];
    load_parameter<W>(a.weight, col, w);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) w[k] = h[i + k] * rstd * (w[k] + a.weight_offset);
    store<kWidth>(w, y + col);
  });
}

template <class T, class W, int kWidth, Team kTeam>
__global__ void __launch_bounds__(kMostThreads)
    rms_norm_forward_kernel(const RmsNormForward a, const DropoutScale dropout) {
  const Place at = place<kTeam>();
  if (at.row >= a.rows) return;
  assume_at_once<kTeam, kWidth>(a.cols);
  const int64_t step = at.threads * kItems;
  float h[kItems], squares = 0;
  for (int64_t start = 0; start < a.cols; start += step) {
    normed_items<T, kWidth>(a, dropout, at, start, h);
    float piece = 0;  // a sum of short sums keeps the rounding error small
#pragma unroll
    for (float v : h) piece += v * v;
    squares += piece;
    if (kTeam != Team::kLoop) break;
  }
  const float rstd = 1 / sqrtf(team_sum<kTeam>(squares) / static_cast<float>(a.cols) + a.eps);
  if (at.thread == 0) a.rstd[at.row] = rstd;
  if constexpr (kTeam != Team::kLoop) return store_normed<T, W, kWidth>(a, at, 0, rstd, h);
  const T* kept = a.h ? row_at<T>(static_cast<const void*>(a.h), a.cols, at.row)
                      : row_at<T>(a.x, a.x_stride, at.row);  // each thread reads again what it wrote itself
  for (int64_t start = 0; start < a.cols; start += step) {
    load_items<kWidth>(kept, at, start, a.cols, h);
    store_normed<T, W, kWidth>(a, at, start, rstd, h);
  }
}

// dy and n from column `start` on, 0 past the row's end.
template <class T, int kWidth>
__device__ void load_gradients(const RmsNormBackward& a, const Place& at, int64_t start, float rstd,
                               float (&d)[kSumItems<kWidth>], float (&n)[kSumItems<kWidth>]) {
  load_items<kWidth>(row_at<T>(a.dy, a.dy_stride, at.row), at, start, a.cols, d);
  load_items<kWidth>(row_at<T>(a.h, a.h_stride, at.row), at, start, a.cols, n);
#pragma unroll
  for (float& v : n) v *= rstd;
}

// d becomes g = dy * (weight + weight_offset); returns the sum of g * n.
template <class W, int kWidth, int kCount>
__device__ float weigh(const RmsNormBackward& a, const Place& at, int64_t start, const float (&n)[kCount],
                       float (&d)[kCount]) {
  float sum = 0;
  for_items<kWidth, kCount>(at, start, a.cols, [&](int i, int64_t col) {
    float w[kWidth];
    load_parameter<W>(a.weight, col, w);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      d[i + k] *= w[k] + a.weight_offset;
      sum += d[i + k] * n[i + k];
    }
  });
  return sum;
}

// g becomes rstd * (g - n * mean(g * n)).
template <int kCount>
__device__ void project(float rstd, float mean, const float (&n)[kCount], float (&g)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) g[i] = (g[i] - n[i] * mean) * rstd;
}

// A block's rows, one after another, or one for each of its warps: dx, dresidual, and the sums in partial.
// By the element it spills where ptxas looks for more blocks than one.
template <class T, class W, int kWidth, Team kTeam>
__global__ void __launch_bounds__(kMostThreads, kWidth == 1 ? 1 : 0)
    rms_norm_backward_kernel(const RmsNormBackward a, const DropoutScale dropout) {
  Place at = place<kTeam>();
  assume_at_once<kTeam, kWidth>(a.cols);
  const RowRange range = rows_of_block(a.rows, blockIdx.x, gridDim.x);
  const float cols = static_cast<float>(a.cols);
  float d[kSumItems<kWidth>], n[kSumItems<kWidth>], dweight[kSumItems<kWidth>] = {};
  RowAhead<T, kWidth, kSumItems<kWidth>> ahead;
  at.row = first_row<kTeam>(range);
  if (ahead.kAhead && at.row < range.last) ahead.fetch(a, nullptr, at);
  for (bool odd = false; at.row < range.last; at.row += kRowStep<kTeam>, odd = !odd) {
    if (!ahead.kAhead) ahead.fetch(a, nullptr, at);
    const float rstd = ahead.template take<false>(at, a.cols, d, n);
    const Place next{at.row + kRowStep<kTeam>, at.thread, at.threads};
    if (ahead.kAhead && next.row < range.last) ahead.fetch(a, nullptr, next);
#pragma unroll
    for (int i = 0; i < kSumItems<kWidth>; ++i) dweight[i] += d[i] * n[i];
    if (!a.dx && !a.dresidual) continue;
    const float sum = sum_of_row<kTeam>(weigh<W, kWidth>(a, at, 0, n, d), odd);
    project(rstd, sum / cols, n, d);
    store_gradients<T, kWidth, false>(a, dropout, at, 0, d);
  }
  if (!a.partial) return;
  store_sums<kWidth, kTeam>(at, 0, a.cols, dweight, a.partial + static_cast<int64_t>(blockIdx.x) * a.cols);
}

// dx and dresidual of one long row; where only h was used (dy is null), of a row of any length.
template <class T, class W, int kWidth>
__global__ void __launch_bounds__(kLoopThreads)
    rms_norm_backward_long_kernel(const RmsNormBackward a, const DropoutScale dropout) {
  const Place at = place<Team::kLoop>();
  const int64_t step = at.threads * kSumItems<kWidth>;
  const float rstd = a.rstd[at.row];
  float d[kSumItems<kWidth>] = {}, n[kSumItems<kWidth>], sum = 0;
  for (int64_t start = 0; a.dy && start < a.cols; start += step) {
    load_gradients<T, kWidth>(a, at, start, rstd, d, n);
    sum += weigh<W, kWidth>(a, at, start, n, d);
  }
  sum = team_sum<Team::kLoop>(sum);
  for (int64_t start = 0; start < a.cols; start += step) {
    if (a.dy) {
      load_gradients<T, kWidth>(a, at, start, rstd, d, n);
      weigh<W, kWidth>(a, at, start, n, d);
      project(rstd, sum / a.cols, n, d);
    }
    store_gradients<T, kWidth, true>(a, dropout, at, start, d);
  }
}

constexpr int kColumnThreads = 128;

// The sums of dweight of one block of rows, kWidth columns a thread; 0 where dy is null.
template <class T, int kWidth>
__global__ void __launch_bounds__(kColumnThreads, 1)
    rms_norm_columns_kernel(const RmsNormBackward a, int64_t blocks) {
  const int64_t across = gridDim.x / blocks, block = blockIdx.x / across;
  const int64_t col = (blockIdx.x % across * kColumnThreads + threadIdx.x) * kWidth;
  if (col >= a.cols) return;
  const RowRange range = rows_of_block(a.rows, block, blocks);
  float dweight[kWidth] = {}, d[kWidth], h[kWidth];
  for (int64_t row = range.first; a.dy && row < range.last; ++row) {
    load<kWidth>(row_at<T>(a.dy, a.dy_stride, row) + col, d);
    load<kWidth>(row_at<T>(a.h, a.h_stride, row) + col, h);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) dweight[k] += d[k] * (h[k] * a.rstd[row]);
  }
  store_whole<kWidth>(dweight, a.partial + block * a.cols + col);
}

// Where rows are long, or dy is null.
template <class T, class W, int kWidth>
void backward_in_two(const Context& context, const RmsNormBackward& a, int64_t blocks) {
  if (a.dx || a.dresidual) {
    launch("rms_norm_backward", context, rms_norm_backward_long_kernel<T, W, kWidth>, a.rows, kLoopThreads, 0,
           a, DropoutScale(a.dropout));
  }
  if (!a.partial) return;
  const int64_t across = (a.cols + kColumnThreads * kWidth - 1) / (kColumnThreads * kWidth);
  launch("rms_norm_backward", context, rms_norm_columns_kernel<T, kWidth>, across * blocks, kColumnThreads, 0,
         a, blocks);
}

}  // namespace

void rms_norm_forward(const Context& context, const RmsNormForward& a) {
  with_device_dtype(a.dtype, [&]<class T>() {
    const bool wide =
        wide_rows<T>(a.cols, {{a.x, a.x_stride}, {a.residual, a.residual_stride}, {a.y}, {a.h}}) &&
        aligned(a.weight.data);
    with_parameters<T>(a.weight.narrow, wide, [&]<class W, int kWidth>() {
      with_team<kItems, kMostThreads>(a.cols, [&]<Team kTeam>(int threads) {
        launch("rms_norm", context, rms_norm_forward_kernel<T, W, kWidth, kTeam>,
               blocks_for<kTeam>(a.rows, threads), threads, 0, a, DropoutScale(a.dropout));
      });
    });
  });
}

void rms_norm_backward(const Context& context, const RmsNormBackward& a) {
  const int64_t blocks = row_blocks(a.rows);
  with_device_dtype(a.dtype, [&]<class T>() {
    const bool wide = wide_rows<T>(a.cols, {{a.dy, a.dy_stride},
                                            {a.dh, a.dh_stride},
                                            {a.h, a.h_stride},
                                            {a.dx},
                                            {a.dresidual},
                                            {a.partial}}) &&
                      aligned(a.weight.data);
    with_parameters<T>(a.weight.narrow, wide, [&]<class W, int kWidth>() {
      with_team<kSumItems<kWidth>, kMostThreads>(a.cols, [&]<Team kTeam>(int threads) {
        if (kTeam == Team::kLoop || !a.dy) return backward_in_two<T, W, kWidth>(context, a, blocks);
        if constexpr (kTeam != Team::kLoop) {
          launch("rms_norm_backward", context, rms_norm_backward_kernel<T, W, kWidth, kTeam>, blocks, threads,
                 0, a, DropoutScale(a.dropout));
        }
      });
    });
  });
  add_partials("rms_norm_backward", context, a.dtype, a.partial, blocks, a.cols, 1, {{a.dweight}});
}

}  // namespace fastlm
