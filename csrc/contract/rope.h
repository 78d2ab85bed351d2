// rope: what its kernels compute, and their signatures.
#pragma once

#include "../kernels.h"

namespace fastlm {

// Rotates the first `rotated` elements of every row of x [batch, heads, seq, dim] in pairs (a, b) by the
// angles of the row's position, and copies the rest:
//   y_a = x_a * cos_a - x_b * sin_a, y_b = x_b * cos_b + x_a * sin_b;
// pair i is (i, i + half), half = rotated / 2, or (2i, 2i + 1) if interleaved. The tables are laid out alike
// for both: cos_a = cos[i], cos_b = cos[i + half], and so for sin. `transposed` applies the transpose
// instead, which is the gradient: y_a = x_a * cos_a + x_b * sin_b, y_b = x_b * cos_b - x_a * sin_a.
struct Rope {
  DType dtype;
  int64_t batch, heads, seq, dim, rotated;
  bool interleaved, transposed;
  const void* x;
  int64_t x_stride[3];         // of batch, head, position, in elements; dim is contiguous
  Parameter cos, sin;          // [seq, rotated], contiguous, of one type
  int64_t table_batch_stride;  // in elements; 0: one table for all sequences
  void* y;
  int64_t y_stride[3];
};
void rope(const Context& context, const Rope& a);

}  // namespace fastlm
