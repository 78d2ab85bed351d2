// Blocks of memory that were given back and wait to be taken again: a fresh 32 MB costs about 10 ms of page
// faults, a block that was used before costs none. No torch here.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace fastlm {

class BlockCache {
 public:
  struct Statistics {
    size_t limit = 0, idle = 0, used = 0;  // bytes; the last two as mapped, rounded up to a size class
    int64_t hits = 0, misses = 0;          // blocks taken again, blocks asked of the system
  };

  // A block of at least `bytes`, aligned to a page; null where the system has no more.
  void* take(size_t bytes) {
    const size_t size = size_class(bytes);
    if (void* block = take_idle(size)) return block;
    void* const block = map(size);
    if (!block) return nullptr;
    const std::lock_guard lock(mutex_);
    used_.emplace(block, size);
    bytes_.used += size;
    ++bytes_.misses;
    return block;
  }

  bool owns(void* block) {
    const std::lock_guard lock(mutex_);
    return used_.contains(block);
  }

  // Keeps a block that this cache owns for the next who takes its size.
  void give_back(void* block) {
    std::vector<Block> surplus;
    {
      const std::lock_guard lock(mutex_);
      const auto found = used_.find(block);
      const size_t size = found->second;
      used_.erase(found);
      bytes_.used -= size;
      if (size > bytes_.limit) {
        surplus.push_back({block, size, 0});
      } else {
        idle_[size].push_back({block, size, ++clock_});
        bytes_.idle += size;
        drop_surplus(bytes_.limit, surplus);
      }
    }
    unmap(surplus);
  }

  // Idle bytes above the limit go back to the system, the longest idle first.
  void set_limit(size_t limit) {
    std::vector<Block> surplus;
    {
      const std::lock_guard lock(mutex_);
      bytes_.limit = limit;
      drop_surplus(limit, surplus);
    }
    unmap(surplus);
  }

  // Gives all idle blocks back to the system; returns their bytes.
  size_t trim() {
    std::vector<Block> surplus;
    {
      const std::lock_guard lock(mutex_);
      drop_surplus(0, surplus);
    }
    return unmap(surplus);
  }

  Statistics statistics() {
    const std::lock_guard lock(mutex_);
    return bytes_;
  }

  // Around fork(): no thread may hold the mutex while it is copied into the child. Idle blocks are shared
  // with the parent there, and copying them costs more than fresh ones: the child drops its own before it
  // takes.
  void before_fork() { mutex_.lock(); }
  void after_fork(bool child) {
    forked_ |= child;
    mutex_.unlock();
  }

 private:
  struct Block {
    void* data;
    size_t size;
    uint64_t since;  // when it became idle
  };

  static constexpr size_t kPage = 4096, kHugePage = size_t{2} << 20;
  static constexpr size_t kClasses = 8;  // size classes in [2^n, 2^(n+1)): at most one part in 8 is wasted

  static size_t size_class(size_t bytes) {
    const size_t step = std::max(kPage, std::bit_floor(bytes) / kClasses);
    return (bytes + step - 1) / step * step;
  }

  void* take_idle(size_t size) {
    std::vector<Block> surplus;
    void* block = nullptr;
    {
      const std::lock_guard lock(mutex_);
      if (forked_) drop_surplus(0, surplus);
      forked_ = false;
      const auto found = idle_.find(size);
      if (found != idle_.end()) {
        block = found->second.back().data;  // the one given back last: parts of it are still in cache
        remove_idle(found, found->second.end() - 1);
        used_.emplace(block, size);
        bytes_.used += size;
        ++bytes_.hits;
      }
    }
    unmap(surplus);
    return block;
  }

  using Idle = std::map<size_t, std::vector<Block>>;  // by size; each list oldest first, never empty

  void remove_idle(Idle::iterator of, std::vector<Block>::iterator block) {
    bytes_.idle -= of->first;
    of->second.erase(block);
    if (of->second.empty()) idle_.erase(of);
  }

  void drop_surplus(size_t limit, std::vector<Block>& surplus) {
    while (bytes_.idle > limit) {
      const auto oldest = std::min_element(idle_.begin(), idle_.end(), [](const auto& a, const auto& b) {
        return a.second.front().since < b.second.front().since;
      });
      surplus.push_back(oldest->second.front());
      remove_idle(oldest, oldest->second.begin());
    }
  }

  // The system is asked outside of the mutex: it takes milliseconds.
  static void* map(size_t size) {
    const size_t align = size >= kHugePage ? kHugePage : kPage;
    const size_t spare = align - kPage;
    void* mapped = mmap(nullptr, size + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    char* first = static_cast<char*>(mapped);
    const size_t before = -reinterpret_cast<uintptr_t>(first) % align;
    if (before > 0) munmap(first, before);
    if (spare > before) munmap(first + before + size, spare - before);
#ifdef MADV_HUGEPAGE
    if (align == kHugePage) madvise(first + before, size, MADV_HUGEPAGE);
#endif
    return first + before;
  }

  static size_t unmap(const std::vector<Block>& blocks) {
    size_t bytes = 0;
    for (const Block& block : blocks) {
      munmap(block.data, block.size);
      bytes += block.size;
    }
    return bytes;
  }

  std::mutex mutex_;
  std::unordered_map<void*, size_t> used_;  // block -> its size
  Idle idle_;
  Statistics bytes_;
  uint64_t clock_ = 0;
  bool forked_ = false;
};

}  // namespace fastlm
