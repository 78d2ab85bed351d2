// fastlm.cpu.reuse_memory(): torch's CPU allocator, with large blocks kept for the next tensor.
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <torch/library.h>

#include "block_cache.h"

namespace fastlm::of_cpu_memory {
namespace {

// Smaller tensors stay with the allocator that was there before: malloc keeps those blocks itself.
constexpr size_t kSmallest = size_t{256} << 10;

// Never destroyed: tensors are freed until the very end of the process.
BlockCache& cache() {
  static BlockCache* const made = new BlockCache;
  return *made;
}

class ReusingAllocator final : public c10::Allocator {
 public:
  explicit ReusingAllocator(c10::Allocator* before) { before_ = before; }

  c10::DataPtr allocate(size_t bytes) override {
    void* block = bytes < kSmallest || bytes > PTRDIFF_MAX ? nullptr : cache().take(bytes);
    if (!block) return allocate_before(bytes);
    c10::profiledCPUMemoryReporter().New(block, bytes);
    return {block, block, &release, c10::Device(c10::kCPU)};
  }

  // oneDNN frees through the allocator of the day what it took from the one before: `release` takes both.
  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  // Where it fails though memory is idle here, that is given up for one more try; then torch's error is
  // raised.
  static c10::DataPtr allocate_before(size_t bytes) {
    try {
      return before_->allocate(bytes);
    } catch (const c10::Error&) {
      if (cache().trim() == 0) throw;
    }
    return before_->allocate(bytes);
  }

  static void release(void* block) {
    if (!block) return;
    if (!cache().owns(block)) return before_->raw_deleter()(block);
    c10::profiledCPUMemoryReporter().Delete(block);
    cache().give_back(block);
  }

  static inline c10::Allocator* before_ = nullptr;
};

void install() {
  c10::Allocator* const before = c10::GetCPUAllocator();
  TORCH_CHECK(before->raw_deleter(),
              "reuse_memory: torch's CPU allocator was replaced by one without raw_deleter");
  auto* const ours = new ReusingAllocator(before);
  c10::SetCPUAllocator(ours);
  TORCH_CHECK(c10::GetCPUAllocator() == ours, "reuse_memory: an allocator of higher priority is set");
  pthread_atfork([] { cache().before_fork(); }, [] { cache().after_fork(false); },
                 [] { cache().after_fork(true); });
}

void reuse_memory(int64_t limit) {
  [[maybe_unused]] static const bool installed = (install(), true);
  cache().set_limit(static_cast<size_t>(limit));
}

int64_t trim() { return static_cast<int64_t>(cache().trim()); }

std::vector<int64_t> statistics() {
  const BlockCache::Statistics s = cache().statistics();
  return {static_cast<int64_t>(s.limit), static_cast<int64_t>(s.idle), static_cast<int64_t>(s.used), s.hits,
          s.misses};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlm, CompositeExplicitAutograd, m) {
  m.impl("cpu_reuse_memory", &reuse_memory);
  m.impl("cpu_trim", &trim);
  m.impl("cpu_memory_statistics", &statistics);
}

}  // namespace fastlm::of_cpu_memory
