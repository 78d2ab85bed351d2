// cross_entropy: what its kernels compute, and their signatures.
#pragma once

#include "../kernels.h"

namespace fastlm {

enum class Reduction : int32_t { kNone = 0, kSum = 1, kMean = 2 };

// What forward and backward of the cross-entropy read. A row whose target is ignore_index has loss 0 and
// gradient 0; one whose target is no class either (never used as an index) has loss NaN and gradient 0.
struct CrossEntropyInput {
  DType dtype;
  int64_t rows, cols;
  const void* logits;
  int64_t logits_stride;
  const int64_t* target;  // [rows]
  int64_t ignore_index;
  float label_smoothing, z_loss;
  Reduction reduction;
};

// row_loss = (1 - e) * (lse - x[target]) + e * (lse - mean(x)) + z * lse^2 with e = label_smoothing, z =
// z_loss, lse = maximum + log(exp_sum), maximum = max(x), exp_sum = sum(exp(x - maximum)). loss, of `dtype`:
// row_loss; their sum; or their sum over count, the number of rows that are not ignored (0 if there are
// none).
struct CrossEntropyForward {
  CrossEntropyInput in;
  void* loss;                           // [rows] or one element
  float *row_loss, *maximum, *exp_sum;  // [rows]
  int64_t* count;
};
void cross_entropy_forward(const Context& context, const CrossEntropyForward& a);

// dlogits = d * ((1 + 2 * z * lse) * p - (1 - e) * onehot(target) - e / cols), p = exp(x - maximum) /
// exp_sum; d is dloss[row], dloss or dloss / count by the reduction.
struct CrossEntropyBackward {
  CrossEntropyInput in;
  const void* dloss;  // of dtype: [rows] or one element
  const float *maximum, *exp_sum;
  const int64_t* count;
  void* dlogits;  // [rows, cols], contiguous
};
void cross_entropy_backward(const Context& context, const CrossEntropyBackward& a);

// Both of rows of float32 at once, of logits + bias: row_loss and, where dloss is given, dlogits with d =
// dloss[row]. linear_cross_entropy runs it between its matmuls.
struct CrossEntropyAtOnce {
  CrossEntropyInput in;
  DType dtype;         // of bias and dlogits: on a CPU float32
  const void* bias;    // [cols]; may be null, on a CPU it is
  const float* dloss;  // [rows]; may be null
  void* dlogits;       // if float32, may be the logits, with their stride; on a CPU it is
  int64_t dlogits_stride;
  float *row_loss, *maximum, *exp_sum;  // [rows]
};
void cross_entropy_at_once(const Context& context, const CrossEntropyAtOnce& a);

}  // namespace fastlm
