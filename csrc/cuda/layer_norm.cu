// layer_norm: h = dropout(x) + residual; y = (h - mean(h)) * rstd(h) * weight + bias.
//
// Forward: a warp takes a row of up to 512 columns, a block one of up to 8192: its threads hold h in
// registers from its one read to its one write; mean, then the squares around it, are sums over registers.
// Longer rows are read twice; mean and squares of their pieces are joined as Chan, Golub, LeVeque do
// (STAN-CS-79-773). Backward, with g = dy * weight and n = (h - mean) * rstd: dresidual = rstd * (g - mean(g)
// - n * mean(g * n)) + dh, dx = dropout's factor * dresidual; dweight = sum(dy * n), dbias = sum(dy) over
// rows. A block goes down row_blocks' share of the rows and keeps these sums in registers; add_partials adds
// the blocks up in order. Above 4096 columns a row is read twice, and dweight and dbias have a kernel of
// their own, which reads a third time: a block's sums of such rows fit no register file. Bound by bytes: x
// (residual) in, y (h) out; dy (dh) and h in, dx (dresidual) out; 8 bytes a column and block. Source: Ba,
// Kiros, Hinton, https://arxiv.org/abs/1607.06450.
#include "../contract/layer_norm.h"
#include "launch.cuh"
#include "norms.cuh"
#include "sums.cuh"

namespace fastlm {
namespace {

constexpr int kItems = 16;         // forward, elements a thread: two loads of 16 bytes of half precision
constexpr int kSumItems = 8;       // backward: as many of g, n, dweight and dbias
constexpr int kMostThreads = 512;  // with 128 registers each

// mean and sum of squares around it, of a row or the part of it seen so far.
struct Moments {
  float mean = 0, squares = 0;
};

// Those of `count` columns that start at `start`; h becomes h - mean there, and stays 0 past the row's end.
template <int kWidth, Team kTeam>
__device__ Moments moments(const Place& at, int64_t start, int64_t cols, float count, float (&h)[kItems]) {
  float sum = 0, squares = 0;
#pragma unroll
  for (float v : h) sum += v;
  const float mean = team_sum<kTeam>(sum) / count;
  for_items<kWidth, kItems>(at, start, cols, [&](int i, int64_t) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      h[i + k] -= mean;
      squares += h[i + k] * h[i + k];
    }
  });
  return {mean, team_sum<kTeam>(squares)};
}

// Writes centred * rstd * weight + bias from column `start` on.
template <class T, int kWidth>
__device__ void store_normed(const LayerNormForward& a, const Place& at, int64_t start, float rstd,
                             const float (&centred)[kItems]) {
  T* y = row_at<T>(a.y, a.cols, at.row);
  for_items<kWidth, kItems>(at, start, a.cols, [&](int i, int64_t col) {
    float w[kWidth], b[kWidth];
    load<kWidth>(a.weight + col, w);
    load<kWidth>(a.bias + col, b);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) w[k] = centred[i + k] * rstd * w[k] + b[k];
    store<kWidth>(w, y + col);
  });
}

template <class T, int kWidth, Team kTeam>
__global__ void __launch_bounds__(kMostThreads)
    layer_norm_forward_kernel(const LayerNormForward a, const DropoutScale dropout) {
  const Place at = place<kTeam>();
  if (at.row >= a.rows) return;
  const int64_t step = at.threads * kItems;
  const float cols = static_cast<float>(a.cols);
  float h[kItems];
  Moments of_row;
  for (int64_t start = 0; start < a.cols; start += step) {
    normed_items<T, kWidth>(a, dropout, at, start, h);
    const float count = static_cast<float>(min(step, a.cols - start));
    const Moments piece = moments<kWidth, kTeam>(at, start, a.cols, count, h);
    const float delta = piece.mean - of_row.mean, before = static_cast<float>(start);
    const float share = count / (before + count);  // 1 of the first piece
    of_row.mean = start == 0 ? piece.mean : of_row.mean + delta * share;
    of_row.squares += piece.squares + (start == 0 ? 0 : delta * delta * before * share);
    if (kTeam != Team::kLoop) break;
  }
  const float rstd = 1 / sqrtf(of_row.squares / cols + a.eps);
  if (at.thread == 0) a.mean[at.row] = of_row.mean, a.rstd[at.row] = rstd;
  if constexpr (kTeam != Team::kLoop) return store_normed<T, kWidth>(a, at, 0, rstd, h);
  const T* kept = a.h ? row_at<T>(static_cast<const void*>(a.h), a.cols, at.row)
                      : row_at<T>(a.x, a.x_stride, at.row);  // each thread reads again what it wrote itself
  for (int64_t start = 0; start < a.cols; start += step) {
    for_items<kWidth, kItems>(at, start, a.cols, [&](int i, int64_t col) {
      float values[kWidth];
      load<kWidth>(kept + col, values);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) h[i + k] = values[k] - of_row.mean;
    });
    store_normed<T, kWidth>(a, at, start, rstd, h);
  }
}

// dy and n from column `start` on, 0 past the row's end.
template <class T, int kWidth>
__device__ void load_gradients(const LayerNormBackward& a, const Place& at, int64_t start, float mean,
                               float rstd, float (&d)[kSumItems], float (&n)[kSumItems]) {
  const T* dy = row_at<T>(a.dy, a.dy_stride, at.row);
  const T* h = row_at<T>(a.h, a.h_stride, at.row);
#pragma unroll
  for (int i = 0; i < kSumItems; ++i) d[i] = n[i] = 0;
  for_items<kWidth, kSumItems>(at, start, a.cols, [&](int i, int64_t col) {
    float values[kWidth];
    load<kWidth>(dy + col, values);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) d[i + k] = values[k];
    load<kWidth>(h + col, values);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) n[i + k] = (values[k] - mean) * rstd;
  });
}

// d becomes g = dy * weight; adds up g and g * n.
template <int kWidth>
__device__ void weigh(const LayerNormBackward& a, const Place& at, int64_t start, const float (&n)[kSumItems],
                      float (&d)[kSumItems], float (&sums)[2]) {
  for_items<kWidth, kSumItems>(at, start, a.cols, [&](int i, int64_t col) {
    float w[kWidth];
    load<kWidth>(a.weight + col, w);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      d[i + k] = __fmul_rn(d[i + k], w[k]);  // rounded, so that g - mean(g) is exact
      sums[0] += d[i + k];
      sums[1] += d[i + k] * n[i + k];
    }
  });
}

// g becomes rstd * (g - mean(g) - n * mean(g * n)).
__device__ void project(float rstd, float g_mean, float gn_mean, const float (&n)[kSumItems],
                        float (&g)[kSumItems]) {
#pragma unroll
  for (int i = 0; i < kSumItems; ++i) g[i] = (g[i] - g_mean - n[i] * gn_mean) * rstd;
}

// A block's rows, one after another, or one for each of its warps: dx, dresidual, and the sums in partial.
template <class T, int kWidth, Team kTeam>
__global__ void __launch_bounds__(kMostThreads)
    layer_norm_backward_kernel(const LayerNormBackward a, const DropoutScale dropout) {
  Place at = place<kTeam>();
  const RowRange range = rows_of_block(a.rows, blockIdx.x, gridDim.x);
  constexpr bool kWarps = kTeam == Team::kWarp;
  float d[kSumItems], n[kSumItems], dweight[kSumItems] = {}, dbias[kSumItems] = {};
  for (at.row = range.first + (kWarps ? threadIdx.x / 32 : 0); at.row < range.last;
       at.row += kWarps ? kWarpThreads / 32 : 1) {
    const float rstd = a.rstd[at.row];
    load_gradients<T, kWidth>(a, at, 0, a.mean[at.row], rstd, d, n);
#pragma unroll
    for (int i = 0; i < kSumItems; ++i) {
      dweight[i] += d[i] * n[i];
      dbias[i] += d[i];
    }
    if (!a.dx && !a.dresidual) continue;
    float sums[2] = {};
    weigh<kWidth>(a, at, 0, n, d, sums);
    team_all<kTeam>(sums, Add{});
    project(rstd, sums[0] / a.cols, sums[1] / a.cols, n, d);
    store_gradients<T, kWidth>(a, dropout, at, 0, d);
  }
  if (!a.partial) return;
  float* out = a.partial + static_cast<int64_t>(blockIdx.x) * 2 * a.cols;
  store_sums<kWidth, kTeam>(at, 0, a.cols, dweight, out);
  store_sums<kWidth, kTeam>(at, 0, a.cols, dbias, out + a.cols);
}

// dx and dresidual of one long row; where only h was used (dy is null), of a row of any length.
template <class T, int kWidth>
__global__ void __launch_bounds__(kLoopThreads)
    layer_norm_backward_long_kernel(const LayerNormBackward a, const DropoutScale dropout) {
  const Place at = place<Team::kLoop>();
  const int64_t step = at.threads * kSumItems;
  const float mean = a.mean[at.row], rstd = a.rstd[at.row];
  float d[kSumItems] = {}, n[kSumItems], sums[2] = {}, unused[2] = {};
  for (int64_t start = 0; a.dy && start < a.cols; start += step) {
    load_gradients<T, kWidth>(a, at, start, mean, rstd, d, n);
    weigh<kWidth>(a, at, start, n, d, sums);
  }
  team_all<Team::kLoop>(sums, Add{});
  for (int64_t start = 0; start < a.cols; start += step) {
    if (a.dy) {
      load_gradients<T, kWidth>(a, at, start, mean, rstd, d, n);
      weigh<kWidth>(a, at, start, n, d, unused);
      project(rstd, sums[0] / a.cols, sums[1] / a.cols, n, d);
    }
    store_gradients<T, kWidth>(a, dropout, at, start, d);
  }
}

constexpr int kColumnThreads = 128;

// The sums of dweight and dbias of one block of rows, kWidth columns a thread; 0 where dy is null.
template <class T, int kWidth>
__global__ void __launch_bounds__(kColumnThreads)
    layer_norm_columns_kernel(const LayerNormBackward a, int64_t blocks) {
  const int64_t across = gridDim.x / blocks, block = blockIdx.x / across;
  const int64_t col = (blockIdx.x % across * kColumnThreads + threadIdx.x) * kWidth;
  if (col >= a.cols) return;
  const RowRange range = rows_of_block(a.rows, block, blocks);
  float dweight[kWidth] = {}, dbias[kWidth] = {}, d[kWidth], h[kWidth];
  for (int64_t row = range.first; a.dy && row < range.last; ++row) {
    load<kWidth>(row_at<T>(a.dy, a.dy_stride, row) + col, d);
    load<kWidth>(row_at<T>(a.h, a.h_stride, row) + col, h);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      dweight[k] += d[k] * ((h[k] - a.mean[row]) * a.rstd[row]);
      dbias[k] += d[k];
    }
  }
  float* out = a.partial + block * 2 * a.cols + col;
  store<kWidth>(dweight, out);
  store<kWidth>(dbias, out + a.cols);
}

// Where rows are long, or dy is null.
template <class T, int kWidth>
void backward_in_two(const Context& context, const LayerNormBackward& a, int64_t blocks) {
  if (a.dx || a.dresidual) {
    launch("layer_norm_backward", context, layer_norm_backward_long_kernel<T, kWidth>, a.rows, kLoopThreads,
           0, a, DropoutScale(a.dropout));
  }
  if (!a.partial) return;
  const int64_t across = (a.cols + kColumnThreads * kWidth - 1) / (kColumnThreads * kWidth);
  launch("layer_norm_backward", context, layer_norm_columns_kernel<T, kWidth>, across * blocks,
         kColumnThreads, 0, a, blocks);
}

}  // namespace

void layer_norm_forward(const Context& context, const LayerNormForward& a) {
  with_device_dtype(a.dtype, [&]<class T>() {
    const bool wide =
        wide_rows<T>(a.cols, {{a.x, a.x_stride}, {a.residual, a.residual_stride}, {a.y}, {a.h}}) &&
        aligned(a.weight) && aligned(a.bias);
    with_width<T>(wide, [&]<int kWidth>() {
      with_team<kItems, kMostThreads>(a.cols, [&]<Team kTeam>(int threads) {
        launch("layer_norm", context, layer_norm_forward_kernel<T, kWidth, kTeam>,
               blocks_for<kTeam>(a.rows, threads), threads, 0, a, DropoutScale(a.dropout));
      });
    });
  });
}

void layer_norm_backward(const Context& context, const LayerNormBackward& a) {
  const int64_t blocks = row_blocks(a.rows);
  with_device_dtype(a.dtype, [&]<class T>() {
    const bool wide = wide_rows<T>(a.cols, {{a.dy, a.dy_stride},
                                            {a.dh, a.dh_stride},
                                            {a.h, a.h_stride},
                                            {a.dx},
                                            {a.dresidual},
                                            {a.partial}}) &&
                      aligned(a.weight);
    with_width<T>(wide, [&]<int kWidth>() {
      with_team<kSumItems, kMostThreads>(a.cols, [&]<Team kTeam>(int threads) {
        if (kTeam == Team::kLoop || !a.dy) return backward_in_two<T, kWidth>(context, a, blocks);
        if constexpr (kTeam != Team::kLoop) {
          launch("layer_norm_backward", context, layer_norm_backward_kernel<T, kWidth, kTeam>, blocks,
                 threads, 0, a, DropoutScale(a.dropout));
        }
      });
    });
  });
  add_partials("layer_norm_backward", context, a.partial, 2 * a.cols, blocks, a.cols, a.dweight);
  add_partials("layer_norm_backward", context, a.partial ? a.partial + a.cols : nullptr, 2 * a.cols, blocks,
               a.cols, a.dbias);
}

}  // namespace fastlm
