// Walking over rows: how work is cut into tasks, and how a row becomes float32 and back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../kernels.h"
#include "math.h"

namespace fastlm {

// Denormals flush to zero while one of these lives: a multiplication that meets one costs 100 cycles, and a
// confident model's gradients are full of them.
class FlushDenormals {
#if defined(__SSE2__)
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }  // FTZ | DAZ
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// Results that a task wrote past the caches (streaming.h) are there before its end is.
inline void wait_for_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Runs f(index) for every index in [0, tasks), denormals flushed. A single task stays on this thread.
template <class F>
void parallel_tasks(const Context& context, int64_t tasks, const F& f) {
  const auto task = [](const void* self, int64_t index) {
    FlushDenormals flush;
    (*static_cast<const F*>(self))(index);
    wait_for_stores();
  };
  if (tasks == 1) return task(&f, 0);
  context.parallel(tasks, task, &f);
}

constexpr int64_t kTaskElements = 16384;  // 64 KB of float32: below that waking a thread costs more (12 us)

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs f(begin, end) over rows [0, rows), cut so that a task has about kTaskElements elements.
template <class F>
void parallel_rows(const Context& context, int64_t rows, int64_t cols, const F& f) {
  if (rows == 0) return;
  const int64_t step = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, cols));
  parallel_tasks(context, divide_up(rows, step),
                 [&](int64_t index) { f(index * step, std::min(rows, (index + 1) * step)); });
}

constexpr int64_t kRowPiece = 1024;  // columns that stay in the first-level cache: 4 KB of float32

// Runs f(row, begin, n) over pieces of rows, columns [begin, begin + n), n <= kRowPiece: long rows are cut
// too, for a 1-d tensor is one row.
template <class F>
void parallel_pieces(const Context& context, int64_t rows, int64_t cols, const F& f) {
  const int64_t pieces = divide_up(cols, kRowPiece);
  parallel_rows(context, rows * pieces, std::min(cols, kRowPiece), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % pieces * kRowPiece;
      f(i / pieces, begin, std::min(kRowPiece, cols - begin));
    }
  });
}

// out[j] = the sum over blocks of partial[block * stride + j], j in [0, cols); nothing where out is null.
inline void add_blocks(const Context& context, const float* partial, int64_t stride, int64_t blocks,
                       int64_t cols, float* out) {
  if (!out) return;
  const int64_t step = std::max<int64_t>(256, kTaskElements / blocks);
  parallel_tasks(context, divide_up(cols, step), [&](int64_t index) {
    const int64_t begin = index * step, end = std::min(cols, begin + step);
    std::fill(out + begin, out + end, 0.0f);
    for (int64_t block = 0; block < blocks; ++block) {
      const float* sums = partial + block * stride;
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) out[j] += sums[j];
    }
  });
}

template <class T>
void load_row(const T* source, int64_t cols, float* out) {
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) out[j] = to_float(source[j]);
}

template <class T>
void store_row(const float* source, int64_t cols, T* out) {
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) out[j] = from_float<T>(source[j]);
}

#if defined(__F16C__)
// GCC 12 does not vectorise float16 conversions with the hardware's: plain loops take 3 times as long.
template <>
inline void load_row<Half>(const Half* source, int64_t cols, float* out) {
  int64_t j = 0;
  for (; j + 8 <= cols; j += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + j));
    _mm256_storeu_ps(out + j, _mm256_cvtph_ps(halves));
  }
  for (; j < cols; ++j) out[j] = to_float(source[j]);
}

template <>
inline void store_row<Half>(const float* source, int64_t cols, Half* out) {
  int64_t j = 0;
  for (; j + 8 <= cols; j += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(source + j), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j), halves);
  }
  for (; j < cols; ++j) out[j] = from_float<Half>(source[j]);
}
#endif

// The sum of all lanes, added in pairs.
template <int kLanes>
float add_lanes(float (&lanes)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// The sum of term(j), j in [0, n), in kLanes sums that are then added in pairs. A reduction clause would add
// the last n % 16 terms one after the other to the whole sum: 1.4 times the rounding error in rows of 41.
template <int kLanes = 16, class F>
float lane_sum(int64_t n, const F& term) {
  float lanes[kLanes] = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(j + lane);
  }
  for (int lane = 0; lane < n - whole; ++lane) lanes[lane] += term(whole + lane);
  return add_lanes(lanes);
}

// A row as float32: itself, or converted into `buffer`.
template <class T>
const float* float_row(const T* source, int64_t cols, float* buffer) {
  if constexpr (std::is_same_v<T, float>) return source;
  load_row(source, cols, buffer);
  return buffer;
}

// Where a row's float32 results go: to the output itself, or into `buffer` on their way to store_row.
template <class T>
float* results_of(T* out, float* buffer) {
  if constexpr (std::is_same_v<T, float>) return out;
  return buffer;
}

}  // namespace fastlm
