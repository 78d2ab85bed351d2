// append_kv: a row is one token of one head, copied or quantised into its slot. Bound by the bytes of k and
// v, read and written once.
#include "../contract/append_kv.h"

#include <cstring>

#include "kv_cache.h"
#include "rows.h"
#include "tiles.h"

namespace fastlm {
namespace {

// q = rint(x / scale), and scale. The largest magnitude is sought among the bit patterns: NaN is the largest
// of all.
float quantise(const float* x, int64_t dim, int8_t* q) {
  int32_t top = 0;
#pragma omp simd reduction(max : top)
  for (int64_t c = 0; c < dim; ++c) {
    const int32_t magnitude = std::bit_cast<int32_t>(x[c]) & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
  }
  const float scale = std::bit_cast<float>(top) / 127.0f;
  if (!(scale > 0 && scale < INFINITY)) {
    std::memset(q, 0, static_cast<size_t>(dim));
    return scale;
  }
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, half to even
#pragma omp simd
  for (int64_t c = 0; c < dim; ++c) {
    q[c] =
        static_cast<int8_t>(std::bit_cast<int32_t>(x[c] / scale + kRound) - std::bit_cast<int32_t>(kRound));
  }
  return scale;
}

template <class T>
void append_row(const AppendKv& a, const AppendedRows& rows, int64_t batch, int64_t head, int64_t token,
                float* buffer) {
  const Slot slot = slot_of(a.pages, batch, static_cast<int64_t>(a.pages.lengths[batch]) + token);
  if (slot.page < 0) return;
  const T* source = static_cast<const T*>(rows.source) + batch * rows.batch_stride + head * rows.head_stride +
                    token * rows.token_stride;
  const CacheStrides& at = rows.at;
  const int64_t start = slot.page * at.page + head * at.head + slot.index * at.slot;
  if (a.quantised) {
    const float* x = float_row(source, rows.dim, buffer);
    rows.scales[slot.page * at.scale_page + head * at.scale_head + slot.index * at.scale_slot] =
        quantise(x, rows.dim, static_cast<int8_t*>(rows.cache) + start);
  } else {
    std::memcpy(static_cast<T*>(rows.cache) + start, source, static_cast<size_t>(rows.dim) * sizeof(T));
  }
}

}  // namespace

void append_kv(const Context& context, const AppendKv& a) {
  const int64_t rows = a.batch * a.kv_heads * a.tokens;
  parallel_rows(context, rows, a.k.dim + a.v.dim, [&](int64_t begin, int64_t end) {
    const Floats buffer = make_floats(std::max(a.k.dim, a.v.dim));
    with_dtype(a.dtype, [&]<class T>() {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t token = row % a.tokens, head = row / a.tokens % a.kv_heads;
        const int64_t batch = row / a.tokens / a.kv_heads;
        append_row<T>(a, a.k, batch, head, token, buffer.get());
        append_row<T>(a, a.v, batch, head, token, buffer.get());
      }
    });
  });
}

}  // namespace fastlm
