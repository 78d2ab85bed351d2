// linear_cross_entropy's rows where only the GPU knows which of them count: all are taken, the ignored as
// zeros, and nothing waits for the GPU. Matmuls take operands of x's type and add up in float32, so that
// gradients meet them rounded to x's type.
#pragma once

#include <ATen/ops/ones.h>

#include "loss_rows.h"

namespace fastlm {
namespace {

// What a loss is computed of.
struct Problem {
  Tensor x, weight;
  OptionalTensor bias;
  Tensor target;  // [rows], contiguous
  LossOptions options;
  at::DimVector losses;  // their shape
};

Problem problem(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
                const LossOptions& options) {
  return {
      x, weight, bias, target.contiguous().view({target.numel()}), options, at::DimVector(target.sizes())};
}

// The number of rows that count, 1 at least.
Tensor counted(const Problem& p) { return p.target.ne(p.options.ignore_index).sum().clamp_min_(1); }

// out = a @ b, plus out if `keep`; out float32, a and b of one type.
void add_product(Tensor out, const Tensor& a, const Tensor& b, bool keep) {
  const int beta = keep ? 1 : 0;
  if (a.scalar_type() == at::kFloat) {
    at::addmm_out(out, out, a, b, beta);
  } else {
#if defined(FASTLM_CUDA)
    at::addmm_out(out, out, a, b, at::kFloat, beta);
#else  // the same sums: products of halves are exact in float32
    at::addmm_out(out, out, a.to(at::kFloat), b.to(at::kFloat), beta);
#endif
  }
}

// Where a size or a stride is odd, cuBLAS takes kernels for any alignment: of 50257 classes they took 31 ms
// on an H200, where others need about 6. So rows of logits begin at multiples of 32 bytes, and products are
// taken of as many classes as are a multiple of 16, then of the rest.
constexpr int64_t kEven = 16;
int64_t pitch_of(int64_t classes) { return (classes + kEven - 1) / kEven * kEven; }

// Calls f(first class, classes) for both parts, or for the one there is.
template <class F>
void for_parts(int64_t classes, F&& f) {
  const int64_t even = classes / kEven * kEven;
  if (even) f(int64_t{0}, even);
  if (classes > even) f(even, classes - even);
}

// A chunk's share of the gradients: writes its dx (undefined: not wanted), adds to dbias and to dweight.
void add_gradients(const Tensor& dlogits, const Tensor& rounded, const Tensor& chunk, const Tensor& ignored,
                   const Tensor& weight, bool first, Tensor dx, Results& to) {
  for_parts(weight.size(0), [&](int64_t begin, int64_t size) {
    const Tensor share = part(rounded, 1, begin, size);
    if (dx.defined()) add_product(dx, share, part(weight, 0, begin, size), begin > 0);
    if (to.dweight.numel()) add_product(part(to.dweight, 0, begin, size), share.t(), chunk, !first);
  });
  if (dx.defined()) dx.masked_fill_(ignored, 0);  // 0 times an infinite weight is NaN
  if (to.dbias.numel()) to.dbias.add_(dlogits.sum(0));
}

// Chunk by chunk: losses, and gradients where `each`, those of the rows' losses, is defined.
void run_chunks(const Problem& p, const Tensor& each, Tensor dx, Results& to) {
  const int64_t n = p.target.numel(), classes = p.weight.size(0), step = chunk_rows(n, classes);
  const Tensor rows = shaped(p.x, {n, p.x.size(-1)});
  const Tensor bias = given(p.bias) ? cast(*p.bias, at::kFloat) : Tensor();
  const int64_t pitch = pitch_of(classes);
  const Tensor memory = new_tensor({step, pitch}, at::kFloat), sums = new_tensor({2 * step}, at::kFloat);
  const Tensor halves =
      new_tensor({step, pitch}, p.x.scalar_type(), each.defined() && p.x.scalar_type() != at::kFloat);
  for (int64_t begin = 0; begin < n; begin += step) {
    const int64_t count = std::min(step, n - begin);
    const Tensor target = part(p.target, 0, begin, count);
    const Tensor ignored = target.eq(p.options.ignore_index).unsqueeze_(1);
    const Tensor chunk = part(rows, 0, begin, count).masked_fill(ignored, 0);
    const Tensor whole = part(memory, 0, 0, count);
    Tensor logits = part(whole, 1, 0, classes);
    if (bias.defined()) logits.copy_(bias.expand_as(logits));
    for_parts(classes, [&](int64_t first, int64_t size) {
      add_product(part(logits, 1, first, size), chunk, part(p.weight, 0, first, size).t(), bias.defined());
    });
    losses_in_place(logits, target.const_data_ptr<int64_t>(), p.options,
                    each.defined() ? each.const_data_ptr<float>() + begin : nullptr,
                    to.losses.mutable_data_ptr<float>() + begin, sums);
    if (!each.defined()) continue;
    Tensor rounded = logits;
    if (halves.numel()) {  // past the rows' ends too: one stretch of memory is copied faster than rows
      rounded = part(part(halves, 0, 0, count).copy_(whole), 1, 0, classes);
    }
    add_gradients(logits, rounded, chunk, ignored, p.weight, begin == 0,
                  dx.defined() ? part(dx, 0, begin, count) : dx, to);
  }
}

Results run(const Problem& p, const RowGradients& of_rows, const Flags& needs) {
  const int64_t n = p.target.numel(), size = p.x.size(-1), classes = p.weight.size(0);
  const auto floats = p.x.options().dtype(at::kFloat);
  Results to{new_tensor(p.losses, at::kFloat), new_tensor(p.x.sizes(), at::kFloat, needs[0]),
             new_tensor({classes, size}, at::kFloat, needs[1]), new_tensor({classes}, at::kFloat, needs[2])};
  if (n == 0) to.dweight.zero_();
  to.dbias.zero_();
  if (n == 0) return to;
  Tensor each, late;
  if (needs[0] || needs[1] || needs[2]) {
    each = of_rows.dloss.defined() ? of_rows.dloss : at::ones({}, floats);
    if (of_rows.mean) each = each.div(counted(p));
    if (each.numel() == 1 && p.x.scalar_type() == at::kHalf) {
      late = each, each = at::ones({}, floats);  // float16 holds the gradients of a row's loss, not of a mean
    }
    each = each.reshape({each.numel()}).expand({n}).contiguous();
  }
  run_chunks(p, each, needs[0] ? shaped(to.dx, {n, size}) : Tensor(), to);
  if (late.defined()) to.dx.mul_(late), to.dweight.mul_(late), to.dbias.mul_(late);
  return to;
}

// The sum of losses, or their mean over the rows that count: float32.
Tensor total(const Problem& p, const Tensor& losses, bool mean) {
  const Tensor sum = losses.sum(at::kDouble);
  return cast(mean ? sum.div(counted(p)) : sum, at::kFloat);
}

}  // namespace
}  // namespace fastlm
