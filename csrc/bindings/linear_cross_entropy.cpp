// linear_cross_entropy: rows in chunks; a chunk's logits by torch's matmul, their gradient in their place by
// the kernel of cross_entropy.h, and two more matmuls: no row's logits outlive its chunk. Half precision
// becomes float32 first: torch.mm takes that at ten times the rate here. In C++ because Python between the
// matmuls cost 180 us, nine times what a small problem takes.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <string_view>

#include "../contract/cross_entropy.h"
#include "tensors.h"
#include "torch_ops.h"

namespace fastlm {
namespace {

constexpr int64_t kRows = 512;          // of a chunk: with 256 the matmuls are 7% slower, with 1024 2% faster
constexpr int64_t kElements = 1 << 26;  // of its logits at most, 256 MB: more classes, fewer rows in a chunk
constexpr int64_t kClasses = 1024;      // of a matmul: 22% faster than all; few half weights are float32

using Flags = std::array<bool, 3>;  // of the gradients of x, weight, bias
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Options {
  int64_t ignore_index;
  double label_smoothing, z_loss;
};

// What a loss is computed of. Rows whose target is ignored cost no more than their zeros.
struct Problem {
  Tensor x, weight;
  OptionalTensor bias;
  Tensor target;  // contiguous
  Options options;
  int64_t counted;  // rows that are not ignored

  bool ignores(int64_t row) const { return target.const_data_ptr<int64_t>()[row] == options.ignore_index; }
};

// In float32: losses of target's shape, and the gradients, empty where they are not needed.
struct Results {
  Tensor losses, dx, dweight, dbias;
};

// The gradient of a row's loss is values[row * step].
struct RowGradients {
  const float* values;
  int64_t step;
};

Problem problem(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
                const Options& options) {
  Problem p{x, weight, bias, target.contiguous(), options, 0};
  for (int64_t row = 0; row < target.numel(); ++row) p.counted += !p.ignores(row);
  return p;
}

// Past the dispatcher where nothing is to do: 0.5 us each.
Tensor cast(const Tensor& t, at::ScalarType type) { return t.scalar_type() == type ? t : t.to(type); }
Tensor part(const Tensor& t, int64_t dim, int64_t begin, int64_t size) {
  return size == t.size(dim) ? t : t.narrow(dim, begin, size);
}
Tensor shaped(const Tensor& t, at::IntArrayRef sizes) { return t.sizes() == sizes ? t : t.reshape(sizes); }

// Rows of each chunk but the last, for even chunks as few as the bounds allow: cut by shape, whatever the
// values are.
int64_t chunk_rows(int64_t rows, int64_t classes) {
  const int64_t most = std::clamp<int64_t>(kElements / classes, 1, kRows);
  const int64_t chunks = std::max<int64_t>(1, (rows + most - 1) / most);
  return (rows + chunks - 1) / chunks;
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
  const Tensor memory = new_tensor({step, classes}, at::kFloat), sums = new_tensor({2, step}, at::kFloat);
  float* logits = memory.mutable_data_ptr<float>();
  for (int64_t begin = 0; begin < n; begin += step) {
    const int64_t count = std::min(step, n - begin);
    const Tensor chunk = part(rows, 0, begin, count), scores = part(memory, 0, 0, count);
    logits_of(chunk, weight, bias, scores);
    cross_entropy_in_place(context_of(rows),
                           {.in = {.dtype = DType::kFloat32,
                                   .rows = count,
                                   .cols = classes,
                                   .logits = logits,
                                   .logits_stride = classes,
                                   .target = targets + begin,
                                   .ignore_index = p.options.ignore_index,
                                   .label_smoothing = static_cast<float>(p.options.label_smoothing),
                                   .z_loss = static_cast<float>(p.options.z_loss),
                                   .reduction = Reduction::kNone},
                            .logits = logits,
                            .dloss = dloss ? dloss + begin : nullptr,
                            .row_loss = to.losses.mutable_data_ptr<float>() + begin,
                            .maximum = sums.mutable_data_ptr<float>(),
                            .exp_sum = sums.mutable_data_ptr<float>() + step});
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

Results run(const Problem& p, const RowGradients& of_row, const Flags& needs) {
  const int64_t n = p.target.numel(), size = p.x.size(-1), classes = p.weight.size(0);
  const bool every = p.counted == n, any = needs[0] || needs[1] || needs[2];
  const auto sum = [&](at::IntArrayRef sizes, bool wanted) {
    return wanted && p.counted == 0 ? at::zeros(sizes, at::kFloat) : new_tensor(sizes, at::kFloat, wanted);
  };
  Results to{new_tensor(p.target.sizes(), at::kFloat), new_tensor(p.x.sizes(), at::kFloat, needs[0]),
             sum({classes, size}, needs[1]), sum({classes}, needs[2])};
  const Tensor dx = needs[0] ? shaped(to.dx, {n, size}) : Tensor();
  const Tensor dloss = new_tensor({p.counted}, at::kFloat, any);
  const Tensor used = new_tensor({p.counted}, at::kLong, !every);
  for (int64_t row = 0, i = 0; row < n; ++row) {
    if (p.ignores(row)) continue;
    if (any) dloss.mutable_data_ptr<float>()[i] = of_row.values[row * of_row.step];
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

// By which a sum of losses is divided.
double divisor(const Problem& p, std::string_view reduction) {
  return reduction == "mean" ? static_cast<double>(std::max<int64_t>(p.counted, 1)) : 1.0;
}

Tensor total(const Tensor& losses, double divided_by) {
  const float* values = losses.const_data_ptr<float>();
  double sum = 0;
  for (int64_t i = 0; i < losses.numel(); ++i) sum += static_cast<double>(values[i]);
  const Tensor loss = new_tensor({}, at::kFloat);
  *loss.mutable_data_ptr<float>() = static_cast<float>(sum / divided_by);
  return loss;
}

// The loss, and the gradients for dloss = 1 as far as `early` says: with them, no logits are computed twice.
Four forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& target,
             int64_t ignore_index, double label_smoothing, double z_loss, std::string_view reduction,
             bool widened, const Flags& early) {
  const WithinKernel guard;
  const Problem p = problem(x, weight, bias, target, {ignore_index, label_smoothing, z_loss});
  const double divided_by = divisor(p, reduction);
  const float dloss = static_cast<float>(1 / divided_by);
  const Results r = run(p, {&dloss, 0}, early);
  const Tensor loss = reduction == "none" ? r.losses : total(r.losses, divided_by);
  return {cast(loss, widened ? at::kFloat : x.scalar_type()), r.dx, r.dweight, r.dbias};
}

// Scales what forward computed, or computes the logits again: with "none" each row has its own dloss.
Three backward(const Tensor& dloss, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
               const Tensor& target, const Tensor& unit_dx, const Tensor& unit_dweight,
               const Tensor& unit_dbias, int64_t ignore_index, double label_smoothing, double z_loss,
               std::string_view reduction, const Flags& early, const Flags& needs) {
  const WithinKernel guard;
  const Tensor gradient = floats_of(dloss);
  const auto known = [&](int i) { return early[i] || !needs[i]; };
  Results r;
  if (known(0) && known(1) && known(2)) {
    const auto scaled = [&](const Tensor& unit, bool wanted) {
      return wanted ? unit.mul(gradient) : new_tensor({}, at::kFloat, false);
    };
    r = {{}, scaled(unit_dx, needs[0]), scaled(unit_dweight, needs[1]), scaled(unit_dbias, needs[2])};
  } else {
    const Problem p = problem(x, weight, bias, target, {ignore_index, label_smoothing, z_loss});
    const Tensor each = reduction == "mean" ? gradient.div(divisor(p, reduction)) : gradient;
    r = run(p, {each.const_data_ptr<float>(), reduction == "none" ? 1 : 0}, needs);
  }
  const at::ScalarType type = x.scalar_type();
  return {cast(r.dx, type), cast(r.dweight, type), cast(r.dbias, type)};
}

}  // namespace

FASTLM_LIBRARY(m) {
  m.impl("linear_cross_entropy." BACKEND, &forward);
  m.impl("linear_cross_entropy_backward." BACKEND, &backward);
}

}  // namespace fastlm
