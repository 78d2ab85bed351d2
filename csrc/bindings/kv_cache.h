// Caches of keys and values as contract/kv_cache.h has them.
#pragma once

#include "../contract/kv_cache.h"
#include "tensors.h"

namespace fastlm {

// table and lengths are contiguous and outlive what is returned.
inline CachePages pages_of(const Tensor& cache, const Tensor& table, const Tensor& lengths) {
  return {.pages = cache.size(0),
          .page = cache.size(2),
          .per_sequence = table.defined() ? table.size(1) : 1,
          .table = table.defined() ? table.const_data_ptr<int32_t>() : nullptr,
          .lengths = lengths.const_data_ptr<int32_t>()};
}

inline CacheStrides strides_of(const Tensor& cache, const OptionalTensor& scale) {
  CacheStrides s = {cache.stride(0), cache.stride(1), cache.stride(2), 0, 0, 0};
  if (given(scale)) {
    s.scale_page = scale->stride(0);
    s.scale_head = scale->stride(1);
    s.scale_slot = scale->stride(2);
  }
  return s;
}

inline Tensor contiguous_or_none(const OptionalTensor& t) { return given(t) ? t->contiguous() : Tensor(); }

// Read in place where the last dimension is contiguous.
inline Tensor readable_rows(const Tensor& t) {
  return t.stride(3) == 1 || t.size(3) == 1 ? t : t.contiguous();
}

}  // namespace fastlm
