// layer_norm: a row is brought to float32 once, stays in cache for its two sums (mean, then the squares
// around it) and is written once. Bound by memory; floor: forward reads x (and residual) and writes y (and
// h), backward reads dy (and dh) and h and writes dx (and dresidual).
#include "../contract/layer_norm.h"

#include <cstring>
#include <memory>

#include "norms.h"

namespace fastlm {
namespace {

// One row. The second pass over h also sums h - mean: that corrects the first mean's rounding, which a large
// offset makes large.
template <class T>
[[gnu::flatten]] void forward_row(const LayerNormForward& a, const DropoutScale& scale, int64_t row,
                                  float* buffer) {
  const int64_t cols = a.cols;
  const float n = static_cast<float>(cols);
  Vector sums[kSums] = {}, rests[kSums] = {}, squares[kSums] = {};
  const float* h = normed_row<T>(a, scale, row, buffer, [&](Vector v, int k) { sums[k] += v; });
  const float first_mean = total(sums) / n;
  over_vectors(cols, [&](int64_t j, auto which, int k) {
    const Vector d = only(which, load(h + j, which) - first_mean);
    rests[k] += d;
    squares[k] += d * d;
  });
  const float correction = total(rests) / n;
  const float variance = total(squares) / n - correction * correction;
  const float mean = first_mean + correction, rstd = 1.0f / std::sqrt((variance < 0 ? 0 : variance) + a.eps);
  a.mean[row] = mean;
  a.rstd[row] = rstd;
  T* y = static_cast<T*>(a.y) + row * cols;
  const float *weight = a.weight, *bias = a.bias;
  const bool stream = streams_rows<T>(a, a.y);
  over_vectors(cols, [&](int64_t j, auto which, int) {
    const Vector normed = (load(h + j, which) - mean) * rstd;
    store_result(normed * load(weight + j, which) + load(bias + j, which), y + j, which, stream);
  });
}

// One row of dx and dresidual, and its addition to the sums of dweight and dbias.
template <class T, bool kParameters>
[[gnu::flatten]] void backward_row(const LayerNormBackward& a, const DropoutScale& scale, int64_t row,
                                   float* sums) {
  const int64_t cols = a.cols;
  const T* dy = row_of<T>(a.dy, a.dy_stride, row);
  const T* h = row_of<T>(a.h, a.h_stride, row);
  if (!dy) return store_gradients<T>(a, scale, row, [](int64_t, auto) { return Vector{}; });
  const float *weight = a.weight, mean = a.mean[row], rstd = a.rstd[row];
  float *dweight = sums, *dbias = sums + cols;
  Vector g_sums[kSums] = {}, gn_sums[kSums] = {};
  over_vectors(cols, [&](int64_t j, auto which, int k) {
    const Vector d = load(dy + j, which), n = (load(h + j, which) - mean) * rstd;
    const Vector g = rounded(d * load(weight + j, which));
    g_sums[k] += g;
    gn_sums[k] += g * n;
    if constexpr (kParameters) {
      store(load(dweight + j, which) + d * n, dweight + j, which);
      store(load(dbias + j, which) + d, dbias + j, which);
    }
  });
  if (!a.dx && !a.dresidual) return;
  const float g_mean = total(g_sums) / static_cast<float>(cols);
  const float gn_mean = total(gn_sums) / static_cast<float>(cols);
  store_gradients<T>(a, scale, row, [&](int64_t j, auto which) {
    const Vector n = (load(h + j, which) - mean) * rstd;
    const Vector g = rounded(load(dy + j, which) * load(weight + j, which));  // g - g_mean is exact
    return rstd * (g - g_mean - n * gn_mean);
  });
}

}  // namespace

void layer_norm_forward(const Context& context, const LayerNormForward& a) {
  const DropoutScale scale(a.dropout);
  with_dtype(a.dtype, [&]<class T>() {
    parallel_rows(context, a.rows, a.cols, [&](int64_t first, int64_t last) {
      const std::unique_ptr<float[]> buffer(new float[static_cast<size_t>(a.cols)]);
      for (int64_t row = first; row < last; ++row) forward_row<T>(a, scale, row, buffer.get());
    });
  });
}

void layer_norm_backward(const Context& context, const LayerNormBackward& a) {
  const DropoutScale scale(a.dropout);
  const bool parameters = a.dweight || a.dbias;
  const int64_t blocks = row_blocks(a.rows);
  with_dtype(a.dtype, [&]<class T>() {
    with_bool(parameters, [&]<bool kParameters>() {
      parallel_tasks(context, blocks, [&](int64_t block) {
        float* sums = kParameters ? a.partial + 2 * block * a.cols : nullptr;
        if (kParameters) std::memset(sums, 0, static_cast<size_t>(2 * a.cols) * sizeof(float));
        const int64_t last = (block + 1) * a.rows / blocks;
        for (int64_t row = block * a.rows / blocks; row < last; ++row) {
          backward_row<T, kParameters>(a, scale, row, sums);
        }
      });
    });
  });
  add_blocks(context, a.partial, 2 * a.cols, blocks, a.cols, a.dweight);
  add_blocks(context, parameters ? a.partial + a.cols : nullptr, 2 * a.cols, blocks, a.cols, a.dbias);
}

}  // namespace fastlm
