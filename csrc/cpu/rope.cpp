// rope: one pass, bound by memory (floor: read x, write y). A task is a few positions of one sequence in all
// heads, so that their cosines and sines stay in the first-level cache.
#include "../contract/rope.h"

#include <algorithm>
#include <memory>

#include "streaming.h"

namespace fastlm {
namespace {

// One row's rotation in float32, its pairs half a row apart.
template <bool kTransposed, class T>
[[gnu::flatten]] void rotate_halves(const T* x, const float* cos, const float* sin, int64_t half, bool stream,
                                    T* y) {
  over_vectors(half, [&](int64_t i, auto which, int) {
    const auto a = load(x + i, which), b = load(x + half + i, which);
    const auto sin_a = load(sin + i, which), sin_b = load(sin + half + i, which);
    const auto to_a = kTransposed ? sin_b : -sin_a, to_b = kTransposed ? -sin_a : sin_b;
    store_result(a * load(cos + i, which) + b * to_a, y + i, which, stream);
    store_result(b * load(cos + half + i, which) + a * to_b, y + half + i, which, stream);
  });
}

// The same of neighbouring pairs.
template <bool kTransposed, class T>
void rotate_neighbours(const T* x, const float* cos, const float* sin, int64_t half, T* y) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]);
    const float to_a = kTransposed ? sin[i + half] : -sin[i], to_b = kTransposed ? -sin[i] : sin[i + half];
    y[2 * i] = from_float<T>(a * cos[i] + b * to_a);
    y[2 * i + 1] = from_float<T>(b * cos[i + half] + a * to_b);
  }
}

template <class T, bool kInterleaved, bool kTransposed>
void rotate_row(const Rope& a, const T* x, const float* cos, const float* sin, float* buffer, bool stream,
                T* y) {
  const int64_t half = a.rotated / 2;
  if constexpr (!kInterleaved) {
    rotate_halves<kTransposed>(x, cos, sin, half, stream, y);
  } else if constexpr (std::is_same_v<T, Half>) {  // its conversions are intrinsics over whole rows
    float* out = buffer + a.rotated;
    rotate_neighbours<kTransposed>(float_row(x, a.rotated, buffer), cos, sin, half, out);
    store_row(out, a.rotated, y);
  } else {
    rotate_neighbours<kTransposed>(x, cos, sin, half, y);
  }
  std::copy(x + a.rotated, x + a.dim, y + a.rotated);
}

// Positions [first, last) of sequence b, in all heads.
template <class T, bool kInterleaved, bool kTransposed>
void rotate_positions(const Rope& a, int64_t b, int64_t first, int64_t last, bool stream) {
  const std::unique_ptr<float[]> buffer(new float[static_cast<size_t>(2 * a.rotated)]);
  const T* x = static_cast<const T*>(a.x) + b * a.x_stride[0];
  T* y = static_cast<T*>(a.y) + b * a.y_stride[0];
  const float *cos = a.cos + b * a.table_batch_stride, *sin = a.sin + b * a.table_batch_stride;
  const auto row = [&](int64_t head, int64_t s) {
    rotate_row<T, kInterleaved, kTransposed>(a, x + head * a.x_stride[1] + s * a.x_stride[2],
                                             cos + s * a.rotated, sin + s * a.rotated, buffer.get(), stream,
                                             y + head * a.y_stride[1] + s * a.y_stride[2]);
  };
  if (a.x_stride[1] < a.x_stride[2]) {  // in the order in which x lies in memory
    for (int64_t s = first; s < last; ++s) {
      for (int64_t head = 0; head < a.heads; ++head) row(head, s);
    }
  } else {
    for (int64_t head = 0; head < a.heads; ++head) {
      for (int64_t s = first; s < last; ++s) row(head, s);
    }
  }
}

}  // namespace

void rope(const Context& context, const Rope& a) {
  const int64_t step = std::clamp<int64_t>(4 * kTaskElements / std::max<int64_t>(1, a.heads * a.dim), 1, 64);
  const int64_t steps = divide_up(a.seq, step);
  with_dtype(a.dtype, [&]<class T>() {
    constexpr int64_t kSize = static_cast<int64_t>(sizeof(T));
    const bool whole_lines = a.rotated == a.dim && a.dim % 2 == 0;
    const bool stream =
        whole_lines && streams(a.y, a.batch * a.heads * a.seq * a.dim * kSize, a.dim / 2 * kSize);
    with_bool(a.interleaved, [&]<bool kInterleaved>() {
      with_bool(a.transposed, [&]<bool kTransposed>() {
        parallel_tasks(context, a.batch * steps, [&](int64_t index) {
          const int64_t first = index % steps * step;
          rotate_positions<T, kInterleaved, kTransposed>(a, index / steps, first,
                                                         std::min(a.seq, first + step), stream);
        });
      });
    });
  });
}

}  // namespace fastlm
