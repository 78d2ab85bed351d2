#include "../contract/decode_attention.h"

#include "kv_cache.h"

namespace fastlm::of_decode_attention {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& q_, const Tensor& k_cache, const Tensor& v_cache,
                                   const Tensor& kv_lengths, const OptionalTensor& block_table,
                                   const OptionalTensor& k_scale, const OptionalTensor& v_scale, double scale,
                                   int64_t left, double softcap, const OptionalTensor& alibi_slopes) {
  const Tensor q = readable_rows(q_), k = readable_rows(k_cache), v = readable_rows(v_cache);
  const Tensor lengths = kv_lengths.contiguous(), table = contiguous_or_none(block_table);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), value_dim = v.size(3);
  const Tensor out = new_tensor({batch, queries, heads, value_dim}, q.scalar_type()).transpose(1, 2);
  const Tensor lse = float_output({batch, heads, queries}, q);
  DecodeAttention a = {.dtype = dtype_of(q),
                       .quantised = given(k_scale),
                       .batch = batch,
                       .heads = heads,
                       .kv_heads = k.size(1),
                       .queries = queries,
                       .dim = q.size(3),
                       .value_dim = value_dim,
                       .q = q.const_data_ptr(),
                       .q_batch = q.stride(0),
                       .q_head = q.stride(1),
                       .q_query = q.stride(2),
                       .pages = pages_of(k, table, lengths),
                       .k = k.const_data_ptr(),
                       .v = v.const_data_ptr(),
                       .k_scales = given(k_scale) ? k_scale->const_data_ptr<float>() : nullptr,
                       .v_scales = given(v_scale) ? v_scale->const_data_ptr<float>() : nullptr,
                       .k_at = strides_of(k, k_scale),
                       .v_at = strides_of(v, v_scale),
                       .scale = static_cast<float>(scale),
                       .left = left,
                       .softcap = static_cast<float>(softcap),
                       .alibi_slopes = given(alibi_slopes) ? alibi_slopes->const_data_ptr<float>() : nullptr,
                       .alibi_batch = given(alibi_slopes) ? alibi_slopes->stride(0) : 0,
                       .alibi_head = given(alibi_slopes) ? alibi_slopes->stride(1) : 0,
                       .out = out.mutable_data_ptr(),
                       .lse = lse.mutable_data_ptr<float>()};
  Tensor scratch;
  if (const int64_t floats = decode_scratch(a)) {
    scratch = float_output({floats}, q);
    a.scratch = scratch.mutable_data_ptr<float>();
  }
  decode_attention(context_of(q), a);
  return {out, lse};
}

}  // namespace

FASTLM_LIBRARY(m) { m.impl("decode_attention." BACKEND, &forward); }

}  // namespace fastlm::of_decode_attention
