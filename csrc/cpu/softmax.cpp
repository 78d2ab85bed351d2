// softmax: a row is brought to float32 once and stays in cache for its maximum, its sum of exps and the
// division; a causal row is not read past its diagonal. Bound by memory; floor: forward reads x (and the
// mask) and writes y, backward reads dy and y and writes dx.
#include "../contract/softmax.h"

#include <cstring>
#include <memory>

#include "streaming.h"

namespace fastlm {
namespace {

int64_t attended(bool causal, int64_t row, int64_t cols) { return causal ? row % cols + 1 : cols; }

// How many columns a row's loops run over: a loop's last n % 16 columns would be done one by one, which costs
// a causal row a fifth of its time. finish_row overwrites what is computed past n.
int64_t whole_vectors(int64_t n, int64_t cols) { return std::min(cols, divide_up(n, 16) * 16); }

// Where `row` starts in the mask.
const uint8_t* mask_row(const Mask& mask, int64_t row) {
  int64_t offset = 0;
  for (int d = mask.dims - 1; d >= 0; --d) {
    offset += row % mask.sizes[d] * mask.strides[d];
    row /= mask.sizes[d];
  }
  return mask.data + offset;
}

// The first n columns of y, and anything in the others below `wide`; y may be x. keep: one byte a column. No
// NaN changes the maximum, and scale * x is computed anew for the exp, where it is fused with the
// subtraction: one rounding less.
template <bool kMasked>
void softmax_row(const float* x, const uint8_t* keep, float scale, int64_t n, int64_t wide, float* y) {
  float maximum = -INFINITY;
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < n; ++j) {
    const float s = kMasked ? select(keep[j] != 0, scale * x[j], -INFINITY) : scale * x[j];
    maximum = maximum < s ? s : maximum;
  }
  const float shift = maximum == -INFINITY ? 0.0f : maximum;  // -inf - -inf is NaN
#pragma omp simd
  for (int64_t j = 0; j < wide; ++j) {
    const float e = exp_nonpositive(scale * x[j] - shift);
    y[j] = kMasked ? select(keep[j] != 0, e, 0.0f) : e;
  }
  const float sum = lane_sum(n, [&](int64_t j) { return y[j]; });
  // 1 / sum and what its rounding lost: together as exact as a division, at a third of its time.
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  const float lost = sum == 0.0f ? 0.0f : inverse * std::fma(-inverse, sum, 1.0f);
#pragma omp simd
  for (int64_t j = 0; j < wide; ++j) y[j] = y[j] * inverse + y[j] * lost;
}

// The first n columns of dx, and anything in the others below `wide`; dx may be dy.
void gradient_row(const float* dy, const float* y, float scale, int64_t n, int64_t wide, float* dx) {
  const float sum = lane_sum(n, [&](int64_t j) { return dy[j] * y[j]; });
#pragma omp simd
  for (int64_t j = 0; j < wide; ++j) dx[j] = scale * y[j] * (dy[j] - sum);
}

// Where a row's results are computed: in the output itself, or in `buffer` on their way to finish_row.
template <class T>
float* results_row(T* out, float* buffer, bool stream) {
  return stream ? buffer : results_of(out, buffer);
}

// Writes the n columns that `values` holds, unless they are there already, and zeros after them.
template <class T>
void finish_row(float* values, int64_t n, int64_t cols, T* out, bool stream) {
  if (stream) {
    const int64_t end = round_up(n, kLanes);
    std::fill(values + n, values + end, 0.0f);
    for (int64_t j = 0; j < end; j += kLanes) stream_vector(load_vector(values + j), out + j);
    for (int64_t j = end; j < cols; j += kLanes) stream_vector(Vector{}, out + j);
    return;
  }
  if constexpr (!std::is_same_v<T, float>) store_row(values, n, out);
  std::memset(static_cast<void*>(out + n), 0, static_cast<size_t>(cols - n) * sizeof(T));
}

template <class T>
void forward_row(const SoftmaxForward& a, int64_t row, float* buffer, uint8_t* gathered, bool stream) {
  const int64_t stride = a.mask.col_stride;
  int64_t n = attended(a.causal, row, a.cols);
  const uint8_t* keep = a.mask.data ? mask_row(a.mask, row) : nullptr;
  if (keep && stride == 0) {
    n = *keep ? n : 0;
    keep = nullptr;
  } else if (keep && stride != 1) {
    for (int64_t j = 0; j < n; ++j) gathered[j] = keep[j * stride];
    keep = gathered;
  }
  T* y = static_cast<T*>(a.y) + row * a.cols;
  float* results = results_row(y, buffer, stream);
  const int64_t wide = whole_vectors(n, a.cols);
  const T* source = static_cast<const T*>(a.x) + row * a.x_stride;
  if (row + 1 < a.rows) prefetch_row(source + a.x_stride, n);
  const float* x = float_row(source, wide, buffer);
  if (keep) {
    softmax_row<true>(x, keep, a.scale, n, wide, results);
  } else {
    softmax_row<false>(x, keep, a.scale, n, wide, results);
  }
  finish_row(results, n, a.cols, y, stream);
}

template <class T>
void backward_row(const SoftmaxBackward& a, int64_t row, float* buffer, bool stream) {
  const int64_t n = attended(a.causal, row, a.cols), wide = whole_vectors(n, a.cols);
  const T* dy_source = static_cast<const T*>(a.dy) + row * a.dy_stride;
  const T* y_source = static_cast<const T*>(a.y) + row * a.y_stride;
  if (row + 1 < a.rows) {
    prefetch_row(dy_source + a.dy_stride, n);
    prefetch_row(y_source + a.y_stride, n);
  }
  const float* dy = float_row(dy_source, wide, buffer);
  const float* y = float_row(y_source, wide, buffer + a.cols);
  T* dx = static_cast<T*>(a.dx) + row * a.cols;
  float* results = results_row(dx, buffer, stream);
  gradient_row(dy, y, a.scale, n, wide, results);
  finish_row(results, n, a.cols, dx, stream);
}

}  // namespace

void softmax_forward(const Context& context, const SoftmaxForward& a) {
  const bool gathers = a.mask.data && a.mask.col_stride > 1;
  with_dtype(a.dtype, [&]<class T>() {
    const bool stream = streams_rows<T>(a, a.y);
    parallel_rows(context, a.rows, a.cols, [&](int64_t first, int64_t last) {
      const size_t cols = static_cast<size_t>(a.cols);
      const std::unique_ptr<float[]> buffer(new float[std::is_same_v<T, float> && !stream ? 0 : cols]);
      const std::unique_ptr<uint8_t[]> gathered(new uint8_t[gathers ? cols : 0]);
      for (int64_t row = first; row < last; ++row) {
        forward_row<T>(a, row, buffer.get(), gathered.get(), stream);
      }
    });
  });
}

void softmax_backward(const Context& context, const SoftmaxBackward& a) {
  with_dtype(a.dtype, [&]<class T>() {
    const bool stream = streams_rows<T>(a, a.dx);
    parallel_rows(context, a.rows, a.cols, [&](int64_t first, int64_t last) {
      const size_t cols = static_cast<size_t>(a.cols);
      const std::unique_ptr<float[]> buffer(new float[std::is_same_v<T, float> && !stream ? 0 : 2 * cols]);
      for (int64_t row = first; row < last; ++row) {
        backward_row<T>(a, row, buffer.get(), stream);
      }
    });
  });
}

}  // namespace fastlm
