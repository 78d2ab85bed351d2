// decode_attention: what its kernel computes, and its signature.
#pragma once

#include "kv_cache.h"

namespace fastlm {

// Of sequence b, with n = lengths[b] and off = n - queries, query head h reading kv head h / (heads /
// kv_heads):
//   s_ij = scale * q_i . k_j; softcap > 0: s = softcap * tanh(s / softcap); s -= slope * |i + off - j|
// over the keys j <= i + off, j < n and, unless left < 0, j >= i + off - left; lse_i = log(sum_j exp(s_ij));
// out_i = sum_j exp(s_ij - lse_i) v_j. Nothing to attend to: out 0, lse -inf. Keys from n on are never read.
// out is contiguous as [batch, queries, heads, value_dim], and the binding returns it transposed to [batch,
// heads, queries, value_dim].
struct DecodeAttention {
  DType dtype;     // of q and out, and of the caches unless quantised
  bool quantised;  // int8 caches, with scales
  int64_t batch, heads, kv_heads, queries, dim, value_dim;
  const void* q;  // dim contiguous
  int64_t q_batch, q_head, q_query;
  CachePages pages;
  const void *k, *v;
  const float *k_scales, *v_scales;
  CacheStrides k_at, v_at;
  float scale;
  int64_t left;
  float softcap;
  const float* alibi_slopes;  // may be null
  int64_t alibi_batch, alibi_head;
  void* out;
  float* lse;                // [batch, heads, queries], contiguous
  float* scratch = nullptr;  // of decode_scratch() floats
};

// What the caller allocates, so that a GPU's allocator keeps it for the stream: by shapes alone.
#if defined(FASTLM_GPU)
int64_t decode_scratch(const DecodeAttention& a);
#else
inline int64_t decode_scratch(const DecodeAttention&) { return 0; }  // a CPU's threads have their own
#endif

void decode_attention(const Context& context, const DecodeAttention& a);

}  // namespace fastlm
