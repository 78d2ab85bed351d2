// dropout_add: y = dropout(x) + residual. Its backward is the same kernel without a residual.
//
// A warp takes a piece of 512 columns of a row, 16 a thread in registers: one pass. Bound by bytes: x (and
// residual) in, y out; Philox costs 40 integer instructions for 4 elements. Source: Srivastava et al.,
// https://jmlr.org/papers/v15/srivastava14a.html.
#include "../contract/dropout_add.h"
#include "launch.cuh"
#include "philox.cuh"
#include "rows.cuh"

namespace fastlm {
namespace {

template <class T, int kWidth>
__global__ void __launch_bounds__(kWarpThreads)
    dropout_add_kernel(const DropoutAdd a, const DropoutScale dropout, int64_t pieces) {
  const PiecePlace at = piece_place(pieces);
  if (at.row >= a.rows) return;
  const T* x = row_at<T>(a.x, a.x_stride, at.row);
  const T* residual = row_at<T>(a.residual, a.residual_stride, at.row);
  T* y = row_at<T>(a.y, a.cols, at.row);
  Packed<kWidth, T> xs[kPieceItems / kWidth], residuals[kPieceItems / kWidth];
  load_items<kWidth, kPieceItems>(x, at, at.start, a.cols, xs);
  if (residual) load_items<kWidth, kPieceItems>(residual, at, at.start, a.cols, residuals);
  for_items<kWidth, kPieceItems>(at, at.start, a.cols, [&](int i, int64_t col) {
    float values[kWidth], more[kWidth];
    unpack(xs[i / kWidth], values);
    if (dropout.seed) {
      dropout.columns<kWidth>(at.row, col, more);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) values[k] = __fmul_rn(values[k], more[k]);  // rounded, as on a CPU
    }
    if (residual) {
      unpack(residuals[i / kWidth], more);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) values[k] = __fadd_rn(values[k], more[k]);
    }
    store<kWidth>(values, y + col);
  });
}

}  // namespace

void dropout_add(const Context& context, const DropoutAdd& a) {
  with_device_dtype(a.dtype, [&]<class T>() {
    const bool wide = wide_rows<T>(a.cols, {{a.x, a.x_stride}, {a.residual, a.residual_stride}, {a.y}});
    with_width<T>(wide, [&]<int kWidth>() {
      launch("dropout_add", context, dropout_add_kernel<T, kWidth>, piece_blocks(a.rows, a.cols),
             kWarpThreads, 0, a, DropoutScale(a.dropout), pieces_of(a.cols));
    });
  });
}

}  // namespace fastlm
