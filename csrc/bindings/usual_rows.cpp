// The usual calls of ops on rows. Each condition is that of check() in fastlm/_ops/<op>.py.
#include "usual_calls.h"

namespace fastlm::usual {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

// A norm's x: rows of at least one element.
const Tensor* rows_with_elements(PyObject* object) {
  const Tensor* x = floating(object);
  return x && x->dim() > 0 && x->size(-1) > 0 ? x : nullptr;
}

PyObject* norm_output(Tensor& y, Tensor& h, const OptionalTensor& residual) {
  return residual ? wrapped(y, h) : wrapped(y);
}

// Whether every target is a class or the index to ignore.
bool in_range(const Tensor& target, int64_t classes, int64_t ignore_index) {
  const int64_t* values = target.const_data_ptr<int64_t>();
  for (int64_t i = 0, rows = target.numel(); i < rows; ++i) {
    if ((values[i] < 0 || values[i] >= classes) && values[i] != ignore_index) return false;
  }
  return true;
}

// A matrix of x's type with this many columns; null for all else.
const Tensor* matrix(PyObject* object, int64_t cols, const Tensor& x) {
  const Tensor* t = dense(object);
  return t && t->scalar_type() == x.scalar_type() && t->dim() == 2 && t->size(1) == cols ? t : nullptr;
}

// None, or a vector of x's type: kept in *to.
bool matmul_bias(PyObject* object, int64_t size, const Tensor& x, OptionalTensor* to) {
  return parameter(object, size, x, to) && (!*to || (*to)->scalar_type() == x.scalar_type());
}

// What both cross-entropies are told of their targets.
struct LossOptions {
  int64_t ignore_index;
  double label_smoothing, z_loss;
  std::string_view reduction;
};

// ignore_index, label_smoothing, z_loss, reduction
bool loss_options(Arguments a, LossOptions* to) {
  const bool numbers =
      integer(a[0], &to->ignore_index) && number(a[1], &to->label_smoothing) && number(a[2], &to->z_loss);
  if (!numbers || to->label_smoothing < 0 || to->label_smoothing > 1 || to->z_loss < 0) return false;
  to->reduction = text(a[3]);
  return to->reduction == "mean" || to->reduction == "sum" || to->reduction == "none";
}

// The class of each row of x, or the index to ignore; null for all else.
const Tensor* targets_of(PyObject* object, const Tensor& x, int64_t classes, int64_t ignore_index) {
  const Tensor* t = integers(object, at::kLong);
  const bool fits = t && t->sizes() == x.sizes().slice(0, x.dim() - 1);
  return fits && in_range(*t, classes, ignore_index) ? t : nullptr;
}

}  // namespace

// x, weight, bias, eps, residual, dropout_p, seed
PyObject* norm_layer(Arguments a) {
  static const auto op =
      kernel<Three(const Tensor&, const OptionalTensor&, const OptionalTensor&, double, const OptionalTensor&,
                   double, const OptionalTensor&)>("fastlm::layer_norm");
  const Tensor* in = rows_with_elements(a[0]);
  OptionalTensor weight, bias, residual;
  double eps;
  if (!in || !parameter(a[1], in->size(-1), *in, &weight) || !parameter(a[2], in->size(-1), *in, &bias))
    return unusual();
  DropoutArguments drop;
  if (!number(a[3], &eps) || eps < 0 || !like_or_none(a[4], *in, &residual)) return unusual();
  if (!dropout(a[5], a[6], &drop)) return unusual();
  const Tensor x = *in;
  const bool graph = needs_graph(x, or_undefined(weight), or_undefined(bias), or_undefined(residual));
  auto [y, h, _] = run(op, graph, x, weight, bias, eps, residual, drop.p, drop.seed());
  return norm_output(y, h, residual);
}

// x, weight, eps, weight_offset, residual, dropout_p, seed
PyObject* norm_rms(Arguments a) {
  static const auto op =
      kernel<Three(const Tensor&, const OptionalTensor&, double, double, const OptionalTensor&, double,
                   const OptionalTensor&)>("fastlm::rms_norm");
  const Tensor* in = rows_with_elements(a[0]);
  OptionalTensor weight, residual;
  double eps, offset;
  if (!in || !parameter(a[1], in->size(-1), *in, &weight)) return unusual();
  if (!number(a[2], &eps) || eps < 0 || !number(a[3], &offset) || (!weight && offset != 0)) return unusual();
  DropoutArguments drop;
  if (!like_or_none(a[4], *in, &residual) || !dropout(a[5], a[6], &drop)) return unusual();
  const Tensor x = *in;
  const bool graph = needs_graph(x, or_undefined(weight), or_undefined(residual));
  auto [y, h, _] = run(op, graph, x, weight, eps, offset, residual, drop.p, drop.seed());
  return norm_output(y, h, residual);
}

// x, bias, activation, dropout_p, seed
PyObject* biased_activation(Arguments a) {
  static const auto op =
      kernel<Tensor(const Tensor&, const OptionalTensor&, c10::string_view, double, const OptionalTensor&)>(
          "fastlm::bias_act");
  const Tensor* in = floating(a[0]);
  OptionalTensor bias;
  c10::string_view name;
  if (!in || !parameter(a[1], in->dim() ? in->size(-1) : -1, *in, &bias)) return unusual();
  DropoutArguments drop;
  if (!activation(a[2], &name) || !dropout(a[3], a[4], &drop)) return unusual();
  const Tensor x = *in;
  Tensor y = run(op, needs_graph(x, or_undefined(bias)), x, bias, name, drop.p, drop.seed());
  return wrapped(y);
}

// gate, up, activation
PyObject* gated(Arguments a) {
  static const auto op = kernel<Tensor(const Tensor&, const Tensor&, c10::string_view)>("fastlm::glu");
  const Tensor *gate = floating(a[0]), *up = dense(a[1]);
  c10::string_view name;
  if (!gate || !alike(up, *gate) || !activation(a[2], &name)) return unusual();
  const Tensor left = *gate, right = *up;
  Tensor y = run(op, needs_graph(left, right), left, right, name);
  return wrapped(y);
}

// x, scale, mask, causal
PyObject* softmaxed(Arguments a) {
  static const auto op =
      kernel<Tensor(const Tensor&, double, const OptionalTensor&, bool)>("fastlm::softmax");
  const Tensor* in = floating(a[0]);
  double scale;
  bool causal;
  if (!in || !number(a[1], &scale) || a[2] != Py_None || !boolean(a[3], &causal)) return unusual();
  if (causal && (in->dim() < 2 || in->size(-1) != in->size(-2))) return unusual();
  const Tensor x = *in;
  Tensor y = run(op, needs_graph(x), x, scale, OptionalTensor(), causal);
  return wrapped(y);
}

// logits, target, ignore_index, label_smoothing, z_loss, reduction
PyObject* loss(Arguments a) {
  static const auto op = kernel<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, int64_t, double, double, std::string_view)>("fastlm::cross_entropy");
  const Tensor* logits = rows_with_elements(a[0]);
  LossOptions options;
  if (!logits || !loss_options(a + 2, &options)) return unusual();
  const Tensor* target = targets_of(a[1], *logits, logits->size(-1), options.ignore_index);
  if (!target) return unusual();
  const Tensor x = *logits, classes = *target;
  const auto [ignore_index, smoothing, z, reduction] = options;
  auto [result, maximum, sum, count] =
      run(op, needs_graph(x), x, classes, ignore_index, smoothing, z, reduction);
  return wrapped(result);
}

// x, weight, target, bias, ignore_index, label_smoothing, z_loss, reduction
PyObject* linear_loss(Arguments a) {
  using Early = std::array<bool, 3>;
  static const auto op = kernel<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, int64_t, double, double,
      std::string_view, bool, const Early&)>("fastlm::linear_cross_entropy");
  const Tensor* in = rows_with_elements(a[0]);
  const Tensor* rows = in ? matrix(a[1], in->size(-1), *in) : nullptr;
  LossOptions options;
  OptionalTensor bias;
  if (!rows || rows->size(0) == 0 || !loss_options(a + 4, &options)) return unusual();
  const Tensor* target = targets_of(a[2], *in, rows->size(0), options.ignore_index);
  if (!target || !matmul_bias(a[3], rows->size(0), *in, &bias)) return unusual();
  const Tensor x = *in, weight = *rows, classes = *target;
  const auto [ignore_index, smoothing, z, reduction] = options;
  const bool scalar = reduction != "none";
  const Early early = {scalar && needs_graph(x), scalar && needs_graph(weight),
                       scalar && needs_graph(or_undefined(bias))};
  const bool graph = needs_graph(x, weight, or_undefined(bias));
  auto [result, dx, dweight, dbias] =
      run(op, graph, x, weight, bias, classes, ignore_index, smoothing, z, reduction, false, early);
  return wrapped(result);
}

// x, residual, dropout_p, seed
PyObject* added(Arguments a) {
  static const auto op = kernel<Tensor(const Tensor&, const OptionalTensor&, double, const OptionalTensor&)>(
      "fastlm::dropout_add");
  const Tensor* in = floating(a[0]);
  OptionalTensor residual;
  DropoutArguments drop;
  if (!in || !like_or_none(a[1], *in, &residual) || !dropout(a[2], a[3], &drop)) return unusual();
  const Tensor x = *in;
  Tensor y = run(op, needs_graph(x, or_undefined(residual)), x, residual, drop.p, drop.seed());
  return wrapped(y);
}

// x, w1, b1, w2, b2, activation, dropout_p, seed
PyObject* fed_forward(Arguments a) {
  static const auto op = kernel<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
      c10::string_view, double, const OptionalTensor&)>("fastlm::feed_forward");
  const Tensor* in = floating(a[0]);
  const Tensor* first = in && in->dim() > 0 ? matrix(a[1], in->size(-1), *in) : nullptr;
  const Tensor* second = first ? matrix(a[3], first->size(0), *in) : nullptr;
  OptionalTensor b1, b2;
  c10::string_view name;
  if (!second || !matmul_bias(a[2], first->size(0), *in, &b1)) return unusual();
  DropoutArguments drop;
  if (!matmul_bias(a[4], second->size(0), *in, &b2) || !activation(a[5], &name)) return unusual();
  if (!dropout(a[6], a[7], &drop)) return unusual();
  const Tensor x = *in, w1 = *first, w2 = *second;
  const bool graph = needs_graph(x, w1, or_undefined(b1), w2, or_undefined(b2));
  auto [y, z] = run(op, graph, x, w1, b1, w2, b2, name, drop.p, drop.seed());
  return wrapped(y);
}

}  // namespace fastlm::usual
