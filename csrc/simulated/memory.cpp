// torch's CPU allocator while a simulated kernel runs: notes what is allocated, so that the simulator knows
// what a kernel may touch, and fills it with 0xFF (NaN), so that what a kernel forgets to write is seen.
#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <map>
#include <mutex>

namespace {

class Noting final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* const block = before->raw_allocate(bytes);
    if (!block) return {nullptr, nullptr, &release, c10::Device(c10::kCPU)};
    std::memset(block, 0xFF, bytes);
    const std::lock_guard lock(mutex);
    blocks[block] = bytes;
    return {block, block, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  static void release(void* block) {
    if (!block) return;
    {
      const std::lock_guard lock(mutex);
      blocks.erase(block);
    }
    before->raw_deallocate(block);
  }

  static inline std::mutex mutex;
  static inline std::map<void*, size_t> blocks;
  static inline c10::Allocator* before = nullptr;
};

Noting& noting() {  // never destroyed: tensors may outlive everything
  static Noting* const made = new Noting;
  return *made;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// From here to fastlm_note_end allocations are noted; those of before are forgotten.
EXPORT void fastlm_note_begin() {
  c10::Allocator* const now = c10::GetCPUAllocator();
  const std::lock_guard lock(Noting::mutex);
  Noting::blocks.clear();
  if (now == &noting()) return;
  Noting::before = now;
  c10::SetCPUAllocator(&noting());
}

EXPORT void fastlm_note_end() {
  if (c10::GetCPUAllocator() == &noting()) c10::SetCPUAllocator(Noting::before);
}

// Writes up to `room` live blocks' addresses and sizes; returns how many there are.
EXPORT size_t fastlm_noted(void** addresses, size_t* sizes, size_t room) {
  const std::lock_guard lock(Noting::mutex);
  size_t count = 0;
  for (const auto& [block, bytes] : Noting::blocks) {
    if (count < room) addresses[count] = block, sizes[count] = bytes;
    ++count;
  }
  return count;
}
