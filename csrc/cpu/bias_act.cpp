// bias_act: one pass, bound by memory (floor: forward reads x and writes y, backward reads dy and x and
// writes dx). A row is worked on in pieces that stay in the first-level cache; backward computes the
// activation again.
#include "../contract/bias_act.h"

#include <algorithm>

#include "activations.h"
#include "philox.h"
#include "rows.h"

namespace fastlm {
namespace {

static_assert(kRowPiece % kPhiloxNumbers == 0);  // a piece's dropout begins with a block of numbers

// Stands for a bias that was not given: adding it costs less than a second code path.
constexpr float kZeros[kRowPiece] = {};

// Columns [begin, begin + n) of a row.
template <class T, class Act, bool kDropout>
void forward_piece(const BiasAct& a, const DropoutScale& scale, int64_t row, int64_t begin, int64_t n) {
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride + begin;
  const float* bias = a.bias ? a.bias + begin : kZeros;
  T* y = static_cast<T*>(a.y) + row * a.cols + begin;
  const bool stream = streams_rows<T>(a, a.y);
  float scales[kRowPiece];
  if constexpr (kDropout) scale.columns(row, begin, n, scales);
  const float* factors = scales;
  over_packs(n, [=](int64_t j, auto size) {
    Pack value = Act::value(load_pack(x + j, size) + load_pack(bias + j, size));
    if constexpr (kDropout) value = value * load_pack(factors + j, size);
    store_result(value, y + j, size, stream);
  });
}

// sums: where to add the piece of dbias.
template <class T, class Act, bool kDropout>
void backward_piece(const BiasActBackward& a, const DropoutScale& scale, int64_t row, int64_t begin,
                    int64_t n, float* sums) {
  T unused[kRowPiece];
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride + begin;
  const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride + begin;
  const float* bias = a.bias ? a.bias + begin : kZeros;
  T* dx = a.dx ? static_cast<T*>(a.dx) + row * a.cols + begin : unused;
  const bool stream = a.dx && streams_rows<T>(a, a.dx);
  float scales[kRowPiece];
  if constexpr (kDropout) scale.columns(row, begin, n, scales);
  const float* factors = scales;
  over_packs(n, [=](int64_t j, auto size) {
    const Pack z = load_pack(x + j, size) + load_pack(bias + j, size);
    Pack d = load_pack(dy + j, size);
    if constexpr (kDropout) d = d * load_pack(factors + j, size);
    d = Act::gradient(z, d);
    store_result(d, dx + j, size, stream);
    store_pack(load_pack(sums + j, size) + d, sums + j, size);
  });
}

}  // namespace

void bias_act(const Context& context, const BiasAct& a) {
  const DropoutScale scale(a.dropout);
  with_dtype(a.dtype, [&]<class T>() {
    with_activation(a.activation, [&]<class Act>() {
      with_bool(a.dropout.p > 0, [&]<bool kDropout>() {
        parallel_pieces(context, a.rows, a.cols, [&](int64_t row, int64_t begin, int64_t n) {
          forward_piece<T, Act, kDropout>(a, scale, row, begin, n);
        });
      });
    });
  });
}

void bias_act_backward(const Context& context, const BiasActBackward& a) {
  const DropoutScale scale(a.dropout);
  const int64_t pieces = divide_up(a.cols, kRowPiece), blocks = row_blocks(a.rows);
  with_dtype(a.dtype, [&]<class T>() {
    with_activation(a.activation, [&]<class Act>() {
      with_bool(a.dropout.p > 0, [&]<bool kDropout>() {
        parallel_tasks(context, blocks * pieces, [&](int64_t index) {
          const int64_t block = index / pieces, begin = index % pieces * kRowPiece;
          const int64_t n = std::min(kRowPiece, a.cols - begin), last = (block + 1) * a.rows / blocks;
          float unused[kRowPiece];
          float* sums = a.dbias ? a.partial + block * a.cols + begin : unused;
          std::fill(sums, sums + n, 0.0f);
          for (int64_t row = block * a.rows / blocks; row < last; ++row) {
            backward_piece<T, Act, kDropout>(a, scale, row, begin, n, sums);
          }
        });
      });
    });
  });
  add_blocks(context, a.partial, a.cols, blocks, a.cols, a.dbias);
}

}  // namespace fastlm
