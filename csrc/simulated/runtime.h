// The stand-in CUDA runtime, as fastlm/testing/ptxsim/cuda.py and the bindings see it.
#pragma once

#include <cstddef>

namespace fastlm::simulated {

// What executes a launch; returns a cudaError_t. parameters: a pointer to each of the kernel's, whose sizes
// its PTX says; grid, block: three sizes each.
using Launch = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, size_t shared,
                       void** parameters, void* stream);

// The current stream: whatever number Python last set.
void* stream();

}  // namespace fastlm::simulated
