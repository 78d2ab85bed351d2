// layer_norm: a row stays in the first-level cache for its two sums (mean, then the squares around it) and
// for its result. Bound by memory; floor: forward reads x (and residual) and writes y (and
// h), backward reads dy (and dh) and h and writes dx (and dresidual).
#include "../contract/layer_norm.h"

#include "norms.h"

namespace fastlm {
namespace {

// One row; weight and bias are arranged for T. The second pass over h also sums h - mean: that corrects the
// first mean's rounding, which a large offset makes large.
template <class T>
[[gnu::flatten]] void forward_row(const LayerNormForward& a, const DropoutScale& scale, int64_t row,
                                  const float* weight, const float* bias) {
  const int64_t cols = a.cols;
  const float n = static_cast<float>(cols);
  Sums sums, rests, squares;
  const T* h = normed_row<T>(a, scale, row, [&](const auto& v, int k) { sums.add(v, k); });
  const float first_mean = sums.total() / n;
  over_vectors(cols, [&](int64_t j, auto which, int k) {
    const auto d = only(which, load(h + j, which) - first_mean);
    rests.add(d, k);
    squares.add(d * d, k);
  });
  const float correction = rests.total() / n;
  const float variance = squares.total() / n - correction * correction;
  const float mean = first_mean + correction, rstd = 1.0f / std::sqrt((variance < 0 ? 0 : variance) + a.eps);
  a.mean[row] = mean;
  a.rstd[row] = rstd;
  T* y = static_cast<T*>(a.y) + row * cols;
  const bool stream = streams_rows<T>(a, a.y);
  over_vectors(cols, [&](int64_t j, auto which, int) {
    const auto normed = (load(h + j, which) - mean) * rstd;
    store_result(normed * load(weight + j, which) + load(bias + j, which), y + j, which, stream);
  });
}

// One row of dx and dresidual, and its addition to the sums of dweight and dbias; weight and sums are
// arranged for T.
template <class T, bool kParameters>
[[gnu::flatten]] void backward_row(const LayerNormBackward& a, const DropoutScale& scale, int64_t row,
                                   const float* weight, float* sums) {
  const int64_t cols = a.cols;
  const T* dy = row_of<T>(a.dy, a.dy_stride, row);
  const T* h = row_of<T>(a.h, a.h_stride, row);
  if (!dy) return store_gradients<T>(a, scale, row, [](int64_t, auto which) { return zero(which); });
  const float mean = a.mean[row], rstd = a.rstd[row];
  float *dweight = sums, *dbias = sums + cols;
  Sums g_sums, gn_sums;
  over_vectors(cols, [&](int64_t j, auto which, int k) {
    const auto d = load(dy + j, which), n = (load(h + j, which) - mean) * rstd;
    const auto g = rounded(d * load(weight + j, which));
    g_sums.add(g, k);
    gn_sums.add(g * n, k);
    if constexpr (kParameters) {
      store(load(dweight + j, which) + d * n, dweight + j, which);
      store(load(dbias + j, which) + d, dbias + j, which);
    }
  });
  if (!a.dx && !a.dresidual) return;
  const float g_mean = g_sums.total() / static_cast<float>(cols);
  const float gn_mean = gn_sums.total() / static_cast<float>(cols);
  store_gradients<T>(a, scale, row, [&](int64_t j, auto which) {
    const auto n = (load(h + j, which) - mean) * rstd;
    const auto g = rounded(load(dy + j, which) * load(weight + j, which));  // g - g_mean is exact
    return (g - g_mean - n * gn_mean) * rstd;
  });
}

}  // namespace

void layer_norm_forward(const Context& context, const LayerNormForward& a) {
  const DropoutScale scale(a.dropout);
  with_dtype(a.dtype, [&]<class Type>() {
    using T = Unordered<Type>;
    parallel_rows(context, a.rows, a.cols, [&](int64_t first, int64_t last) {
      const Floats memory = arranged_memory<T>(2 * a.cols);
      const float* weight = arranged<T>(a.weight, a.cols, memory.get());
      const float* bias = arranged<T>(a.bias, a.cols, memory.get() + a.cols);
      for (int64_t row = first; row < last; ++row) forward_row<T>(a, scale, row, weight, bias);
    });
  });
}

void layer_norm_backward(const Context& context, const LayerNormBackward& a) {
  const DropoutScale scale(a.dropout);
  const bool parameters = a.dweight || a.dbias;
  const int64_t blocks = row_blocks(a.rows);
  with_dtype(a.dtype, [&]<class Type>() {
    using T = Unordered<Type>;
    with_bool(parameters, [&]<bool kParameters>() {
      parallel_tasks(context, blocks, [&](int64_t block) {
        const Floats memory = arranged_memory<T>(a.cols);
        const float* weight = arranged<T>(a.weight, a.cols, memory.get());
        float* sums = kParameters ? a.partial + 2 * block * a.cols : nullptr;
        if (kParameters) std::memset(sums, 0, static_cast<size_t>(2 * a.cols) * sizeof(float));
        const int64_t last = (block + 1) * a.rows / blocks;
        for (int64_t row = block * a.rows / blocks; row < last; ++row) {
          backward_row<T, kParameters>(a, scale, row, weight, sums);
        }
        if (kParameters) put_in_order<T>(sums, a.cols), put_in_order<T>(sums + a.cols, a.cols);
      });
    });
  });
  add_blocks(context, a.partial, 2 * a.cols, blocks, a.cols, a.dweight);
  add_blocks(context, parameters ? a.partial + a.cols : nullptr, 2 * a.cols, blocks, a.cols, a.dbias);
}

}  // namespace fastlm
