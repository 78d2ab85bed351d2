// cross_entropy: forward reads a row once, piece by piece: while a piece is in the first-level cache its
// maximum and its sum of exps join the row's (Milakov, Gimelshein, "Online normalizer calculation for
// softmax", https://arxiv.org/abs/1805.02867). Backward is one pass. Bound by memory and exp; floor: forward
// reads logits, backward reads logits and writes dlogits.
#include "../contract/cross_entropy.h"

#include <cstring>

#include "rows.h"

namespace fastlm {
namespace {

constexpr int64_t kPiece = 2048;  // columns: 8 KB of float32; short sums keep the rounding error small

// Of the columns read so far: their maximum; sums of exp(x - shift) and of x - shift. shift is the maximum,
// or 0 while that is -inf: -inf - -inf is NaN.
struct RowSums {
  float maximum = -INFINITY, shift = 0, exps = 0, shifted = 0;
};

template <bool kShifted>
void add_piece(const float* x, int64_t before, int64_t n, RowSums& row) {
  float maximum = row.maximum;
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < n; ++j) maximum = maximum < x[j] ? x[j] : maximum;
  if (maximum > row.maximum) {
    if (row.maximum != -INFINITY) row.exps *= exp(row.maximum - maximum);
    row.shifted += static_cast<float>(before) * (row.shift - maximum);
    row.maximum = row.shift = maximum;
  }
  const float shift = row.shift;
  float exps = 0, shifted = 0;
#pragma omp simd reduction(+ : exps, shifted)
  for (int64_t j = 0; j < n; ++j) {
    const float d = x[j] - shift;
    exps += exp_nonpositive(d);
    if constexpr (kShifted) shifted += d;
  }
  row.exps += exps;
  row.shifted += shifted;
}

template <class T, bool kShifted>
RowSums row_sums(const T* x, int64_t cols) {
  RowSums row;
  for (int64_t begin = 0; begin < cols; begin += kPiece) {
    const int64_t n = std::min(kPiece, cols - begin);
    float buffer[kPiece];
    add_piece<kShifted>(float_row(x + begin, n, buffer), begin, n, row);
  }
  return row;
}

// What a row's target says: use it, ignore it, or that it is no class.
enum class Kind { kUsed, kIgnored, kOutside };

Kind kind_of(const CrossEntropyInput& in, int64_t row) {
  const int64_t target = in.target[row];
  if (target == in.ignore_index) return Kind::kIgnored;
  return target >= 0 && target < in.cols ? Kind::kUsed : Kind::kOutside;
}

template <class T, bool kSmoothing>
void forward_row(const CrossEntropyForward& a, int64_t row) {
  const CrossEntropyInput& in = a.in;
  const Kind kind = kind_of(in, row);
  if (kind != Kind::kUsed) {
    a.row_loss[row] = kind == Kind::kIgnored ? 0.0f : NAN;
    a.maximum[row] = 0;
    a.exp_sum[row] = 1;
    return;
  }
  const T* x = static_cast<const T*>(in.logits) + row * in.logits_stride;
  const RowSums sums = row_sums<T, kSmoothing>(x, in.cols);
  const float log_sum = std::log(sums.exps), lse = log_sum + sums.maximum;
  const float picked = to_float(x[in.target[row]]) - sums.maximum;  // the difference first: it is exact
  float loss = (1.0f - in.label_smoothing) * (log_sum - picked);
  if (kSmoothing) loss += in.label_smoothing * (log_sum - sums.shifted / static_cast<float>(in.cols));
  if (in.z_loss > 0) loss += in.z_loss * lse * lse;
  a.row_loss[row] = loss;
  a.maximum[row] = sums.maximum;
  a.exp_sum[row] = sums.exps;
}

// Writes count and the loss. One thread: a row's share of this is one element of its `cols`.
template <class T>
void reduce(const CrossEntropyForward& a) {
  const CrossEntropyInput& in = a.in;
  int64_t count = 0;
  double sum = 0;
  for (int64_t row = 0; row < in.rows; ++row) {
    count += in.target[row] != in.ignore_index;
    sum += static_cast<double>(a.row_loss[row]);
  }
  *a.count = count;
  T* loss = static_cast<T*>(a.loss);
  if (in.reduction == Reduction::kNone) return store_row(a.row_loss, in.rows, loss);
  if (in.reduction == Reduction::kMean) sum /= static_cast<double>(std::max<int64_t>(count, 1));
  *loss = from_float<T>(static_cast<float>(sum));
}

// out = exp(x - maximum) * scale - even; out may be x.
void gradient_piece(const float* x, int64_t n, float maximum, float scale, float even, float* out) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = exp_nonpositive(x[j] - maximum) * scale - even;
}

// dlogits of a row, to be multiplied with d.
template <class T>
void backward_row(const CrossEntropyBackward& a, int64_t row, float d, T* dlogits) {
  const CrossEntropyInput& in = a.in;
  const int64_t cols = in.cols;
  if (kind_of(in, row) != Kind::kUsed) {
    std::memset(static_cast<void*>(dlogits), 0, static_cast<size_t>(cols) * sizeof(T));
    return;
  }
  const T* x = static_cast<const T*>(in.logits) + row * in.logits_stride;
  const float maximum = a.maximum[row], lse = maximum + std::log(a.exp_sum[row]);
  const float factor = in.z_loss > 0 ? 1.0f + 2.0f * in.z_loss * lse : 1.0f;
  const float scale = d * factor / a.exp_sum[row];
  const float spread = in.label_smoothing / static_cast<float>(cols), even = d * spread;
  const int64_t target = in.target[row];
  const float p = exp(to_float(x[target]) - maximum) / a.exp_sum[row];  // before dlogits takes x's place
  for (int64_t begin = 0; begin < cols; begin += kPiece) {
    const int64_t n = std::min(kPiece, cols - begin);
    float buffer[kPiece];
    const float* piece = float_row(x + begin, n, buffer);
    gradient_piece(piece, n, maximum, scale, even, results_of(dlogits + begin, buffer));
    if constexpr (!std::is_same_v<T, float>) store_row(buffer, n, dlogits + begin);
  }
  dlogits[target] = from_float<T>(d * (factor * p - (1.0f - in.label_smoothing) - spread));
}

}  // namespace

void cross_entropy_forward(const Context& context, const CrossEntropyForward& a) {
  with_dtype(a.in.dtype, [&]<class T>() {
    with_bool(a.in.label_smoothing > 0, [&]<bool kSmoothing>() {
      parallel_rows(context, a.in.rows, a.in.cols, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) forward_row<T, kSmoothing>(a, row);
      });
    });
    reduce<T>(a);
  });
}

void cross_entropy_backward(const Context& context, const CrossEntropyBackward& a) {
  const CrossEntropyInput& in = a.in;
  const float count = static_cast<float>(std::max<int64_t>(*a.count, 1));
  with_dtype(in.dtype, [&]<class T>() {
    const T* dloss = static_cast<const T*>(a.dloss);
    parallel_rows(context, in.rows, in.cols, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const float d = to_float(dloss[in.reduction == Reduction::kNone ? row : 0]);
        T* const dlogits = static_cast<T*>(a.dlogits) + row * in.cols;
        backward_row(a, row, in.reduction == Reduction::kMean ? d / count : d, dlogits);
      }
    });
  });
}

void cross_entropy_at_once(const Context& context, const CrossEntropyAtOnce& a) {
  const CrossEntropyForward forward = {a.in, nullptr, a.row_loss, a.maximum, a.exp_sum, nullptr};
  const CrossEntropyBackward backward = {a.in, nullptr, a.maximum, a.exp_sum, nullptr, a.dlogits};
  float* const dlogits = static_cast<float*>(a.dlogits);
  with_bool(a.in.label_smoothing > 0, [&]<bool kSmoothing>() {
    parallel_rows(context, a.in.rows, a.in.cols, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        forward_row<float, kSmoothing>(forward, row);
        if (a.dloss) backward_row(backward, row, a.dloss[row], dlogits + row * a.dlogits_stride);
      }
    });
  });
}

}  // namespace fastlm
