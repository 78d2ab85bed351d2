// What the norms share: the row h = dropout(x) + residual that is normed, and where its gradient goes. `Args`
// is a norm's Forward or Backward struct. Rows of bfloat16 are read and written Unordered; the float32
// numbers beside them (weights, sums of gradients, dropout's factors) are then arranged alike.
#pragma once

#include <cstring>
#include <type_traits>

#include "philox.h"
#include "streaming.h"

namespace fastlm {

constexpr int64_t kScaled = 256;  // columns whose dropout is drawn at a time: fewer calls, and while the
                                  // numbers of some are drawn, the stores of others are under way

template <class T>
const T* row_of(const void* base, int64_t stride, int64_t row) {
  return base ? static_cast<const T*>(base) + row * stride : nullptr;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
template <class T>
constexpr bool kArranged = std::is_same_v<T, UnorderedBFloat16>;

// The numbers of a Block, even ones first.
inline Two evens_first(const Two& v) {
  const __m256 low = reinterpret_cast<__m256>(v.v[0]), high = reinterpret_cast<__m256>(v.v[1]);
  const auto quarters = [](__m256 mixed) {
    return reinterpret_cast<Vector>(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
  };
  return {{quarters(_mm256_shuffle_ps(low, high, 0x88)), quarters(_mm256_shuffle_ps(low, high, 0xdd))}};
}

// And back in order.
inline Two interleaved(const Two& v) {
  const __m256 even = reinterpret_cast<__m256>(v.v[0]), odd = reinterpret_cast<__m256>(v.v[1]);
  const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  return {{reinterpret_cast<Vector>(_mm256_permute2f128_ps(low, high, 0x20)),
           reinterpret_cast<Vector>(_mm256_permute2f128_ps(low, high, 0x31))}};
}
#else
template <class T>
constexpr bool kArranged = false;

inline Two evens_first(const Two& v) { return v; }
inline Two interleaved(const Two& v) { return v; }
#endif

// v, its NaNs as store_two keeps them.
template <class V>
V usual_nan(V v) {
  return v == v ? v : V{} + __builtin_nanf("");
}

// `from` as load() finds the columns of a row of T: itself, or arranged in `memory`, which may be `from`.
template <class T>
const float* arranged(const float* from, int64_t cols, float* memory) {
  if constexpr (!kArranged<T>) return from;
  int64_t j = 0;
  for (; j + kTwoNumbers <= cols; j += kTwoNumbers) {
    const Two v = evens_first(load_two(from + j));
    store_two({{usual_nan(v.v[0]), usual_nan(v.v[1])}}, memory + j);
  }
  for (; j < cols; ++j) memory[j] = usual_nan(from[j]);
  return memory;
}

template <class T>
void put_in_order(float* sums, int64_t cols) {
  if constexpr (!kArranged<T>) return;
  for (int64_t j = 0; j + kTwoNumbers <= cols; j += kTwoNumbers) {
    store_two(interleaved(load_two(sums + j)), sums + j);
  }
}

// Memory for `count` weights or biases, where rows of T want them arranged.
template <class T>
Floats arranged_memory(int64_t count) {
  return kArranged<T> ? make_floats(count) : Floats();
}

// One row of h: x itself where nothing has to be done to it, else a.h, written here. each(v, k) is called
// with all of it, in which lanes past the row are 0, and the partial sum to add to.
template <class T, class Args, class F>
const T* normed_row(const Args& a, const DropoutScale& scale, int64_t row, const F& each) {
  const int64_t cols = a.cols;
  const T* x = row_of<T>(a.x, a.x_stride, row);
  if (!a.h) {
    over_vectors(cols, [&](int64_t j, auto which, int k) { each(load(x + j, which), k); });
    return x;
  }
  const T* residual = row_of<T>(a.residual, a.residual_stride, row);
  T* h = static_cast<T*>(a.h) + row * cols;
  const bool dropout = a.dropout.p > 0;
  for (int64_t begin = 0; begin < cols; begin += kScaled) {
    const int64_t n = std::min(kScaled, cols - begin);
    float scales[kScaled];
    if (dropout) scale.columns(row, begin, n, scales), arranged<T>(scales, n, scales);
    over_vectors(n, [&](int64_t i, auto which, int k) {
      const int64_t j = begin + i;
      auto v = load(x + j, which);
      if (dropout) v = rounded(v * load(scales + i, which));  // as dropout_add
      if (residual) v = v + load(residual + j, which);
      store(v, h + j, which);
      each(load(h + j, which), k);  // rounded to T
    });
  }
  return h;
}

// Writes one row of dresidual and dx. gradient(j, which) is some columns of the norm's own gradient.
template <class T, class Args, class F>
void store_gradients(const Args& a, const DropoutScale& scale, int64_t row, const F& gradient) {
  const int64_t cols = a.cols;
  const T* dh = row_of<T>(a.dh, a.dh_stride, row);
  T* dresidual = a.dresidual ? static_cast<T*>(a.dresidual) + row * cols : nullptr;
  T* dx = a.dx ? static_cast<T*>(a.dx) + row * cols : nullptr;
  const bool stream = streams_rows<T>(a, a.dx ? a.dx : a.dresidual);
  const auto piece = [&](int64_t begin, int64_t n, const float* scales) {
    over_vectors(n, [&](int64_t i, auto which, int) {
      const int64_t j = begin + i;
      auto v = gradient(j, which);
      if (dh) v = v + load(dh + j, which);
      if (dresidual) store_result(v, dresidual + j, which, stream);
      if (scales) v = v * load(scales + i, which);
      if (dx) store_result(v, dx + j, which, stream);
    });
  };
  if (!dx || a.dropout.p == 0) return piece(0, cols, nullptr);
  for (int64_t begin = 0; begin < cols; begin += kScaled) {
    const int64_t n = std::min(kScaled, cols - begin);
    float scales[kScaled];
    scale.columns(row, begin, n, scales);
    piece(begin, n, arranged<T>(scales, n, scales));
  }
}

}  // namespace fastlm
