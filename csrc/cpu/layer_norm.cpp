// layer_norm: a row is brought to float32 once, stays in cache for its two sums (mean, then the squares
// around it) and is written once. Bound by memory; floor: forward reads x (and residual) and writes y (and
// h), backward reads dy (and dh) and h and writes dx (and dresidual).
#include "../contract/layer_norm.h"

#include <cstring>
#include <memory>

#include "norms.h"

namespace fastlm {
namespace {

struct Statistics {
  float mean, rstd;
};

// The second pass also sums h - mean: that corrects the first mean's rounding, which a large offset makes
// large. Sums in many lanes: in one vector each addition waits for the one before, a quarter of the forward's
// time.
Statistics statistics(const float* h, int64_t cols, float eps) {
  const float n = static_cast<float>(cols);
  const float mean = lane_sum<32>(cols, [&](int64_t j) { return h[j]; }) / n;
  constexpr int kLanes = 16;
  float rests[kLanes] = {}, squared[kLanes] = {};
  const int64_t whole = cols - cols % kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const float d = h[j + lane] - mean;
      rests[lane] += d;
      squared[lane] += d * d;
    }
  }
  for (int64_t j = whole; j < cols; ++j) {
    const float d = h[j] - mean;
    rests[j - whole] += d;
    squared[j - whole] += d * d;
  }
  const float correction = add_lanes(rests) / n;
  const float variance = add_lanes(squared) / n - correction * correction;
  return {mean + correction, 1.0f / std::sqrt((variance < 0 ? 0 : variance) + eps)};
}

template <class T>
void normalise_row(const float* h, Statistics s, const float* weight, const float* bias, int64_t cols, T* y) {
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) {
    y[j] = from_float<T>((h[j] - s.mean) * s.rstd * weight[j] + bias[j]);
  }
}

// One row of dx and dresidual, and its addition to the sums of dweight and dbias.
template <class T, bool kParameters>
void backward_row(const LayerNormBackward& a, const DropoutScale& scale, int64_t row, float* buffer,
                  float* sums) {
  const int64_t cols = a.cols;
  const T* dy = row_of<T>(a.dy, a.dy_stride, row);
  const T* h = row_of<T>(a.h, a.h_stride, row);
  const float* weight = a.weight;
  const float mean = a.mean[row], rstd = a.rstd[row];
  float g_sum = 0, gn_sum = 0;
  if (dy) {
    float *dweight = sums, *dbias = sums + cols;
#pragma omp simd reduction(+ : g_sum, gn_sum)
    for (int64_t j = 0; j < cols; ++j) {
      const float d = to_float(dy[j]);
      const float n = (to_float(h[j]) - mean) * rstd;
      const float g = d * weight[j];
      buffer[j] = g;  // stored, so that g - g_mean is exact where the row is constant: no fused multiply-add
      g_sum += g;
      gn_sum += g * n;
      if constexpr (kParameters) {
        dweight[j] += d * n;
        dbias[j] += d;
      }
    }
  }
  if (!a.dx && !a.dresidual) return;
  const float g_mean = g_sum / static_cast<float>(cols), gn_mean = gn_sum / static_cast<float>(cols);
  if (dy) {
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const float n = (to_float(h[j]) - mean) * rstd;
      buffer[j] = rstd * (buffer[j] - g_mean - n * gn_mean);
    }
  } else {
    std::memset(buffer, 0, static_cast<size_t>(cols) * sizeof(float));
  }
  store_gradients<T>(a, scale, row, buffer);
}

}  // namespace

void layer_norm_forward(const Context& context, const LayerNormForward& a) {
  const DropoutScale scale(a.dropout);
  with_dtype(a.dtype, [&]<class T>() {
    parallel_rows(context, a.rows, a.cols, [&](int64_t first, int64_t last) {
      const std::unique_ptr<float[]> buffer(new float[static_cast<size_t>(a.cols)]);
      for (int64_t row = first; row < last; ++row) {
        const float* h = normed_row<T>(a, scale, row, buffer.get());
        const Statistics s = statistics(h, a.cols, a.eps);
        a.mean[row] = s.mean;
        a.rstd[row] = s.rstd;
        normalise_row<T>(h, s, a.weight, a.bias, a.cols, static_cast<T*>(a.y) + row * a.cols);
      }
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
        const std::unique_ptr<float[]> buffer(new float[static_cast<size_t>(a.cols)]);
        float* sums = kParameters ? a.partial + 2 * block * a.cols : nullptr;
        if (kParameters) std::memset(sums, 0, static_cast<size_t>(2 * a.cols) * sizeof(float));
        const int64_t last = (block + 1) * a.rows / blocks;
        for (int64_t row = block * a.rows / blocks; row < last; ++row) {
          backward_row<T, kParameters>(a, scale, row, buffer.get(), sums);
        }
      });
    });
  });
  add_blocks(context, a.partial, 2 * a.cols, blocks, a.cols, a.dweight);
  add_blocks(context, parameters ? a.partial + a.cols : nullptr, 2 * a.cols, blocks, a.cols, a.dbias);
}

}  // namespace fastlm
