// THE CONTRACT: every native kernel's formula and signature, on raw pointers. csrc/cpu and csrc/cuda
// implement it, csrc/bindings calls it. No torch here. All sums are taken in float32.
//
// Conventions, unless a struct says otherwise: rows are `cols` contiguous elements and start
// `<name>_stride` elements apart; a null pointer means that an argument was not given or that an
// output is not wanted; weights, biases and statistics are float32 whatever `dtype` is.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastlm {

// How a kernel is run: on a CPU `parallel` runs task(self, i) once for every i in [0, tasks), maybe on
// several threads and in any order; on a GPU `stream` is the cudaStream_t to launch on.
struct Context {
  void (*parallel)(int64_t tasks, void (*task)(const void* self, int64_t index), const void* self) = nullptr;
  void* stream = nullptr;
};

// Philox4x32-10 dropout: the key is *seed; element (row, col) takes lane col & 3 of the block at counter
// (col >> 2, row low, row high, 0) and is kept if u32 >= floor(p * 2^32); survivors are scaled by 1 / (1 -
// p). p = 0 means no dropout, and then seed may be null.
struct Dropout {
  double p = 0;
  const int64_t* seed = nullptr;
};

// Sums over rows (gradients of weights and biases) are taken in this many blocks of rows, whose sums are then
// added in their order: cut by shape alone, so that the bits do not depend on the number of threads. At least
// 32 rows a block, so that adding the blocks up is 3% of the work.
inline int64_t row_blocks(int64_t rows) { return rows < 64 ? 1 : rows < 2048 ? rows / 32 : 64; }

// h = dropout(x) + residual, rounded to dtype; y = (h - mean(h)) * rstd(h) * weight + bias,
// rstd = 1 / sqrt(mean((h - mean)^2) + eps). h may be null if there is neither dropout nor residual.
struct LayerNormForward {
  DType dtype;
  int64_t rows, cols;
  const void *x, *residual;
  int64_t x_stride, residual_stride;
  const float *weight, *bias;  // [cols], never null
  float eps;
  Dropout dropout;
  void *y, *h;         // [rows, cols], contiguous
  float *mean, *rstd;  // [rows]
};
void layer_norm_forward(const Context& context, const LayerNormForward& a);

// With g = dy * weight and n = (h - mean) * rstd: dresidual = rstd * (g - mean(g) - n * mean(g * n)) + dh;
// dx = dropout's mask and scale applied to dresidual; dweight = sum(dy * n), dbias = sum(dy) over rows.
// `partial` is scratch of row_blocks(rows) * 2 * cols floats: rows are cut by shape alone, so that
// the sums do not depend on the number of threads.
struct LayerNormBackward {
  DType dtype;
  int64_t rows, cols;
  const void *dy, *dh, *h;  // dy or dh may be null, not both
  int64_t dy_stride, dh_stride, h_stride;
  const float *weight, *mean, *rstd;  // weight [cols], never null
  Dropout dropout;
  void *dx, *dresidual;  // [rows, cols], contiguous; either may be null
  float *dweight, *dbias, *partial;
};
void layer_norm_backward(const Context& context, const LayerNormBackward& a);

// y = dropout(x) + residual. Its backward is the same kernel without a residual, applied to dy.
struct DropoutAdd {
  DType dtype;
  int64_t rows, cols;
  const void *x, *residual;
  int64_t x_stride, residual_stride;
  Dropout dropout;
  void* y;  // [rows, cols], contiguous
};
void dropout_add(const Context& context, const DropoutAdd& a);

// gelu(z) = z * (1 + erf(z / sqrt(2))) / 2; gelu_tanh(z) = z * sigmoid(2 u), u = sqrt(2 / pi) * (z + 0.044715
// z^3); relu(z) = max(z, 0), NaN for NaN; silu(z) = z * sigmoid(z).
enum class Activation : int32_t { kGelu, kGeluTanh, kRelu, kSilu };

// y = dropout(act(x + bias)).
struct BiasAct {
  DType dtype;
  Activation activation;
  int64_t rows, cols;
  const void* x;
  int64_t x_stride;
  const float* bias;  // [cols], or null
  Dropout dropout;
  void* y;  // [rows, cols], contiguous
};
void bias_act(const Context& context, const BiasAct& a);

// dx = act'(x + bias) * dropout's mask and scale applied to dy; dbias = sum(dx) over rows, before dx is
// rounded. `partial` is scratch of row_blocks(rows) * cols floats, needed with dbias: rows are cut by
// shape alone.
struct BiasActBackward {
  DType dtype;
  Activation activation;
  int64_t rows, cols;
  const void *dy, *x;
  int64_t dy_stride, x_stride;
  const float* bias;  // [cols], or null
  Dropout dropout;
  void* dx;  // [rows, cols], contiguous
  float *dbias, *partial;
};
void bias_act_backward(const Context& context, const BiasActBackward& a);

// A [batch, heads, seq, dim] tensor: strides in elements, dim contiguous.
struct Heads {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, seq = 0;
};

// What scaled dot-product attention reads. Query head h reads key and value head h / (heads / kv_heads).
//   s_ij = scale * q_i . k_j; softcap > 0: s = softcap * tanh(s / softcap);
//   s -= slope * |i + offset - j|; s += bias_ij
// Key j is kept for query i if i + offset - left <= j <= i + offset + right (left, right = -1: unlimited),
// j < kv_lengths[batch], mask_ij, and bias_ij > -inf. Keys from kv_lengths[batch] on are never read.
struct AttentionInputs {
  DType dtype;  // of q, k, v
  int64_t batch, heads, kv_heads, queries, keys, dim, value_dim;
  Heads q, k, v;
  const bool* mask;
  int64_t mask_strides[4];  // of [batch, heads, queries, keys]; 0 where it is broadcast; so are bias_strides
  DType bias_dtype;
  const void* bias;
  int64_t bias_strides[4];
  const int32_t* kv_lengths;  // [batch]
  float scale;
  int64_t offset, left, right;
  float softcap;
  const float* alibi_slopes;
  int64_t alibi_strides[2];  // of [batch, heads]
  Dropout dropout;           // of p_ij: counter (j >> 2, i, b * heads + h, 0), lane j & 3
};

// lse_i = log(sum_j exp(s_ij)); p_ij = exp(s_ij - lse_i), kept or dropped; out_i = sum_j p_ij v_j.
// Nothing to attend to: out 0, lse -inf. out is contiguous as [batch, queries, heads, value_dim], and the
// binding returns it transposed to [batch, heads, queries, value_dim]: joining the heads afterwards costs
// nothing.
struct AttentionForward {
  AttentionInputs in;
  void* out;
  float* lse;  // [batch, heads, queries], contiguous
};
void attention_forward(const Context& context, const AttentionForward& a);

// With dp_ij = dout_i . v_j, dropped as p was: ds_ij = p_ij (dp_ij - sum_j p_ij dp_ij + dlse_i); dbias = ds;
// through softcap ds *= 1 - tanh^2; dq_i = scale * sum_j ds_ij k_j; dk_j = scale * sum_i ds_ij q_i; dv_j =
// sum_i p_ij dout_i. dk and dv are summed over the query heads that read them. dq, dk and dv are contiguous
// as [batch, seq, heads, dim], and the binding returns them transposed to [batch, heads, seq, dim].
struct AttentionBackward {
  AttentionInputs in;
  Heads dout;         // may be null
  const float* dlse;  // [batch, heads, queries], contiguous; may be null
  void *dq, *dk, *dv;
  float* dbias;              // zeros in bias's shape, contiguous
  int64_t dbias_strides[4];  // 0 where bias is broadcast: its gradient is summed there
};
void attention_backward(const Context& context, const AttentionBackward& a);

// A boolean tensor read in place, whatever it broadcasts along: element (row, col) is at
// data[row_offset + col * col_stride], where row = (i_0, i_1, ...) over sizes, outermost first, and
// row_offset is the sum of i_k * strides[k]. data is null if there is no mask.
struct Mask {
  static constexpr int kDims = 8;
  const uint8_t* data = nullptr;
  int dims = 0;
  int64_t sizes[kDims] = {}, strides[kDims] = {}, col_stride = 0;
};

// y = e / sum(e), e = exp(s - max(s)), s = scale * x where attended and -inf elsewhere; 0 where s is nothing
// but -inf. causal: row r attends to its first r % cols + 1 columns, and reads no other.
struct SoftmaxForward {
  DType dtype;
  int64_t rows, cols;
  const void* x;
  int64_t x_stride;
  float scale;
  Mask mask;
  bool causal;
  void* y;  // [rows, cols], contiguous
};
void softmax_forward(const Context& context, const SoftmaxForward& a);

// dx = scale * y * (dy - sum(dy * y)).
struct SoftmaxBackward {
  DType dtype;
  int64_t rows, cols;
  const void *dy, *y;
  int64_t dy_stride, y_stride;
  float scale;
  bool causal;
  void* dx;  // [rows, cols], contiguous
};
void softmax_backward(const Context& context, const SoftmaxBackward& a);

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

}  // namespace fastlm
