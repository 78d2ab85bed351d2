// Matrix tiles in float32: loaded from any dtype, transposed, multiplied by a micro-kernel that keeps its
// sums in registers, stored. A tile's row starts `padded(cols)` floats after the one before and ends in
// zeros.
//
// The micro-kernel: 6 rows x 4 vectors with AVX-512 (24 of 32 registers are sums), 3 x 4 with 16 registers.
// The left operand may have any strides, so a transposed one costs nothing; the right one is read along its
// rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "../dtype.h"
#include "math.h"

namespace fastlm {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kMicroRows = 6;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kMicroRows = 3;
#else
constexpr int kLanes = 4, kMicroRows = 3;
#endif
constexpr int kMicroVectors = 4;
constexpr int64_t kLine = 16;  // floats in a cache line: rows are padded to whole ones
constexpr int64_t kDepth =
    32;  // products a sum, and rows of the right operand that stay in the first-level cache

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t round_down(int64_t n, int64_t step) { return n / step * step; }

// An odd number of cache lines: with an even one the rows of a tile would compete for the same few cache
// sets.
inline int64_t padded(int64_t cols) { return ((cols + kLine - 1) / kLine | 1) * kLine; }

struct FreeFloats {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float[], FreeFloats>;

inline Floats make_floats(int64_t count) {
  const size_t bytes = static_cast<size_t>(std::max<int64_t>(1, count)) * sizeof(float);
  return Floats(static_cast<float*>(::operator new[](bytes, std::align_val_t{64})));
}

// This thread's scratch memory, handed out in pieces, kept between tasks: the page faults of fresh memory
// cost as much as filling it. One Scratch at a time may live in a thread.
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    if (size() >= count) return;
    memory() = make_floats(count);
    size() = count;
  }

  float* take(int64_t count) {
    float* piece = memory().get() + used_;
    used_ += round_up(count, kLine);
    return piece;
  }

 private:
  static Floats& memory() {
    thread_local Floats floats;
    return floats;
  }
  static int64_t& size() {
    thread_local int64_t floats = 0;
    return floats;
  }
  int64_t used_ = 0;
};

// out = factor * source as float32; the padding of the rows, and rows up to the next multiple of 4, are zero.
template <class T>
void load_tile(const T* source, int64_t stride, int64_t rows, int64_t cols, float* out) {
  const int64_t ld = padded(cols);
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = source + r * stride;
    float* to = out + r * ld;
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) to[c] = to_float(from[c]);
    for (int64_t c = cols; c < ld; ++c) to[c] = 0;
  }
  const int64_t rest = round_up(rows, 4) - rows;
  std::memset(out + rows * ld, 0, static_cast<size_t>(rest * ld) * sizeof(float));
}

template <class T>
void store_tile(const float* source, int64_t rows, int64_t cols, float factor, T* out, int64_t stride) {
  const int64_t ld = padded(cols);
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = source + r * ld;
    T* to = out + r * stride;
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) to[c] = from_float<T>(from[c] * factor);
  }
}

// Rows to be read: each starts `ld` floats after the one before.
struct Rows {
  const float* data;
  int64_t ld;
};

// The tile [rows, cols] as [cols, rows], four by four; up to a whole cache line its rows end in zeros.
// `rows` and `cols`, rounded up to four, are read.
inline void transpose_tile(Rows source, int64_t rows, int64_t cols, float* out, int64_t out_ld) {
  typedef int Index __attribute__((vector_size(16)));
  const int64_t ld = source.ld, filled = round_up(rows, 4);
  for (int64_t r = 0; r < filled; r += 4) {
    for (int64_t c = 0; c < round_up(cols, 4); c += 4) {
      const float* from = source.data + r * ld + c;
      const Quad x0 = *reinterpret_cast<const Quad*>(from), x1 = *reinterpret_cast<const Quad*>(from + ld);
      const Quad x2 = *reinterpret_cast<const Quad*>(from + 2 * ld),
                 x3 = *reinterpret_cast<const Quad*>(from + 3 * ld);
      const Quad low01 = __builtin_shuffle(x0, x1, Index{0, 4, 1, 5}),
                 high01 = __builtin_shuffle(x0, x1, Index{2, 6, 3, 7});
      const Quad low23 = __builtin_shuffle(x2, x3, Index{0, 4, 1, 5}),
                 high23 = __builtin_shuffle(x2, x3, Index{2, 6, 3, 7});
      float* to = out + c * out_ld + r;
      *reinterpret_cast<Quad*>(to) = __builtin_shuffle(low01, low23, Index{0, 1, 4, 5});
      *reinterpret_cast<Quad*>(to + out_ld) = __builtin_shuffle(low01, low23, Index{2, 3, 6, 7});
      *reinterpret_cast<Quad*>(to + 2 * out_ld) = __builtin_shuffle(high01, high23, Index{0, 1, 4, 5});
      *reinterpret_cast<Quad*>(to + 3 * out_ld) = __builtin_shuffle(high01, high23, Index{2, 3, 6, 7});
    }
  }
  for (int64_t c = 0; c < cols; ++c) {
    for (int64_t r = filled; r < round_up(rows, kLine); ++r) out[c * out_ld + r] = 0;
  }
}

// The left operand of a product: element (r, k) is data[r * row + k * col].
struct Left {
  const float* data;
  int64_t row, col;
};

// kRows x kVectors vectors of c (+)= a * b; row k of b starts at b + k * b_ld. c is added last: a sum of
// short sums keeps the rounding error small.
template <int kRows, int kVectors>
void micro(bool add, int64_t depth, Left a, const float* b, int64_t b_ld, float* c, int64_t c_ld) {
  Vector sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = Vector{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) right[v] = *reinterpret_cast<const Vector*>(b + k * b_ld + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vector left = Vector{} + a.data[r * a.row + k * a.col];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Vector* to = reinterpret_cast<Vector*>(c + r * c_ld + v * kLanes);
      *to = add ? *to + sum[r][v] : sum[r][v];
    }
  }
}

template <int kVectors>
void multiply_panel(bool add, int64_t rows, int64_t depth, Left a, const float* b, int64_t b_ld, float* c,
                    int64_t c_ld) {
  int64_t r = 0;
  for (; r + kMicroRows <= rows; r += kMicroRows) {
    micro<kMicroRows, kVectors>(add, depth, {a.data + r * a.row, a.row, a.col}, b, b_ld, c + r * c_ld, c_ld);
  }
  if (r == rows) return;
  with_int<1, 2, 3, 4, 5>(static_cast<int>(rows - r), [&]<int kRows>() {
    if constexpr (kRows < kMicroRows) {
      micro<kRows, kVectors>(add, depth, {a.data + r * a.row, a.row, a.col}, b, b_ld, c + r * c_ld, c_ld);
    }
  });
}

// c [rows, cols] = a [rows, depth] * b [depth, cols], added to c if `add`. Whole vectors of columns are
// computed.
inline void multiply(bool add, int64_t rows, int64_t cols, int64_t depth, Left a, const float* b,
                     int64_t b_ld, float* c, int64_t c_ld) {
  for (int64_t k = 0; k == 0 || k < depth; k += kDepth) {
    const int64_t part = std::min(kDepth, depth - k);
    for (int64_t j = 0; j < cols; j += kMicroVectors * kLanes) {
      const int64_t vectors = std::min<int64_t>(kMicroVectors, (cols - j + kLanes - 1) / kLanes);
      with_int<1, 2, 3, 4>(static_cast<int>(vectors), [&]<int kVectors>() {
        multiply_panel<kVectors>(add || k > 0, rows, part, {a.data + k * a.col, a.row, a.col},
                                 b + k * b_ld + j, b_ld, c + j, c_ld);
      });
    }
  }
}

}  // namespace fastlm
