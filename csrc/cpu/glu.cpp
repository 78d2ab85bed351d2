// glu: one pass, bound by memory (floor: forward reads gate and up and writes y, backward reads dy, gate and
// up and writes dgate and dup). A row is worked on in pieces that stay in the first-level cache; backward
// computes the activation again.
#include "../contract/glu.h"

#include "activations.h"
#include "rows.h"

namespace fastlm {
namespace {

// Columns [begin, begin + n) of a row.
template <class T, class Act>
void forward_piece(const Glu& a, int64_t row, int64_t begin, int64_t n) {
  const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + begin;
  const T* up = static_cast<const T*>(a.up) + row * a.up_stride + begin;
  T* y = static_cast<T*>(a.y) + row * a.cols + begin;
  const bool stream = streams_rows<T>(a, a.y);
  over_packs(n, [=](int64_t j, auto size) {
    store_result(Act::value(load_pack(gate + j, size)) * load_pack(up + j, size), y + j, size, stream);
  });
}

template <class T, class Act>
void backward_piece(const GluBackward& a, int64_t row, int64_t begin, int64_t n) {
  T unused[kRowPiece];
  const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride + begin;
  const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + begin;
  const T* up = static_cast<const T*>(a.up) + row * a.up_stride + begin;
  T* dgate = a.dgate ? static_cast<T*>(a.dgate) + row * a.cols + begin : unused;
  T* dup = a.dup ? static_cast<T*>(a.dup) + row * a.cols + begin : unused;
  const bool stream_gate = a.dgate && streams_rows<T>(a, a.dgate);
  const bool stream_up = a.dup && streams_rows<T>(a, a.dup);
  over_packs(n, [=](int64_t j, auto size) {
    const Pack d = load_pack(dy + j, size), g = load_pack(gate + j, size);
    store_result(d * Act::value(g), dup + j, size, stream_up);
    store_result(Act::gradient(g, d * load_pack(up + j, size)), dgate + j, size, stream_gate);
  });
}

}  // namespace

void glu(const Context& context, const Glu& a) {
  with_dtype(a.dtype, [&]<class T>() {
    with_activation(a.activation, [&]<class Act>() {
      parallel_pieces(context, a.rows, a.cols, [&](int64_t row, int64_t begin, int64_t n) {
        forward_piece<Unordered<T>, Act>(a, row, begin, n);
      });
    });
  });
}

void glu_backward(const Context& context, const GluBackward& a) {
  with_dtype(a.dtype, [&]<class T>() {
    with_activation(a.activation, [&]<class Act>() {
      parallel_pieces(context, a.rows, a.cols, [&](int64_t row, int64_t begin, int64_t n) {
        backward_piece<Unordered<T>, Act>(a, row, begin, n);
      });
    });
  });
}

}  // namespace fastlm
