// Walking over rows: how work is cut into tasks, and how a row becomes float32 and back.
#pragma once

#include <algorithm>
#include <cstdint>

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

// Runs f(index) for every index in [0, tasks), denormals flushed. A single task stays on this thread.
template <class F>
void parallel_tasks(const Context& context, int64_t tasks, const F& f) {
  const auto task = [](const void* self, int64_t index) {
    FlushDenormals flush;
    (*static_cast<const F*>(self))(index);
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

}  // namespace fastlm
