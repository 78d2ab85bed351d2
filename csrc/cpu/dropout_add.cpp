// dropout_add: one pass, bound by memory (floor: read x and residual, write y). A row is worked on in pieces
// that stay in the first-level cache.
#include "../contract/dropout_add.h"

#include "packs.h"
#include "philox.h"

namespace fastlm {
namespace {

static_assert(kRowPiece % kPhiloxNumbers == 0);  // a piece's dropout begins with a block of numbers

template <class T, bool kDropout>
void piece(const DropoutAdd& a, const DropoutScale& scale, int64_t row, int64_t begin, int64_t n) {
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride + begin;
  const T* residual =
      a.residual ? static_cast<const T*>(a.residual) + row * a.residual_stride + begin : nullptr;
  T* y = static_cast<T*>(a.y) + row * a.cols + begin;
  const bool stream = streams_rows<T>(a, a.y);
  float scales[kRowPiece];
  if constexpr (kDropout) scale.columns(row, begin, n, scales);
  const float* factors = scales;
  over_packs(n, [=](int64_t j, auto size) {
    Pack v = load_pack(x + j, size);
    if constexpr (kDropout) v = rounded(v * load_pack(factors + j, size));
    if (residual) v = v + load_pack(residual + j, size);
    store_result(v, y + j, size, stream);
  });
}

}  // namespace

void dropout_add(const Context& context, const DropoutAdd& a) {
  const DropoutScale scale(a.dropout);
  with_dtype(a.dtype, [&]<class T>() {
    with_bool(a.dropout.p > 0, [&]<bool kDropout>() {
      parallel_pieces(context, a.rows, a.cols, [&](int64_t row, int64_t begin, int64_t n) {
        piece<T, kDropout>(a, scale, row, begin, n);
      });
    });
  });
}

}  // namespace fastlm
