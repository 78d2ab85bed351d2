// A cache of keys or values, as decode_attention reads it and append_kv writes it.
#pragma once

#include "../kernels.h"

namespace fastlm {

// Where token t of sequence b lies: in slot t % page of page table[b * per_sequence + t / page]. Without a
// table sequence b has page b alone. A page number outside [0, pages) is never followed.
struct CachePages {
  int64_t pages, page, per_sequence;
  const int32_t* table;    // [batch, per_sequence], contiguous; may be null
  const int32_t* lengths;  // [batch]; one outside [0, capacity()] is never followed
  int64_t capacity() const { return page * per_sequence; }
};

// Strides in elements of a cache [pages, kv_heads, page, dim], dim contiguous, and of its scales [pages,
// kv_heads, page]. A quantised cache holds int8 numbers, to be multiplied by their token's scale.
struct CacheStrides {
  int64_t page, head, slot;
  int64_t scale_page, scale_head, scale_slot;
};

}  // namespace fastlm
