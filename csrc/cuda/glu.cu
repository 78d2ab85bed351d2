// glu: y = act(gate) * up.
//
// A warp takes a piece of a row, 512 columns forward and 256 backward, in registers: one pass each way.
// Backward computes the activation again: dgate = dy * up * act'(gate), dup = dy * act(gate). Bound by bytes:
// gate and up (and dy) in, y (dgate and dup) out. Source: Shazeer, "GLU variants improve Transformer",
// https://arxiv.org/abs/2002.05202.
#include "../contract/glu.h"
#include "activations.cuh"
#include "launch.cuh"
#include "rows.cuh"

namespace fastlm {
namespace {

template <class T, class Act, int kWidth>
__global__ void __launch_bounds__(kWarpThreads) glu_kernel(const Glu a, int64_t pieces) {
  const PiecePlace at = piece_place(pieces);
  if (at.row >= a.rows) return;
  const T* gate = row_at<T>(a.gate, a.gate_stride, at.row);
  const T* up = row_at<T>(a.up, a.up_stride, at.row);
  T* y = row_at<T>(a.y, a.cols, at.row);
  Packed<kWidth, T> gates[kPieceItems / kWidth], ups[kPieceItems / kWidth];
  load_items<kWidth, kPieceItems>(gate, at, at.start, a.cols, gates);
  load_items<kWidth, kPieceItems>(up, at, at.start, a.cols, ups);
  for_items<kWidth, kPieceItems>(at, at.start, a.cols, [&](int i, int64_t col) {
    float g[kWidth], u[kWidth];
    unpack(gates[i / kWidth], g);
    unpack(ups[i / kWidth], u);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) g[k] = Act::value(g[k]) * u[k];
    store<kWidth>(g, y + col);
  });
}

constexpr int kGradientItems = 8;  // a thread of backward: three loads of 16 bytes of half precision
constexpr int64_t kGradientPiece = 32 * kGradientItems;

template <class T, class Act, int kWidth>
__global__ void __launch_bounds__(kWarpThreads) glu_backward_kernel(const GluBackward a, int64_t pieces) {
  const PiecePlace at = piece_place(pieces, kGradientPiece);
  if (at.row >= a.rows) return;
  const T* dy = row_at<T>(a.dy, a.dy_stride, at.row);
  const T* gate = row_at<T>(a.gate, a.gate_stride, at.row);
  const T* up = row_at<T>(a.up, a.up_stride, at.row);
  T* dgate = row_at<T>(a.dgate, a.cols, at.row);
  T* dup = row_at<T>(a.dup, a.cols, at.row);
  for_items<kWidth, kGradientItems>(at, at.start, a.cols, [&](int, int64_t col) {
    float d[kWidth], g[kWidth], u[kWidth];
    load<kWidth>(dy + col, d);
    load<kWidth>(gate + col, g);
    load<kWidth>(up + col, u);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      u[k] = Act::gradient(g[k], d[k] * u[k]);
      d[k] *= Act::value(g[k]);
    }
    if (dgate) store<kWidth>(u, dgate + col);
    if (dup) store<kWidth>(d, dup + col);
  });
}

}  // namespace

void glu(const Context& context, const Glu& a) {
  with_device_dtype(a.dtype, [&]<class T>() {
    const bool wide = wide_rows<T>(a.cols, {{a.gate, a.gate_stride}, {a.up, a.up_stride}, {a.y}});
    with_width<T>(wide, [&]<int kWidth>() {
      with_activation(a.activation, [&]<class Act>() {
        launch("glu", context, glu_kernel<T, Act, kWidth>, piece_blocks(a.rows, a.cols), kWarpThreads, 0, a,
               pieces_of(a.cols));
      });
    });
  });
}

void glu_backward(const Context& context, const GluBackward& a) {
  with_device_dtype(a.dtype, [&]<class T>() {
    const bool wide = wide_rows<T>(
        a.cols, {{a.dy, a.dy_stride}, {a.gate, a.gate_stride}, {a.up, a.up_stride}, {a.dgate}, {a.dup}});
    with_width<T>(wide, [&]<int kWidth>() {
      with_activation(a.activation, [&]<class Act>() {
        launch("glu_backward", context, glu_backward_kernel<T, Act, kWidth>,
               piece_blocks(a.rows, a.cols, kGradientPiece), kWarpThreads, 0, a,
               pieces_of(a.cols, kGradientPiece));
      });
    });
  });
}

}  // namespace fastlm
