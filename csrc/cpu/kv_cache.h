// Looking up where a cached token lies.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../contract/kv_cache.h"

namespace fastlm {

struct Slot {
  int64_t page, index;  // page -1: there is no such slot
};

// The slot of token t of a sequence.
inline Slot slot_of(const CachePages& pages, int64_t batch, int64_t t) {
  if (t < 0 || t >= pages.capacity()) return {-1, 0};
  const int64_t entry = t / pages.page;
  const int64_t page = pages.table ? pages.table[batch * pages.per_sequence + entry] : batch;
  return page < 0 || page >= pages.pages ? Slot{-1, 0} : Slot{page, t % pages.page};
}

}  // namespace fastlm
