// append_kv: what its kernel computes, and its signature.
#pragma once

#include "kv_cache.h"

namespace fastlm {

// Keys or values of new tokens, and the cache that they go to.
struct AppendedRows {
  const void* source;  // [batch, kv_heads, tokens, dim], dim contiguous
  int64_t batch_stride, head_stride, token_stride;
  int64_t dim;
  void* cache;
  float* scales;  // null unless quantised
  CacheStrides at;
};

// Token s of sequence b is written to slot lengths[b] + s, or dropped where there is none. Quantised: scale =
// max|x| / 127 of each token and head, q = rint(x / scale), half to even; q = 0 where scale is 0, infinite or
// NaN.
struct AppendKv {
  DType dtype;  // of k and v, and of the caches unless quantised
  bool quantised;
  int64_t batch, kv_heads, tokens;
  CachePages pages;
  AppendedRows k, v;
};
void append_kv(const Context& context, const AppendKv& a);

}  // namespace fastlm
