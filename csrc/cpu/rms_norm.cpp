// rms_norm: a row stays in the first-level cache for its sum of squares and for its result. Bound by memory;
// floor: forward reads x (and residual) and writes y (and h), backward reads dy (and dh) and h and writes dx
// (and dresidual).
#include "../contract/rms_norm.h"

#include <cmath>

#include "norms.h"

namespace fastlm {
namespace {

// One row; weight is arranged for T.
template <class T>
[[gnu::flatten]] void forward_row(const RmsNormForward& a, const DropoutScale& scale, int64_t row,
                                  const float* weight) {
  const int64_t cols = a.cols;
  Sums squares;
  const T* h = normed_row<T>(a, scale, row, [&](const auto& v, int k) { squares.add(v * v, k); });
  const float rstd = 1.0f / std::sqrt(squares.total() / static_cast<float>(cols) + a.eps);
  a.rstd[row] = rstd;
  T* y = static_cast<T*>(a.y) + row * cols;
  const float offset = a.weight_offset;
  const bool stream = streams_rows<T>(a, a.y);
  over_vectors(cols, [&](int64_t j, auto which, int) {
    const auto w = load(weight + j, which) + offset;
    store_result(load(h + j, which) * rstd * w, y + j, which, stream);
  });
}

// One row of dx and dresidual, and its addition to the sums of dweight; weight and sums are arranged for T.
template <class T, bool kParameters>
[[gnu::flatten]] void backward_row(const RmsNormBackward& a, const DropoutScale& scale, int64_t row,
                                   const float* weight, float* sums) {
  const int64_t cols = a.cols;
  const T* dy = row_of<T>(a.dy, a.dy_stride, row);
  const T* h = row_of<T>(a.h, a.h_stride, row);
  if (!dy) return store_gradients<T>(a, scale, row, [](int64_t, auto which) { return zero(which); });
  const float offset = a.weight_offset, rstd = a.rstd[row];
  Sums products;
  over_vectors(cols, [&](int64_t j, auto which, int k) {
    const auto dn = load(dy + j, which) * (load(h + j, which) * rstd);
    products.add(dn * (load(weight + j, which) + offset), k);
    if constexpr (kParameters) store(load(sums + j, which) + dn, sums + j, which);
  });
  if (!a.dx && !a.dresidual) return;
  const float mean = products.total() / static_cast<float>(cols);
  store_gradients<T>(a, scale, row, [&](int64_t j, auto which) {
    const auto g = load(dy + j, which) * (load(weight + j, which) + offset);
    return (g - load(h + j, which) * rstd * mean) * rstd;
  });
}

}  // namespace

void rms_norm_forward(const Context& context, const RmsNormForward& a) {
  const DropoutScale scale(a.dropout);
  with_dtype(a.dtype, [&]<class Type>() {
    using T = Unordered<Type>;
    parallel_rows(context, a.rows, a.cols, [&](int64_t first, int64_t last) {
      const Floats memory = arranged_memory<T>(a.cols);
      const float* weight = arranged<T>(a.weight, a.cols, memory.get());
      for (int64_t row = first; row < last; ++row) forward_row<T>(a, scale, row, weight);
    });
  });
}

void rms_norm_backward(const Context& context, const RmsNormBackward& a) {
  const DropoutScale scale(a.dropout);
  const int64_t blocks = row_blocks(a.rows);
  with_dtype(a.dtype, [&]<class Type>() {
    using T = Unordered<Type>;
    with_bool(a.dweight != nullptr, [&]<bool kParameters>() {
      parallel_tasks(context, blocks, [&](int64_t block) {
        const Floats memory = arranged_memory<T>(a.cols);
        const float* weight = arranged<T>(a.weight, a.cols, memory.get());
        float* sums = kParameters ? a.partial + block * a.cols : nullptr;
        if (kParameters) std::memset(sums, 0, static_cast<size_t>(a.cols) * sizeof(float));
        const int64_t last = (block + 1) * a.rows / blocks;
        for (int64_t row = block * a.rows / blocks; row < last; ++row) {
          backward_row<T, kParameters>(a, scale, row, weight, sums);
        }
        if (kParameters) put_in_order<T>(sums, a.cols);
      });
    });
  });
  add_blocks(context, a.partial, a.cols, blocks, a.cols, a.dweight);
}

}  // namespace fastlm
