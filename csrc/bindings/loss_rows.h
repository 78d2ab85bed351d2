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

// losses: float32, of target's shape. The gradients: float32 or of kept_type, empty where they are not
// needed.
struct Results {
  Tensor losses, dx, dweight, dbias;
};

// Of gradients between forward and backward. bfloat16 as backward's results, in half of float32's memory and
// of its bytes; float16 holds the gradients of neither a mean over a million rows nor of a scaled loss.
inline at::ScalarType kept_type(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
}

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

// A chunk's losses and, where dloss [rows] is not null, the gradient of its logits [rows, classes], float32,
// whose rows may be farther apart. bias: added to them, or undefined. dlogits: for that gradient, may be the
// logits; undefined without one. sums: float32, room for 2 * rows.
inline void losses_at_once(const Tensor& logits, const Tensor& bias, const int64_t* target,
                           const LossOptions& options, const float* dloss, const Tensor& dlogits,
                           float* losses, const Tensor& sums) {
  const int64_t rows = logits.size(0);
  const bool wanted = dlogits.defined();
  cross_entropy_at_once(context_of(logits),
                        {.in = {.dtype = DType::kFloat32,
                                .rows = rows,
                                .cols = logits.size(1),
                                .logits = logits.const_data_ptr(),
                                .logits_stride = logits.stride(0),
                                .target = target,
                                .ignore_index = options.ignore_index,
                                .label_smoothing = static_cast<float>(options.label_smoothing),
                                .z_loss = static_cast<float>(options.z_loss),
                                .reduction = Reduction::kNone},
                         .dtype = bias.defined() ? dtype_of(bias)
                                  : wanted       ? dtype_of(dlogits)
                                                 : DType::kFloat32,
                         .bias = bias.defined() ? bias.const_data_ptr() : nullptr,
                         .dloss = dloss,
                         .dlogits = wanted ? dlogits.mutable_data_ptr() : nullptr,
                         .dlogits_stride = wanted ? dlogits.stride(0) : 0,
                         .row_loss = losses,
                         .maximum = sums.mutable_data_ptr<float>(),
                         .exp_sum = sums.mutable_data_ptr<float>() + rows});
}

}  // namespace fastlm
