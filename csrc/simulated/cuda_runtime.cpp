// A stand-in for the CUDA runtime: the symbols that nvcc's host code and csrc/cuda import, for machines
// without a GPU. A launch is checked as a GPU's driver would, and handed to a callback with the kernel's
// name; errors are the runtime's own numbers. No CUDA header is needed.
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "runtime.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Error { kSuccess = 0, kInvalidValue = 1, kInvalidConfiguration = 9, kInvalidDeviceFunction = 98 };
constexpr int kMaxDynamicSharedMemorySize = 8;    // cudaFuncAttributeMaxDynamicSharedMemorySize
constexpr size_t kSharedWithoutOptIn = 48 << 10;  // bytes of a block
constexpr unsigned kThreads = 1024, kLastAxis = 64, kGridYZ = 65535, kGridX = 0x7fffffff;

struct Three {  // dim3
  unsigned x = 1, y = 1, z = 1;
};

struct Kernel {
  std::string name;
  size_t shared = kSharedWithoutOptIn;  // that a launch may ask for
};

struct State {
  std::mutex mutex;
  std::map<const void*, Kernel> kernels;  // by the address of their host stubs
  fastlm::simulated::Launch launch = nullptr;
  size_t most_shared = kSharedWithoutOptIn;
  void* stream = nullptr;
};

State& state() {  // made by the first registration: those run before main
  static State* const made = new State;
  return *made;
}

thread_local int last_error = kSuccess;

int failed(int error) {
  if (error != kSuccess) last_error = error;
  return error;
}

int start(const void* function, Three grid, Three block, void** parameters, size_t shared, void* stream) {
  State& s = state();
  Kernel kernel;
  {
    const std::lock_guard lock(s.mutex);
    const auto found = s.kernels.find(function);
    if (found == s.kernels.end() || !s.launch) return failed(kInvalidDeviceFunction);
    kernel = found->second;
  }
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kThreads || block.z > kLastAxis) return failed(kInvalidConfiguration);
  if (uint64_t{grid.x} * grid.y * grid.z == 0) return failed(kInvalidConfiguration);
  if (grid.x > kGridX || grid.y > kGridYZ || grid.z > kGridYZ) return failed(kInvalidConfiguration);
  if (shared > kernel.shared) return failed(kInvalidValue);
  const unsigned grids[] = {grid.x, grid.y, grid.z}, blocks[] = {block.x, block.y, block.z};
  return failed(s.launch(kernel.name.c_str(), grids, blocks, shared, parameters, stream));
}

}  // namespace

void* fastlm::simulated::stream() { return state().stream; }

// What Python sets: who executes, the bytes of shared memory that a block of the GPU may ask for, the stream.
EXPORT void fastlm_simulate(fastlm::simulated::Launch launch, size_t most_shared, void* stream) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  s.launch = launch, s.most_shared = most_shared, s.stream = stream;
  for (auto& [function, kernel] : s.kernels)
    kernel.shared = kSharedWithoutOptIn;  // another GPU knows no opt-in
}

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*,
                            void*, int*) {
  const std::lock_guard lock(state().mutex);
  state().kernels[host].name = name;
}

// For kernel<<<...>>>: their stubs fetch the configuration again and launch.
thread_local struct {
  Three grid, block;
  size_t shared;
  void* stream;
} pushed;

unsigned __cudaPushCallConfiguration(Three grid, Three block, size_t shared, void* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Three* grid, Three* block, size_t* shared, void** stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *stream = pushed.stream;
  return kSuccess;
}
int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return kSuccess;
}
int __cudaLaunchKernel(const void* kernel, Three grid, Three block, void** parameters, size_t shared,
                       void* stream) {
  return start(kernel, grid, block, parameters, shared, stream);
}
int cudaLaunchKernel(const void* function, Three grid, Three block, void** parameters, size_t shared,
                     void* stream) {
  return start(function, grid, block, parameters, shared, stream);
}

int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  const auto found = s.kernels.find(function);
  if (found == s.kernels.end()) return failed(kInvalidDeviceFunction);
  if (attribute != kMaxDynamicSharedMemorySize || value < 0) return failed(kInvalidValue);
  if (static_cast<size_t>(value) > s.most_shared) return failed(kInvalidValue);
  found->second.shared = static_cast<size_t>(value);
  return kSuccess;
}

int cudaGetLastError() {
  const int error = last_error;
  last_error = kSuccess;
  return error;
}
int cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(int error) {  // in the runtime's own words
  switch (error) {
    case kSuccess:
      return "no error";
    case kInvalidValue:
      return "invalid argument";
    case kInvalidConfiguration:
      return "invalid configuration argument";
    case kInvalidDeviceFunction:
      return "invalid device function";
    default:
      return "unspecified launch failure";
  }
}

}  // extern "C"
