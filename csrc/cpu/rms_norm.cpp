// rms_norm: a row is brought to float32 once, stays in cache for its sum of squares and is written once.
// Bound by memory; floor: forward reads x (and residual) and writes y (and h), backward reads dy (and dh) and
// h and writes dx (and dresidual).
#include "../contract/rms_norm.h"

#include <cmath>
#include <cstring>
#include <memory>

#include "norms.h"

namespace fastlm {
namespace {

template <class T>
[[gnu::flatten]] void forward_row(const RmsNormForward& a, const DropoutScale& scale, int64_t row,
                                  float* buffer) {
  const int64_t cols = a.cols;
  Vector squares[kSums] = {};
  const float* h = normed_row<T>(a, scale, row, buffer, [&](Vector v, int k) { squares[k] += v * v; });
  const float rstd = 1.0f / std::sqrt(total(squares) / static_cast<float>(cols) + a.eps);
  a.rstd[row] = rstd;
  T* y = static_cast<T*>(a.y) + row * cols;
  const float *weight = a.weight, offset = a.weight_offset;
  const bool stream = streams_rows<T>(a, a.y);
  over_vectors(cols, [&](int64_t j, auto which, int) {
    const Vector w = load(weight + j, which) + offset;
    store_result(load(h + j, which) * rstd * w, y + j, which, stream);
  });
}

// One row of dx and dresidual, and its addition to the sums of dweight (null where that is not wanted).
template <class T, bool kParameters>
[[gnu::flatten]] void backward_row(const RmsNormBackward& a, const DropoutScale& scale, int64_t row,
                                   float* sums) {
  const int64_t cols = a.cols;
  const T* dy = row_of<T>(a.dy, a.dy_stride, row);
  const T* h = row_of<T>(a.h, a.h_stride, row);
  if (!dy) return store_gradients<T>(a, scale, row, [](int64_t, auto) { return Vector{}; });
  const float *weight = a.weight, offset = a.weight_offset, rstd = a.rstd[row];
  Vector products[kSums] = {};
  over_vectors(cols, [&](int64_t j, auto which, int k) {
    const Vector dn = load(dy + j, which) * (load(h + j, which) * rstd);
    products[k] += dn * (load(weight + j, which) + offset);
    if constexpr (kParameters) store(load(sums + j, which) + dn, sums + j, which);
  });
  if (!a.dx && !a.dresidual) return;
  const float mean = total(products) / static_cast<float>(cols);
  store_gradients<T>(a, scale, row, [&](int64_t j, auto which) {
    const Vector g = load(dy + j, which) * (load(weight + j, which) + offset);
    return rstd * (g - load(h + j, which) * rstd * mean);
  });
}

}  // namespace

void rms_norm_forward(const Context& context, const RmsNormForward& a) {
  const DropoutScale scale(a.dropout);
  with_dtype(a.dtype, [&]<class T>() {
    parallel_rows(context, a.rows, a.cols, [&](int64_t first, int64_t last) {
      const std::unique_ptr<float[]> buffer(new float[static_cast<size_t>(a.cols)]);
      for (int64_t row = first; row < last; ++row) forward_row<T>(a, scale, row, buffer.get());
    });
  });
}

void rms_norm_backward(const Context& context, const RmsNormBackward& a) {
  const DropoutScale scale(a.dropout);
  const int64_t blocks = row_blocks(a.rows);
  with_dtype(a.dtype, [&]<class T>() {
    with_bool(a.dweight != nullptr, [&]<bool kParameters>() {
      parallel_tasks(context, blocks, [&](int64_t block) {
        float* sums = kParameters ? a.partial + block * a.cols : nullptr;
        if (kParameters) std::memset(sums, 0, static_cast<size_t>(a.cols) * sizeof(float));
        const int64_t last = (block + 1) * a.rows / blocks;
        for (int64_t row = block * a.rows / blocks; row < last; ++row) {
          backward_row<T, kParameters>(a, scale, row, sums);
        }
      });
    });
  });
  add_blocks(context, a.partial, a.cols, blocks, a.cols, a.dweight);
}

}  // namespace fastlm
