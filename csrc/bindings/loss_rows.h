// What linear_cross_entropy's loops over rows share: loss_rows_cpu.h knows which rows count before it begins,
// loss_rows_gpu.h never does.
#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include "../contract/cross_entropy.h"
#include "tensors.h"

namespace fastlm {

// Rows of a chunk, and elements of its logits at most: more classes, fewer rows.
#if defined(FASTLM_GPU)
// To add its share to dweight a chunk moves 8 bytes a weight: on an H200 as long as the products of 700 rows.
constexpr int64_t kRows = 2048, kElements = 1 << 27;
#else
// With 256 rows the matmuls are 7% slower, with 1024 2% faster. 256 MB of logits.
constexpr int64_t kRows = 512, kElements = 1 << 26;
#endif

using Flags = std::array<bool, 3>;  // of the gradients of x, weight, bias

struct LossOptions {
  int64_t ignore_index;
  double label_smoothing, z_loss;
};

// In float32: losses of target's shape, and the gradients, empty where they are not needed.
struct Results {
  Tensor losses, dx, dweight, dbias;
};

// The gradient of a row's loss: 1 or, where it is defined, dloss, which has one for all rows or one for each;
// of a mean over the number of rows that count.
struct RowGradients {
  Tensor dloss;  // float32, contiguous
  bool mean;
};

// Past the dispatcher where nothing is to do: 0.5 us each.
inline Tensor cast(const Tensor& t, at::ScalarType type) { return t.scalar_type() == type ? t : t.to(type); }
inline Tensor part(const Tensor& t, int64_t dim, int64_t begin, int64_t size) {
  return size == t.size(dim) ? t : t.narrow(dim, begin, size);
}
inline Tensor shaped(const Tensor& t, at::IntArrayRef sizes) {
  return t.sizes() == sizes ? t : t.reshape(sizes);
}

// Rows of each chunk but the last, for even chunks as few as the bounds allow: cut by shape, whatever the
// values are.
inline int64_t chunk_rows(int64_t rows, int64_t classes) {
  const int64_t most = std::clamp<int64_t>(kElements / classes, 1, kRows);
  const int64_t chunks = std::max<int64_t>(1, (rows + most - 1) / most);
  return (rows + chunks - 1) / chunks;
}

// A chunk's losses and, where dloss [rows] is not null, the gradient in the place of its logits [rows,
// classes], whose rows may be farther apart. sums: float32, room for 2 * rows.
inline void losses_in_place(const Tensor& logits, const int64_t* target, const LossOptions& options,
                            const float* dloss, float* losses, const Tensor& sums) {
  const int64_t rows = logits.size(0), classes = logits.size(1);
  float* data = logits.mutable_data_ptr<float>();
  cross_entropy_in_place(context_of(logits),
                         {.in = {.dtype = DType::kFloat32,
                                 .rows = rows,
                                 .cols = classes,
                                 .logits = data,
                                 .logits_stride = logits.stride(0),
                                 .target = target,
                                 .ignore_index = options.ignore_index,
                                 .label_smoothing = static_cast<float>(options.label_smoothing),
                                 .z_loss = static_cast<float>(options.z_loss),
                                 .reduction = Reduction::kNone},
                          .logits = data,
                          .dloss = dloss,
                          .row_loss = losses,
                          .maximum = sums.mutable_data_ptr<float>(),
                          .exp_sum = sums.mutable_data_ptr<float>() + rows});
}

}  // namespace fastlm
