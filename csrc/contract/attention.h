// attention: what its kernels compute, and their signatures.
#pragma once

#include "../kernels.h"

namespace fastlm {

// A [batch, heads, seq, dim] tensor: strides in elements, dim contiguous. Packed sequences, [tokens, heads,
// dim], have no stride between them: sequence b is rows starts[b] to starts[b + 1] - 1.
struct Heads {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, seq = 0;
  // [batch + 1], ascending within the tensor's rows; null: not packed. On a GPU in its memory and whatever
  // the caller gave: sequence b starts at the largest of starts[: b + 1] that is within the tensor.
  const int32_t* starts = nullptr;
};

// What scaled dot-product attention reads. Query head h reads key and value head h / (heads / kv_heads).
//   s_ij = scale * q_i . k_j; softcap > 0: s = softcap * tanh(s / softcap);
//   s -= slope * |i + offset - j|; s += bias_ij
// Key j is kept for query i if i + offset - left <= j <= i + offset + right (left, right = -1: unlimited),
// j < kv_lengths[batch], mask_ij, and bias_ij > -inf. Keys from kv_lengths[batch] on are never read. Of
// packed sequences i and j count inside their own one; q, k and v have starts (q's, and one for k and v),
// there is neither mask nor bias nor kv_lengths, and what [batch, seq, heads, dim] and [batch, heads,
// queries] below call batch and seq is all tokens, [tokens, heads, dim] and [heads, tokens]; what is of no
// token of any sequence a CPU does not write, and a GPU as if it had nothing to attend to.
struct AttentionInputs {
  DType dtype;                                                    // of q, k, v
  int64_t batch, heads, kv_heads, queries, keys, dim, value_dim;  // packed: queries, keys of all sequences
  Heads q, k, v;
  const bool* mask;
  int64_t mask_strides[4];  // of [batch, heads, queries, keys]; 0 where it is broadcast; so are bias_strides
  DType bias_dtype;
  const void* bias;
  int64_t bias_strides[4];
  const int32_t* kv_lengths;  // [batch]
  float scale;
  int64_t offset, left, right;
  bool bottom_right;  // packed: offset is every sequence's own number of keys less queries
  float softcap;
  const float* alibi_slopes;
  int64_t alibi_strides[2];  // of [batch, heads]
  Dropout dropout;           // of p_ij: counter (j >> 2, i, b * heads + h, 0), lane j & 3
  // On a GPU: of a packed sequence only so many rows are one; the rest is of no sequence.
  int64_t longest_q = 0, longest_k = 0;
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
  float* dbias_lost;         // null, or likewise: what the sums of many heads have rounded away
  int64_t dbias_strides[4];  // 0 where bias is broadcast: its gradient is summed there
  // On a GPU: what forward gave, and room for three numbers of each row of lse, which the kernel of dq leaves
  // for the others.
  const void* out = nullptr;
  const float* lse = nullptr;
  float* rows = nullptr;
};
void attention_backward(const Context& context, const AttentionBackward& a);

}  // namespace fastlm
