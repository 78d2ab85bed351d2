// THE CONTRACT of the native kernels, on raw pointers: here what all share, in contract/<op>.h each op's
// formula and signatures. csrc/cpu and csrc/cuda implement it, csrc/bindings calls it. No torch here. All
// sums are taken in float32.
//
// Conventions, unless a struct says otherwise: rows are `cols` contiguous elements and start
// `<name>_stride` elements apart; a null pointer means that an argument was not given or that an
// output is not wanted; statistics are float32 whatever `dtype` is.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastlm {

// How a kernel is run: on a CPU `parallel` runs task(self, i) once for every i in [0, tasks), maybe on
// several threads and in any order; on a GPU `stream` is the cudaStream_t to launch on.
struct Context {
  void (*parallel)(int64_t tasks, void (*task)(const void* self, int64_t index), const void* self) = nullptr;
  void* stream = nullptr;
};

// Philox4x32-10 dropout: the key is *seed; element (row, col) takes lane col & 3 of the block at counter
// (col >> 2, row low, row high, 0) and is kept if u32 >= floor(p * 2^32); survivors are scaled by 1 / (1 -
// p). p = 0 means no dropout, and then seed may be null.
struct Dropout {
  double p = 0;
  const int64_t* seed = nullptr;
};

// A weight, bias or table beside the rows, and its gradient: on a CPU float32, as the bindings convert it.
// On a GPU converting takes a launch, as long as a small call's whole work: there it is float32 or, if
// narrow, of `dtype`.
#if defined(FASTLM_GPU)
struct Parameter {
  const void* data = nullptr;
  bool narrow = false;
};
struct ParameterGradient {
  void* data = nullptr;
  bool narrow = false;
};
#else
using Parameter = const float*;
using ParameterGradient = float*;
#endif

// Sums over rows (gradients of weights and biases) are taken in this many blocks of rows, whose sums are then
// added in their order: cut by shape alone, so that the bits do not depend on the number of threads.
#if defined(FASTLM_GPU)
// A block of threads for each: 512 are four for each multiprocessor of an A100, and 8 rows at least keep
// partial sums below the bytes of the rows themselves.
inline int64_t row_blocks(int64_t rows) { return rows < 16 ? 1 : rows < 4096 ? rows / 8 : 512; }
#else
// At least 32 rows a block, so that adding the blocks up is 3% of the work.
inline int64_t row_blocks(int64_t rows) { return rows < 64 ? 1 : rows < 2048 ? rows / 32 : 64; }
#endif

}  // namespace fastlm
