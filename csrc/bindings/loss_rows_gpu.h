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

// out = a @ b, plus out if `keep`; a and b of one type. out: float32, or of their type if nothing is kept.
void add_product(Tensor out, const Tensor& a, const Tensor& b, bool keep) {
  const int beta = keep ? 1 : 0;
  if (a.scalar_type() == at::kFloat) {
    at::addmm_out(out, out, a, b, beta);
    return;
  }
#if defined(FASTLM_CUDA)
  if (out.scalar_type() == at::kFloat) {
    at::addmm_out(out, out, a, b, at::kFloat, beta);
  } else {
    at::mm_out(out, a, b);
  }
#else  // the same sums: products of halves are exact in float32
  out.copy_(at::addmm(out.to(at::kFloat), a.to(at::kFloat), b.to(at::kFloat), beta));
#endif
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

// Chunks whose gradients wait for one another, in half precision: each addition to dweight moves 8 bytes a
// weight, on an H200 as long as the products of 700 rows.
constexpr int64_t kGroup = 4;
// Weights from which on dweight may be the matmul's own result in half precision: of fewer cuBLAS may split a
// sum, and add its parts in half precision.
constexpr int64_t kUnsplit = 1 << 23;

// Rows whose gradients meet the matmuls together.
int64_t group_rows(const Problem& p, bool gradients) {
  const int64_t n = p.target.numel(), step = chunk_rows(n, p.weight.size(0));
  return gradients && p.x.scalar_type() != at::kFloat ? std::min(n, kGroup * step) : step;
}

// A group's share of the gradients: writes its dx (undefined: not wanted), adds to dbias and to dweight.
void add_gradients(const Tensor& dlogits, const Tensor& rows, const Tensor& ignored, const Tensor& weight,
                   bool first, Tensor dx, Results& to) {
  for_parts(weight.size(0), [&](int64_t begin, int64_t size) {
    const Tensor share = part(dlogits, 1, begin, size);
    if (dx.defined()) add_product(dx, share, part(weight, 0, begin, size), begin > 0);
    if (!to.dweight.numel()) return;
    Tensor dweight = part(to.dweight, 0, begin, size);
    if (size < kEven && dweight.scalar_type() != at::kFloat) {  // what is over: few sums, which may be split
      const Tensor sums = new_tensor(dweight.sizes(), at::kFloat);
      add_product(sums, share.t(), rows, false);
      dweight.copy_(sums);
    } else {
      add_product(dweight, share.t(), rows, !first);
    }
  });
  if (dx.defined()) dx.masked_fill_(ignored, 0);  // 0 times an infinite weight is NaN
  if (to.dbias.numel()) to.dbias.add_(dlogits.sum(0, false, at::kFloat));
}

// Chunk by chunk: losses, and gradients where `each`, those of the rows' losses, is defined.
void run_chunks(const Problem& p, const Tensor& each, Tensor dx, Results& to) {
  const int64_t n = p.target.numel(), classes = p.weight.size(0), step = chunk_rows(n, classes);
  const int64_t group = group_rows(p, each.defined()), pitch = pitch_of(classes);
  const Tensor all_rows = shaped(p.x, {n, p.x.size(-1)});
  const Tensor bias = given(p.bias) ? p.bias->contiguous() : Tensor();
  const Tensor memory = new_tensor({step, pitch}, at::kFloat), sums = new_tensor({2 * step}, at::kFloat);
  const bool in_place = p.x.scalar_type() == at::kFloat;
  const Tensor halves = new_tensor({group, pitch}, p.x.scalar_type(), each.defined() && !in_place);
  const Tensor& gradients = in_place ? memory : halves;
  const auto rows_of = [&](const Tensor& of, int64_t begin, int64_t count) {
    return part(part(of, 0, begin, count), 1, 0, classes);
  };
  for (int64_t start = 0; start < n; start += group) {
    const int64_t size = std::min(group, n - start);
    const Tensor ignored = part(p.target, 0, start, size).eq(p.options.ignore_index).unsqueeze_(1);
    const Tensor rows = part(all_rows, 0, start, size).masked_fill(ignored, 0);
    for (int64_t begin = 0; begin < size; begin += step) {
      const int64_t count = std::min(step, size - begin), row = start + begin;
      const Tensor logits = rows_of(memory, 0, count);
      for_parts(classes, [&](int64_t first, int64_t some) {
        add_product(part(logits, 1, first, some), part(rows, 0, begin, count),
                    part(p.weight, 0, first, some).t(), false);
      });
      losses_at_once(logits, bias, p.target.const_data_ptr<int64_t>() + row, p.options,
                     each.defined() ? each.const_data_ptr<float>() + row : nullptr,
                     each.defined() ? rows_of(gradients, begin, count) : Tensor(),
                     to.losses.mutable_data_ptr<float>() + row, sums);
    }
    if (!each.defined()) continue;
    add_gradients(rows_of(gradients, 0, size), rows, ignored, p.weight, start == 0,
                  dx.defined() ? part(dx, 0, start, size) : dx, to);
  }
}

Results run(const Problem& p, const RowGradients& of_rows, const Flags& needs) {
  const int64_t n = p.target.numel(), size = p.x.size(-1), classes = p.weight.size(0);
  const auto floats = p.x.options().dtype(at::kFloat);
  const bool any = needs[0] || needs[1] || needs[2];
  const bool written_once = n <= group_rows(p, any) && classes * size >= kUnsplit;
  Results to{new_tensor(p.losses, at::kFloat), new_tensor(p.x.sizes(), at::kFloat, needs[0]),
             new_tensor({classes, size}, written_once ? kept_type(p.x) : at::kFloat, needs[1]),
             new_tensor({classes}, at::kFloat, needs[2])};
  if (n == 0) to.dweight.zero_();
  to.dbias.zero_();
  if (n == 0) return to;
  Tensor each, late;
  if (any) {
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
