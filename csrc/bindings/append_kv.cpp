#include "../contract/append_kv.h"

#include "kv_cache.h"

namespace fastlm::of_append_kv {
namespace {

AppendedRows rows_into(const Tensor& x, const Tensor& cache, const OptionalTensor& scale) {
  return {.source = x.const_data_ptr(),
          .batch_stride = x.stride(0),
          .head_stride = x.stride(1),
          .token_stride = x.stride(2),
          .dim = x.size(3),
          .cache = cache.mutable_data_ptr(),
          .scales = given(scale) ? scale->mutable_data_ptr<float>() : nullptr,
          .at = strides_of(cache, scale)};
}

// What autograd saved of a cache before must not be used afterwards: it looks at this counter.
void note_write(const Tensor& t) { t.unsafeGetTensorImpl()->bump_version(); }

void forward(const Tensor& k_, const Tensor& v_, const Tensor& k_cache, const Tensor& v_cache,
             const Tensor& kv_lengths, const OptionalTensor& block_table, const OptionalTensor& k_scale,
             const OptionalTensor& v_scale) {
  const Tensor k = readable_rows(k_), v = readable_rows(v_), lengths = kv_lengths.contiguous();
  const Tensor table = contiguous_or_none(block_table);
  note_write(k_cache);
  note_write(v_cache);
  if (given(k_scale)) note_write(*k_scale);
  if (given(v_scale)) note_write(*v_scale);
  append_kv(context_of(k), {.dtype = dtype_of(k),
                            .quantised = given(k_scale),
                            .batch = k.size(0),
                            .kv_heads = k.size(1),
                            .tokens = k.size(2),
                            .pages = pages_of(k_cache, table, lengths),
                            .k = rows_into(k, k_cache, k_scale),
                            .v = rows_into(v, v_cache, v_scale)});
}

}  // namespace

FASTLM_LIBRARY(m) { m.impl("append_kv." BACKEND, &forward); }

}  // namespace fastlm::of_append_kv
