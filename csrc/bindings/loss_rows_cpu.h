// linear_cross_entropy's rows where the values of targets are known: those that count are picked first, the
// others cost no more than their zeros. Half precision becomes float32: torch.mm takes that at ten times the
// rate on CPUs.
#pragma once

#include <ATen/ops/zeros.h>

#include <cstring>

#include "loss_rows.h"

namespace fastlm {
namespace {

constexpr int64_t kClasses = 1024;  // of a matmul: 22% faster than all; few half weights are float32

// What a loss is computed of.
struct Problem {
  Tensor x, weight;
  OptionalTensor bias;
  Tensor target;  // contiguous
  LossOptions options;
  int64_t counted;  // rows that are not ignored

  bool ignores(int64_t row) const { return target.const_data_ptr<int64_t>()[row] == options.ignore_index; }
};

Problem problem(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
                const LossOptions& options) {
  Problem p{x, weight, bias, target.contiguous(), options, 0};
  for (int64_t row = 0; row < target.numel(); ++row) p.counted += !p.ignores(row);
  return p;
}

// f(first class, how many, their rows of the weight in float32).
template <class F>
void each_block(const Tensor& weight, const F& f) {
  const int64_t classes = weight.size(0);
  for (int64_t begin = 0; begin < classes; begin += kClasses) {
    const int64_t size = std::min(kClasses, classes - begin);
    f(begin, size, cast(part(weight, 0, begin, size), at::kFloat));
  }
}

void logits_of(const Tensor& rows, const Tensor& weight, const Tensor& bias, const Tensor& logits) {
  each_block(weight, [&](int64_t begin, int64_t size, const Tensor& block) {
    Tensor out = part(logits, 1, begin, size);
    if (bias.defined()) {
      at::addmm_out(out, part(bias, 0, begin, size), rows, block.t());
    } else {
      at::mm_out(out, rows, block.t());
    }
  });
}

// Adds what a chunk gives to dweight and dbias, or writes it there if it is the first; writes its dx.
void add_gradients(const Tensor& dlogits, const Tensor& rows, const Tensor& weight, bool first, Tensor dx,
                   Results& to) {
  if (dx.defined()) {
    each_block(weight, [&](int64_t begin, int64_t size, const Tensor& block) {
      dx.addmm_(part(dlogits, 1, begin, size), block, begin == 0 ? 0 : 1);
    });
  }
  if (to.dweight.numel()) to.dweight.addmm_(dlogits.t(), rows, first ? 0 : 1);
  if (!to.dbias.numel()) return;
  if (first) {
    at::sum_out(to.dbias, dlogits, at::IntArrayRef{0});
  } else {
    to.dbias.add_(dlogits.sum(0));
  }
}

// rows [n, in], targets and dloss [n] of rows that count; losses and dx are written to their first n rows.
void run_chunks(const Problem& p, const Tensor& rows, const int64_t* targets, const float* dloss, Tensor dx,
                Results& to) {
  const int64_t n = rows.size(0), classes = p.weight.size(0), step = chunk_rows(n, classes);
  const Tensor weight = classes <= kClasses ? cast(p.weight, at::kFloat) : p.weight;  // once for all chunks
  const Tensor bias = given(p.bias) ? cast(*p.bias, at::kFloat) : Tensor();
  const Tensor memory = new_tensor({step, classes}, at::kFloat), sums = new_tensor({2 * step}, at::kFloat);
  for (int64_t begin = 0; begin < n; begin += step) {
    const int64_t count = std::min(step, n - begin);
    const Tensor chunk = part(rows, 0, begin, count), scores = part(memory, 0, 0, count);
    logits_of(chunk, weight, bias, scores);
    losses_at_once(scores, Tensor(), targets + begin, p.options, dloss ? dloss + begin : nullptr, scores,
                   to.losses.mutable_data_ptr<float>() + begin, sums);
    add_gradients(scores, chunk, weight, begin == 0, dx.defined() ? part(dx, 0, begin, count) : dx, to);
  }
}

// Moves the first rows of `values`, of `cols` each, to the places of the rows that count, from the last on,
// for no row's place is before it; the others become 0.
void spread(const Problem& p, float* values, int64_t cols) {
  const size_t bytes = static_cast<size_t>(cols) * sizeof(float);
  int64_t from = p.counted;
  for (int64_t row = p.target.numel() - 1; row >= 0; --row) {
    if (p.ignores(row)) {
      std::memset(values + row * cols, 0, bytes);
    } else if (--from != row) {
      std::memcpy(values + row * cols, values + from * cols, bytes);
    }
  }
}

// By which a sum of losses is divided.
double divisor(const Problem& p, bool mean) {
  return mean ? static_cast<double>(std::max<int64_t>(p.counted, 1)) : 1.0;
}

Results run(const Problem& p, const RowGradients& of_rows, const Flags& needs) {
  const int64_t n = p.target.numel(), size = p.x.size(-1), classes = p.weight.size(0);
  const bool every = p.counted == n, any = needs[0] || needs[1] || needs[2];
  const auto sum = [&](at::IntArrayRef sizes, bool wanted) {
    return wanted && p.counted == 0 ? at::zeros(sizes, at::kFloat) : new_tensor(sizes, at::kFloat, wanted);
  };
  Results to{new_tensor(p.target.sizes(), at::kFloat), new_tensor(p.x.sizes(), at::kFloat, needs[0]),
             sum({classes, size}, needs[1]), sum({classes}, needs[2])};
  const Tensor dx = needs[0] ? shaped(to.dx, {n, size}) : Tensor();
  const Tensor dloss = new_tensor({p.counted}, at::kFloat, any);
  const float one = 1, *values = of_rows.dloss.defined() ? of_rows.dloss.const_data_ptr<float>() : &one;
  const int64_t value_step = of_rows.dloss.defined() && of_rows.dloss.numel() > 1 ? 1 : 0;
  const double over = divisor(p, of_rows.mean);
  const Tensor used = new_tensor({p.counted}, at::kLong, !every);
  for (int64_t row = 0, i = 0; row < n; ++row) {
    if (p.ignores(row)) continue;
    if (any) dloss.mutable_data_ptr<float>()[i] = static_cast<float>(values[row * value_step] / over);
    if (!every) used.mutable_data_ptr<int64_t>()[i] = row;
    ++i;
  }
  const Tensor rows = shaped(p.x, {n, size});
  const float* gradients = any ? dloss.const_data_ptr<float>() : nullptr;
  if (every) {
    run_chunks(p, cast(rows, at::kFloat), p.target.const_data_ptr<int64_t>(), gradients, dx, to);
    return to;
  }
  const Tensor counted = shaped(p.target, {n}).index_select(0, used);
  run_chunks(p, cast(rows.index_select(0, used), at::kFloat), counted.const_data_ptr<int64_t>(), gradients,
             dx, to);
  spread(p, to.losses.mutable_data_ptr<float>(), 1);
  if (needs[0]) spread(p, to.dx.mutable_data_ptr<float>(), size);
  return to;
}

// The sum of losses, or their mean over the rows that count: float32.
Tensor total(const Problem& p, const Tensor& losses, bool mean) {
  const float* values = losses.const_data_ptr<float>();
  double sum = 0;
  for (int64_t i = 0; i < losses.numel(); ++i) sum += static_cast<double>(values[i]);
  const Tensor loss = new_tensor({}, at::kFloat);
  *loss.mutable_data_ptr<float>() = static_cast<float>(sum / divisor(p, mean));
  return loss;
}

}  // namespace
}  // namespace fastlm
