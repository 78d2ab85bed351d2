// Looking up where a cached token lies.
#pragma once

#include "../contract/kv_cache.h"

namespace fastlm {

struct Slot {
  int64_t page, index;
};

__device__ inline int64_t capacity_of(const CachePages& pages) { return pages.page * pages.per_sequence; }

// The slot of token t < capacity_of(pages) of a sequence; its page may be outside [0, pages.pages). One
// division of 32 bits, as t fits into them: one of 64 takes some 70 instructions.
__device__ inline Slot slot_of(const CachePages& pages, int64_t batch, uint32_t t) {
  if (!pages.table) return {batch, t};
  const uint32_t page = static_cast<uint32_t>(min(pages.page, int64_t{0xffffffff})), entry = t / page;
  return {pages.table[batch * pages.per_sequence + entry], t - entry * page};
}

__device__ inline bool exists(const CachePages& pages, int64_t page) {
  return page >= 0 && page < pages.pages;
}

}  // namespace fastlm
