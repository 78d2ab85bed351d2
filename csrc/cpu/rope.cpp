// rope: one pass, bound by memory (floor: read x, write y). A task is a few positions of one sequence in all
// heads, so that their cosines and sines stay in the first-level cache.
#include "../contract/rope.h"

#include <algorithm>
#include <memory>

#include "rows.h"

namespace fastlm {
namespace {

// One row's rotation, in float32.
template <bool kInterleaved, bool kTransposed, class T>
void rotate(const T* x, const float* cos, const float* sin, int64_t half, T* y) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const int64_t first = kInterleaved ? 2 * i : i, second = kInterleaved ? 2 * i + 1 : i + half;
    const float a = to_float(x[first]), b = to_float(x[second]);
    const float to_a = kTransposed ? sin[i + half] : -sin[i], to_b = kTransposed ? -sin[i] : sin[i + half];
    y[first] = from_float<T>(a * cos[i] + b * to_a);
    y[second] = from_float<T>(b * cos[i + half] + a * to_b);
  }
}

template <class T, bool kInterleaved, bool kTransposed>
void rotate_row(const Rope& a, const T* x, const float* cos, const float* sin, float* buffer, T* y) {
  if constexpr (std::is_same_v<T, Half>) {  // its conversions are intrinsics over whole rows
    float* out = buffer + a.rotated;
    rotate<kInterleaved, kTransposed>(float_row(x, a.rotated, buffer), cos, sin, a.rotated / 2, out);
    store_row(out, a.rotated, y);
  } else {
    rotate<kInterleaved, kTransposed>(x, cos, sin, a.rotated / 2, y);
  }
  std::copy(x + a.rotated, x + a.dim, y + a.rotated);
}

// Positions [first, last) of sequence b, in all heads.
template <class T, bool kInterleaved, bool kTransposed>
void rotate_positions(const Rope& a, int64_t b, int64_t first, int64_t last) {
  const std::unique_ptr<float[]> buffer(new float[static_cast<size_t>(2 * a.rotated)]);
  const T* x = static_cast<const T*>(a.x) + b * a.x_stride[0];
  T* y = static_cast<T*>(a.y) + b * a.y_stride[0];
  const float *cos = a.cos + b * a.table_batch_stride, *sin = a.sin + b * a.table_batch_stride;
  const auto row = [&](int64_t head, int64_t s) {
    rotate_row<T, kInterleaved, kTransposed>(a, x + head * a.x_stride[1] + s * a.x_stride[2],
                                             cos + s * a.rotated, sin + s * a.rotated, buffer.get(),
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
    with_bool(a.interleaved, [&]<bool kInterleaved>() {
      with_bool(a.transposed, [&]<bool kTransposed>() {
        parallel_tasks(context, a.batch * steps, [&](int64_t index) {
          const int64_t first = index % steps * step;
          rotate_positions<T, kInterleaved, kTransposed>(a, index / steps, first,
                                                         std::min(a.seq, first + step));
        });
      });
    });
  });
}

}  // namespace fastlm
