// dropout_add: one pass, bound by memory (floor: read x and residual, write y). A row is worked on in pieces
// that stay in the first-level cache.
#include "../contract/dropout_add.h"

#include "philox.h"
#include "rows.h"

namespace fastlm {
namespace {

static_assert(kRowPiece % kPhiloxNumbers == 0);  // a piece's dropout begins with a block of numbers

template <class T>
void piece(const DropoutAdd& a, const DropoutScale& scale, int64_t row, int64_t begin, int64_t n) {
  float values[kRowPiece];
  load_row(static_cast<const T*>(a.x) + row * a.x_stride + begin, n, values);
  if (a.dropout.p > 0) scale.apply(row, begin, n, values);
  T* y = static_cast<T*>(a.y) + row * a.cols + begin;
  if (!a.residual) return store_row(values, n, y);
  const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride + begin;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] = from_float<T>(values[j] + to_float(residual[j]));
}

}  // namespace

void dropout_add(const Context& context, const DropoutAdd& a) {
  const DropoutScale scale(a.dropout);
  with_dtype(a.dtype, [&]<class T>() {
    parallel_pieces(context, a.rows, a.cols,
                    [&](int64_t row, int64_t begin, int64_t n) { piece<T>(a, scale, row, begin, n); });
  });
}

}  // namespace fastlm
