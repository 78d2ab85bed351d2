// layer_norm: h = dropout(x) + residual; y = (h - mean(h)) * rstd(h) * weight + bias.
//
// Forward: a warp takes a row of up to 512 columns, a block one of up to 8192: its threads hold h in
// registers from its one read to its one write. A warp takes its own mean, then the squares around it; those
// of warps are joined as Chan, Golub, LeVeque do (STAN-CS-79-773), with one barrier a row. Longer rows are
// read twice, their pieces joined alike. Backward, with g = dy * weight and n = (h - mean) * rstd: dresidual
// = rstd * (g - mean(g) - n * mean(g * n)) + dh, dx = dropout's factor * dresidual; dweight = sum(dy * n),
// dbias = sum(dy) over rows. A block goes down row_blocks' share of the rows and keeps these sums in
// registers, the next row under way; add_partials adds the blocks up in order. Above 8192 columns (float32:
// 4096) a row is read twice, and dweight and dbias have a kernel of their own, which reads a third time: a
// block's sums of such rows fit no register file. Bound by bytes: x (residual) in, y (h) out; dy (dh) and h
// in, dx (dresidual) out; 8 bytes a column and block. Source: Ba, Kiros, Hinton,
// https://arxiv.org/abs/1607.06450.
#include "../contract/layer_norm.h"
#include "launch.cuh"
#include "norms.cuh"
#include "parameters.cuh"
#include "sums.cuh"

namespace fastlm {
namespace {

constexpr int kItems = 16;  // forward, elements a thread: two loads of 16 bytes of half precision
template <class T, int kWidth>
constexpr int kSumItems = kWidth == 1 ? 8 : 32 / sizeof(T);  // backward: as many of g, n, dweight and dbias
constexpr int kMostThreads = 512;                            // with 128 registers each

// mean and sum of squares around it, of a row or the part of it seen so far.
struct Moments {
  float mean = 0, squares = 0;
};

// A warp's part of those: its sum, its mean, its squares around that, and how many elements these are of.
struct WarpMoments {
  float sum, mean, squares, count;
};

template <int kWidth>
__device__ WarpMoments warp_moments(const Place& at, int64_t start, int64_t cols, const float (&h)[kItems]) {
  float sum = 0, squares = 0, count = 0;
  for_items<kWidth, kItems>(at, start, cols, [&](int i, int64_t) {
    count += kWidth;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum += h[i + k];
  });
  sum = warp_all(sum, Add{}), count = warp_all(count, Add{});
  const float mean = sum * reciprocal(fmaxf(count, 1));
  for_items<kWidth, kItems>(at, start, cols, [&](int i, int64_t) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) squares += (h[i + k] - mean) * (h[i + k] - mean);
  });
  return {sum, mean, warp_all(squares, Add{}), count};
}

// The moments of `count` columns that start at `start`: one barrier joins those of the warps.
template <int kWidth, Team kTeam>
__device__ Moments moments(const Place& at, int64_t start, int64_t cols, float count,
                           const float (&h)[kItems]) {
  WarpMoments part = warp_moments<kWidth>(at, start, cols, h);
  if constexpr (kTeam == Team::kWarp) return {part.mean, part.squares};
  __shared__ float4 of_warps[32];
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  if (kTeam == Team::kLoop) __syncthreads();  // the piece before may still be read
  if (lane == 0) of_warps[threadIdx.x / 32] = {part.sum, part.mean, part.squares, part.count};
  __syncthreads();
  const float4 other = lane < warps ? of_warps[lane] : make_float4(0, 0, 0, 0);
  const float mean = warp_all(other.x, Add{}) / count, delta = other.y - mean;
  return {mean, warp_all(other.z + other.w * delta * delta, Add{})};
}

// Writes (h - mean) * rstd * weight + bias from column `start` on.
template <class T, class W, int kWidth>
__device__ void store_normed(const LayerNormForward& a, const Place& at, int64_t start, float mean,
                             float rstd, const float (&h)[kItems]) {
  T* y = row_at<T>(a.y, a.cols, at.row);
  for_items<kWidth, kItems>(at, start, a.cols, [&](int i, int64_t col) {
    float w[kWidth], b[kWidth];
    load_parameter<W>(a.weight, col, w);
    load_parameter<W>(a.bias, col, b);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) w[k] = (h[i + k] - mean) * rstd * w[k] + b[k];
    store<kWidth>(w, y + col);
  });
}

template <class T, class W, int kWidth, Team kTeam>
__global__ void __launch_bounds__(kMostThreads, kWidth == 1 && kTeam == Team::kBlock ? 1 : 0)
    layer_norm_forward_kernel(const LayerNormForward a, const DropoutScale dropout) {
  const Place at = place<kTeam>();
  if (at.row >= a.rows) return;
  assume_at_once<kTeam, kWidth>(a.cols);
  const int64_t step = at.threads * kItems;
  const float cols = static_cast<float>(a.cols);
  float h[kItems];
  Moments of_row;
  for (int64_t start = 0; start < a.cols; start += step) {
    normed_items<T, kWidth>(a, dropout, at, start, h);
    if constexpr (kTeam != Team::kLoop) {
      of_row = moments<kWidth, kTeam>(at, 0, a.cols, cols, h);
      break;
    }
    const float count = static_cast<float>(min(step, a.cols - start));
    const Moments piece = moments<kWidth, kTeam>(at, start, a.cols, count, h);
    const float delta = piece.mean - of_row.mean, before = static_cast<float>(start);
    const float share = count / (before + count);  // 1 of the first piece
    of_row.mean = start == 0 ? piece.mean : of_row.mean + delta * share;
    of_row.squares += piece.squares + (start == 0 ? 0 : delta * delta * before * share);
  }
  const float rstd = 1 / sqrtf(of_row.squares / cols + a.eps);
  if (at.thread == 0) a.mean[at.row] = of_row.mean, a.rstd[at.row] = rstd;
  if constexpr (kTeam != Team::kLoop) return store_normed<T, W, kWidth>(a, at, 0, of_row.mean, rstd, h);
  const T* kept = a.h ? row_at<T>(static_cast<const void*>(a.h), a.cols, at.row)
                      : row_at<T>(a.x, a.x_stride, at.row);  // each thread reads again what it wrote itself
  for (int64_t start = 0; start < a.cols; start += step) {
    load_items<kWidth>(kept, at, start, a.cols, h);
    store_normed<T, W, kWidth>(a, at, start, of_row.mean, rstd, h);
  }
}

// dy and n from column `start` on, 0 past the row's end.
template <class T, int kWidth>
__device__ void load_gradients(const LayerNormBackward& a, const Place& at, int64_t start, float mean,
                               float rstd, float (&d)[kSumItems<T, kWidth>],
                               float (&n)[kSumItems<T, kWidth>]) {
  const T* dy = row_at<T>(a.dy, a.dy_stride, at.row);
  const T* h = row_at<T>(a.h, a.h_stride, at.row);
#pragma unroll
  for (int i = 0; i < kSumItems<T, kWidth>; ++i) d[i] = n[i] = 0;
  for_items<kWidth, kSumItems<T, kWidth>>(at, start, a.cols, [&](int i, int64_t col) {
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
template <class W, int kWidth, int kCount>
__device__ void weigh(const LayerNormBackward& a, const Place& at, int64_t start, const float (&n)[kCount],
                      float (&d)[kCount], float (&sums)[2]) {
  for_items<kWidth, kCount>(at, start, a.cols, [&](int i, int64_t col) {
    float w[kWidth];
    load_parameter<W>(a.weight, col, w);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      d[i + k] = __fmul_rn(d[i + k], w[k]);  // rounded, so that g - mean(g) is exact
      sums[0] += d[i + k];
      sums[1] += d[i + k] * n[i + k];
    }
  });
}

// g becomes rstd * (g - mean(g) - n * mean(g * n)).
template <int kCount>
__device__ void project(float rstd, float g_mean, float gn_mean, const float (&n)[kCount],
                        float (&g)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) g[i] = (g[i] - g_mean - n[i] * gn_mean) * rstd;
}

// A block's rows, one after another, or one for each of its warps: dx, dresidual, and the sums in partial.
template <class T, class W, int kWidth, Team kTeam>
__global__ void __launch_bounds__(kMostThreads)
    layer_norm_backward_kernel(const LayerNormBackward a, const DropoutScale dropout) {
  Place at = place<kTeam>();
  assume_at_once<kTeam, kWidth>(a.cols);
  const RowRange range = rows_of_block(a.rows, blockIdx.x, gridDim.x);
  const float cols = static_cast<float>(a.cols);
  float d[kSumItems<T, kWidth>], n[kSumItems<T, kWidth>],
      dweight[kSumItems<T, kWidth>] = {}, dbias[kSumItems<T, kWidth>] = {};
  RowAhead<T, kWidth, kSumItems<T, kWidth>> ahead;
  at.row = first_row<kTeam>(range);
  if (ahead.kAhead && at.row < range.last) ahead.fetch(a, a.mean, at);
  for (bool odd = false; at.row < range.last; at.row += kRowStep<kTeam>, odd = !odd) {
    if (!ahead.kAhead) ahead.fetch(a, a.mean, at);
    const float rstd = ahead.template take<true>(at, a.cols, d, n);
    const Place next{at.row + kRowStep<kTeam>, at.thread, at.threads};
    if (ahead.kAhead && next.row < range.last) ahead.fetch(a, a.mean, next);
#pragma unroll
    for (int i = 0; i < kSumItems<T, kWidth>; ++i) {
      dweight[i] += d[i] * n[i];
      dbias[i] += d[i];
    }
    if (!a.dx && !a.dresidual) continue;
    float sums[2] = {};
    weigh<W, kWidth>(a, at, 0, n, d, sums);
    sums_of_row<kTeam>(sums, odd);
    project(rstd, sums[0] / cols, sums[1] / cols, n, d);
    store_gradients<T, kWidth, false>(a, dropout, at, 0, d);
  }
  if (!a.partial) return;
  float* out = a.partial + static_cast<int64_t>(blockIdx.x) * 2 * a.cols;
  store_sums<kWidth, kTeam>(at, 0, a.cols, dweight, out);
  store_sums<kWidth, kTeam>(at, 0, a.cols, dbias, out + a.cols);
}

// dx and dresidual of one long row; where only h was used (dy is null), of a row of any length.
template <class T, class W, int kWidth>
__global__ void __launch_bounds__(kLoopThreads)
    layer_norm_backward_long_kernel(const LayerNormBackward a, const DropoutScale dropout) {
  const Place at = place<Team::kLoop>();
  const int64_t step = at.threads * kSumItems<T, kWidth>;
  const float mean = a.mean[at.row], rstd = a.rstd[at.row];
  float d[kSumItems<T, kWidth>] = {}, n[kSumItems<T, kWidth>], sums[2] = {}, unused[2] = {};
  for (int64_t start = 0; a.dy && start < a.cols; start += step) {
    load_gradients<T, kWidth>(a, at, start, mean, rstd, d, n);
    weigh<W, kWidth>(a, at, start, n, d, sums);
  }
  team_all<Team::kLoop>(sums, Add{});
  for (int64_t start = 0; start < a.cols; start += step) {
    if (a.dy) {
      load_gradients<T, kWidth>(a, at, start, mean, rstd, d, n);
      weigh<W, kWidth>(a, at, start, n, d, unused);
      project(rstd, sums[0] / a.cols, sums[1] / a.cols, n, d);
    }
    store_gradients<T, kWidth, true>(a, dropout, at, start, d);
  }
}

constexpr int kColumnThreads = 128;

// The sums of dweight and dbias of one block of rows, kWidth columns a thread; 0 where dy is null.
template <class T, int kWidth>
__global__ void __launch_bounds__(kColumnThreads, 1)
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
  store_whole<kWidth>(dweight, out);
  store_whole<kWidth>(dbias, out + a.cols);
}

// Where rows are long, or dy is null.
template <class T, class W, int kWidth>
void backward_in_two(const Context& context, const LayerNormBackward& a, int64_t blocks) {
  if (a.dx || a.dresidual) {
    launch("layer_norm_backward", context, layer_norm_backward_long_kernel<T, W, kWidth>, a.rows,
           kLoopThreads, 0, a, DropoutScale(a.dropout));
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
        aligned(a.weight.data) && aligned(a.bias.data);
    with_parameters<T>(a.weight.narrow, wide, [&]<class W, int kWidth>() {
      with_team<kItems, kMostThreads>(a.cols, [&]<Team kTeam>(int threads) {
        launch("layer_norm", context, layer_norm_forward_kernel<T, W, kWidth, kTeam>,
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
                      aligned(a.weight.data);
    with_parameters<T>(a.weight.narrow, wide, [&]<class W, int kWidth>() {
      with_team<kSumItems<T, kWidth>, kMostThreads>(a.cols, [&]<Team kTeam>(int threads) {
        if (kTeam == Team::kLoop || !a.dy) return backward_in_two<T, W, kWidth>(context, a, blocks);
        if constexpr (kTeam != Team::kLoop) {
          launch("layer_norm_backward", context, layer_norm_backward_kernel<T, W, kWidth, kTeam>, blocks,
                 threads, 0, a, DropoutScale(a.dropout));
        }
      });
    });
  });
  add_partials("layer_norm_backward", context, a.dtype, a.partial, blocks, a.cols, 2, {{a.dweight, a.dbias}});
}

}  // namespace fastlm
