// bias_act: y = dropout(act(x + bias)).
//
// Forward: a warp takes a piece of 512 columns of a row, 16 a thread in registers. Backward computes the
// activation again: dx = act'(x + bias) * dropout's factor * dy; a block goes down a block of rows in a band
// of 256 columns, each of its warps with rows of its own, and keeps dbias = sum(dx) in registers;
// add_partials adds the blocks up in order. Bound by bytes: x (and dy) in, y (dx) out; 8 bytes a column and
// block to dbias. Source: Hendrycks, Gimpel, https://arxiv.org/abs/1606.08415.
#include <algorithm>

#include "../contract/bias_act.h"
#include "activations.cuh"
#include "launch.cuh"
#include "parameters.cuh"
#include "philox.cuh"
#include "sums.cuh"

namespace fastlm {
namespace {

// x + bias.
template <class W, int kWidth, class T>
__device__ void biased(const Packed<kWidth, T>& x, const Parameter& bias, int64_t col, float (&z)[kWidth]) {
  unpack(x, z);
  if (!bias.data) return;
  float more[kWidth];
  load_parameter<W>(bias, col, more);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) z[k] += more[k];
}

template <int kWidth>
__device__ void drop(const DropoutScale& dropout, int64_t row, int64_t col, float (&values)[kWidth]) {
  if (!dropout.seed) return;
  float scales[kWidth];
  dropout.columns<kWidth>(row, col, scales);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) values[k] *= scales[k];
}

template <class T, class W, class Act, int kWidth>
__global__ void __launch_bounds__(kWarpThreads)
    bias_act_kernel(const BiasAct a, const DropoutScale dropout, int64_t pieces) {
  const PiecePlace at = piece_place(pieces);
  if (at.row >= a.rows) return;
  const T* x = row_at<T>(a.x, a.x_stride, at.row);
  T* y = row_at<T>(a.y, a.cols, at.row);
  Packed<kWidth, T> loaded[kPieceItems / kWidth];
  load_items<kWidth, kPieceItems>(x, at, at.start, a.cols, loaded);
  for_items<kWidth, kPieceItems>(at, at.start, a.cols, [&](int i, int64_t col) {
    float z[kWidth];
    biased<W>(loaded[i / kWidth], a.bias, col, z);
#pragma unroll
    for (float& v : z) v = Act::value(v);
    drop(dropout, at.row, col, z);
    store<kWidth>(z, y + col);
  });
}

constexpr int kGradientItems = 8;  // a thread of backward: two loads of 16 bytes of half precision
constexpr int64_t kGradientPiece = 32 * kGradientItems;
constexpr int kResident =
    8;  // blocks of a multiprocessor: 2048 are two rounds of an H100, with 7 they are three

// A block of rows in one of the `pieces` of its columns: dx, and its sums in partial.
template <class T, class W, class Act, int kWidth>
__global__ void __launch_bounds__(kWarpThreads, kWidth == 1 ? 1 : kResident)
    bias_act_backward_kernel(const BiasActBackward a, const DropoutScale dropout, int64_t pieces,
                             int64_t blocks) {
  const Place at{0, static_cast<int>(threadIdx.x % 32), 32};
  const int64_t block = blockIdx.x / pieces, start = blockIdx.x % pieces * kGradientPiece;
  const RowRange range = rows_of_block(a.rows, block, blocks);
  float sums[kGradientItems] = {};
  for (int64_t row = range.first + threadIdx.x / 32; row < range.last; row += kWarpThreads / 32) {
    const T* x = row_at<T>(a.x, a.x_stride, row);
    const T* dy = row_at<T>(a.dy, a.dy_stride, row);
    T* dx = row_at<T>(a.dx, a.cols, row);
    Packed<kWidth, T> xs[kGradientItems / kWidth], dys[kGradientItems / kWidth];
    load_items<kWidth, kGradientItems>(x, at, start, a.cols, xs);
    load_items<kWidth, kGradientItems>(dy, at, start, a.cols, dys);
    for_items<kWidth, kGradientItems>(at, start, a.cols, [&](int i, int64_t col) {
      float z[kWidth], d[kWidth];
      biased<W>(xs[i / kWidth], a.bias, col, z);
      unpack(dys[i / kWidth], d);
      drop(dropout, row, col, d);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        d[k] = Act::gradient(z[k], d[k]);
        sums[i + k] += d[k];
      }
      if (dx) store<kWidth>(d, dx + col);
    });
  }
  if (!a.partial) return;
  store_sums<kWidth, Team::kWarp>(at, start, a.cols, sums, a.partial + block * a.cols);
}

// Blocks of rows: with several bands of columns fewer than row_blocks fill a GPU, and a block's sums cost 8
// bytes a column. 2048 blocks of 128 threads are what an H100 holds at once.
int64_t blocks_of(const BiasActBackward& a) {
  if (!a.dbias.data) return (a.rows + 7) / 8;
  return std::clamp<int64_t>(2048 / pieces_of(std::max<int64_t>(a.cols, 1), kGradientPiece), 1,
                             row_blocks(a.rows));
}

}  // namespace

void bias_act(const Context& context, const BiasAct& a) {
  with_device_dtype(a.dtype, [&]<class T>() {
    const bool wide = wide_rows<T>(a.cols, {{a.x, a.x_stride}, {a.y}}) && aligned(a.bias.data);
    with_parameters<T>(a.bias.narrow, wide, [&]<class W, int kWidth>() {
      with_activation(a.activation, [&]<class Act>() {
        launch("bias_act", context, bias_act_kernel<T, W, Act, kWidth>, piece_blocks(a.rows, a.cols),
               kWarpThreads, 0, a, DropoutScale(a.dropout), pieces_of(a.cols));
      });
    });
  });
}

void bias_act_backward(const Context& context, const BiasActBackward& a) {
  const int64_t blocks = blocks_of(a), pieces = pieces_of(a.cols, kGradientPiece);
  with_device_dtype(a.dtype, [&]<class T>() {
    const bool wide = wide_rows<T>(a.cols, {{a.dy, a.dy_stride}, {a.x, a.x_stride}, {a.dx}}) &&
                      aligned(a.bias.data) && aligned(a.partial);
    with_parameters<T>(a.bias.narrow, wide, [&]<class W, int kWidth>() {
      with_activation(a.activation, [&]<class Act>() {
        launch("bias_act_backward", context, bias_act_backward_kernel<T, W, Act, kWidth>, blocks * pieces,
               kWarpThreads, 0, a, DropoutScale(a.dropout), pieces, blocks);
      });
    });
  });
  add_partials("bias_act_backward", context, a.dtype, a.partial, blocks, a.cols, 1, {{a.dbias}});
}

}  // namespace fastlm
