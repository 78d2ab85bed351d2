// glu: one pass, bound by memory (floor: forward reads gate and up and writes y, backward reads dy, gate and
// up and writes dgate and dup). A row is worked on in pieces that stay in the first-level cache; backward
// computes the activation again.
#include "../contract/glu.h"

#include <algorithm>

#include "activations.h"
#include "rows.h"

namespace fastlm {
namespace {

constexpr int64_t kPiece = 1024;  // columns: 4 KB of float32

// Columns [begin, begin + n) of a row. float32 is read and written in place, without the buffers.
template <class T, class Act>
void forward_piece(const Glu& a, int64_t row, int64_t begin, int64_t n) {
  float gate_buffer[kPiece], up_buffer[kPiece];
  const float* gate = float_row(static_cast<const T*>(a.gate) + row * a.gate_stride + begin, n, gate_buffer);
  const float* up = float_row(static_cast<const T*>(a.up) + row * a.up_stride + begin, n, up_buffer);
  T* y = static_cast<T*>(a.y) + row * a.cols + begin;
  float* values = results_of(y, gate_buffer);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) values[j] = Act::value(gate[j]) * up[j];
  if constexpr (!std::is_same_v<T, float>) store_row(values, n, y);
}

template <class T, class Act>
void backward_piece(const GluBackward& a, int64_t row, int64_t begin, int64_t n) {
  float dy_buffer[kPiece], gate_buffer[kPiece], up_buffer[kPiece];
  const float* dy = float_row(static_cast<const T*>(a.dy) + row * a.dy_stride + begin, n, dy_buffer);
  const float* gate = float_row(static_cast<const T*>(a.gate) + row * a.gate_stride + begin, n, gate_buffer);
  const float* up = float_row(static_cast<const T*>(a.up) + row * a.up_stride + begin, n, up_buffer);
  T* dgate = a.dgate ? static_cast<T*>(a.dgate) + row * a.cols + begin : nullptr;
  T* dup = a.dup ? static_cast<T*>(a.dup) + row * a.cols + begin : nullptr;
  float* gate_grads = dgate ? results_of(dgate, gate_buffer) : gate_buffer;
  float* up_grads = dup ? results_of(dup, up_buffer) : up_buffer;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float d = dy[j], g = gate[j], u = up[j];
    gate_grads[j] = Act::gradient(g, d * u);
    up_grads[j] = d * Act::value(g);
  }
  if constexpr (!std::is_same_v<T, float>) {
    if (dgate) store_row(gate_grads, n, dgate);
    if (dup) store_row(up_grads, n, dup);
  }
}

// Runs f(row, begin, n) over pieces of rows: long rows are cut too, for a 1-d tensor is one row.
template <class F>
void over_pieces(const Context& context, int64_t rows, int64_t cols, const F& f) {
  const int64_t pieces = divide_up(cols, kPiece);
  parallel_rows(context, rows * pieces, std::min(cols, kPiece), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % pieces * kPiece;
      f(i / pieces, begin, std::min(kPiece, cols - begin));
    }
  });
}

}  // namespace

void glu(const Context& context, const Glu& a) {
  with_dtype(a.dtype, [&]<class T>() {
    with_activation(a.activation, [&]<class Act>() {
      over_pieces(context, a.rows, a.cols,
                  [&](int64_t row, int64_t begin, int64_t n) { forward_piece<T, Act>(a, row, begin, n); });
    });
  });
}

void glu_backward(const Context& context, const GluBackward& a) {
  with_dtype(a.dtype, [&]<class T>() {
    with_activation(a.activation, [&]<class Act>() {
      over_pieces(context, a.rows, a.cols,
                  [&](int64_t row, int64_t begin, int64_t n) { backward_piece<T, Act>(a, row, begin, n); });
    });
  });
}

}  // namespace fastlm
