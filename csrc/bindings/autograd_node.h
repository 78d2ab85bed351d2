// The node that a kernel's backward is in autograd's graph, and how it is wired. autograd.cpp makes them.
#pragma once

#include <ATen/ops/empty_like.h>
#include <ATen/ops/item.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace fastlm::of_autograd {
namespace {

using at::IValue;
using at::Tensor;
using torch::autograd::variable_list;
using torch::jit::Stack;
using Ints = std::vector<int64_t>;

// How a kernel and its backward fit together; indices count arguments and outputs in their schemas' order.
struct Wiring {
  c10::OperatorHandle backward, reference_gradients;
  int64_t arguments;  // of the forward kernel
  int64_t outputs;    // of the forward kernel; the first `public_outputs` are differentiable
  int64_t public_outputs;
  Ints saved_outputs;  // which the backward kernel reads
  Ints sources;        // of each backward argument: in gradients, arguments, outputs; -1: `needs`
  Ints wanted;         // of each entry of `needs`: the forward argument
  Ints gradient_of;    // of each forward argument: which result of the backward kernel; -1: none
  Ints shared;         // and where that is empty: which other result, or -2 - i: gradient i; -1: none
  Ints units;          // of each forward argument: which output is its gradient for a gradient 1; -1: none
  std::optional<c10::OperatorHandle> scale_units;  // the backend's own, where only a GPU knows the gradient
};

// Shared before torch 2.13, intrusive since.
using NodePointer = std::remove_cvref_t<decltype(std::declval<const Tensor&>().grad_fn())>;

// A kernel's backward in the graph. Not torch::autograd::Function: what that keeps by name, wraps and checks
// costs a call 10 us, forward and backward.
class KernelNode : public torch::autograd::Node {
 public:
  KernelNode(const Wiring& wiring, torch::autograd::edge_list&& edges, const IValue* args)
      : Node(std::move(edges)), wiring_(wiring) {
    saved_.reserve(next_edges().size() + wiring.saved_outputs.size());
    constants_.reserve(wiring.arguments);
    for (int64_t i = 0; i < wiring.arguments; ++i) {
      is_tensor_.push_back(args[i].isTensor());
      if (is_tensor_[i]) saved_.emplace_back(args[i].toTensor(), false);
      constants_.push_back(is_tensor_[i] ? IValue() : args[i]);
    }
  }

  // outputs: of the kernel. The public ones become this node's, through `self`.
  void record(const NodePointer& self, const IValue* outputs) {
    for (int64_t i = 0; i < wiring_.public_outputs; ++i)
      torch::autograd::set_history(outputs[i].toTensor(), self);
    for (const int64_t i : wiring_.saved_outputs)
      saved_.emplace_back(outputs[i].toTensor(), i < wiring_.public_outputs);
  }

  std::string name() const override { return wiring_.backward.operator_name().name; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    saved_.clear();
    released_ = true;
  }

  // One gradient for each argument that is a tensor.
  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Wiring& w = wiring_;
    std::vector<bool> needs;
    size_t tensors = 0;
    for (const bool tensor : is_tensor_) needs.push_back(tensor && task_should_compute_output(tensors++));
    variable_list found(w.arguments), compact;
    if (std::any_of(grads.begin(), grads.end(), [](const Tensor& g) { return g.defined(); })) {
      const std::vector<IValue> known = all_known(std::move(grads));
      if (at::GradMode::is_enabled()) {
        found = differentiable(w, known, needs);
      } else {
        found = units_are_there(w, known, needs) ? scaled_units(w, known, needs) : gradients(w, known, needs);
      }
    }
    compact.reserve(tensors);
    for (int64_t i = 0; i < w.arguments; ++i) {
      if (is_tensor_[i]) compact.push_back(std::move(found[i]));
    }
    return compact;
  }

 private:
  const Wiring& wiring_;
  std::vector<bool> is_tensor_;                        // of each argument
  std::vector<IValue> constants_;                      // the arguments that are not tensors, in their places
  std::vector<torch::autograd::SavedVariable> saved_;  // the others, then the outputs that backward reads
  bool released_ = false;

  // The output gradients, arguments and outputs of the kernel. Saved tensors are read once: checkpointing
  // recomputes them at the first look.
  std::vector<IValue> all_known(variable_list&& grads) {
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    const Wiring& w = wiring_;
    const NodePointer self = getptr();
    std::vector<IValue> known;
    known.reserve(w.public_outputs + w.arguments + w.outputs);
    for (Tensor& g : grads) known.push_back(g.defined() ? IValue(std::move(g)) : IValue());
    size_t next = 0;
    for (int64_t i = 0; i < w.arguments; ++i)
      known.push_back(is_tensor_[i] ? IValue(saved_[next++].unpack(self)) : constants_[i]);
    known.resize(known.size() + w.outputs);
    for (const int64_t i : w.saved_outputs)
      known[w.public_outputs + w.arguments + i] = saved_[next++].unpack(self);
    return known;
  }

  // Whether forward computed all gradients that are needed, and their memory is free to be written to.
  static bool units_are_there(const Wiring& w, const std::vector<IValue>& known,
                              const std::vector<bool>& needs) {
    if (torch::autograd::get_current_graph_task_keep_graph()) return false;
    for (int64_t i = 0; i < w.arguments; ++i) {
      if (!needs[i]) continue;
      if (w.units[i] < 0 || unit_of(w, known, i).sym_sizes() != argument_of(w, known, i).sym_sizes())
        return false;
    }
    return true;
  }

  static Tensor argument_of(const Wiring& w, const std::vector<IValue>& known, int64_t argument) {
    return known[w.public_outputs + argument].toTensor();
  }

  static Tensor unit_of(const Wiring& w, const std::vector<IValue>& known, int64_t argument) {
    return known[w.public_outputs + w.arguments + w.units[argument]].toTensor();
  }

  // By what forward computed: in place, as a copy of a large weight's gradient would cost its memory again,
  // or where it has to be of another type in one pass.
  static variable_list scaled_units(const Wiring& w, const std::vector<IValue>& known,
                                    const std::vector<bool>& needs) {
    const Tensor gradient = known[0].toTensor();
    const bool traced = c10::impl::TorchDispatchModeTLS::any_modes_set() || gradient.is_meta();
    const bool by_kernel = !traced && w.scale_units;
    const bool is_one = !traced && !by_kernel && gradient.is_cpu() && gradient.item().toDouble() == 1.0;
    const Tensor factor = by_kernel ? gradient.to(at::kFloat) : gradient;
    variable_list found(w.arguments);
    for (int64_t i = 0; i < w.arguments; ++i) {
      if (!needs[i]) continue;
      const Tensor unit = unit_of(w, known, i);
      const at::ScalarType type = argument_of(w, known, i).scalar_type();
      found[i] = is_one                       ? unit.to(type)
                 : unit.scalar_type() == type ? scaled_in_place(w, unit, factor, by_kernel)
                                              : scaled(unit, gradient, type);
    }
    return found;
  }

  // What a hook on saved tensors gave back may lie otherwise than what forward made.
  static Tensor scaled_in_place(const Wiring& w, Tensor unit, const Tensor& factor, bool by_kernel) {
    if (!by_kernel || !unit.is_contiguous()) return unit.mul_(factor_of(unit, factor));
    Stack stack{unit, factor};
    w.scale_units->callBoxed(&stack);
    return unit;
  }

  static Tensor scaled(const Tensor& unit, const Tensor& gradient, at::ScalarType type) {
    Tensor result = at::empty_like(unit, unit.options().dtype(type));
    return at::mul_out(result, unit, gradient);
  }

  // Of no axis, a float32 gradient, as autocast's, would be rounded to a bfloat16 unit's type first.
  static Tensor factor_of(const Tensor& unit, const Tensor& gradient) {
    return gradient.scalar_type() == unit.scalar_type() ? gradient : gradient.view({1});
  }

  // By the backward kernel.
  static variable_list gradients(const Wiring& w, const std::vector<IValue>& known,
                                 const std::vector<bool>& needs) {
    Stack stack;
    for (const int64_t source : w.sources) {
      if (source >= 0) {
        stack.push_back(known[source]);
        continue;
      }
      c10::List<bool> wanted;
      for (const int64_t i : w.wanted) wanted.push_back(needs[i]);
      stack.emplace_back(std::move(wanted));
    }
    w.backward.callBoxed(&stack);
    variable_list found(w.arguments);
    for (int64_t i = 0; i < w.arguments; ++i) {
      if (!needs[i]) continue;
      if (w.gradient_of[i] >= 0) found[i] = stack[w.gradient_of[i]].toTensor();
      if (w.shared[i] == -1 || (found[i].defined() && found[i].sym_numel() != 0)) continue;
      found[i] = w.shared[i] >= 0 ? stack[w.shared[i]].toTensor() : known[-2 - w.shared[i]].toTensor();
    }
    return found;
  }

  // By the reference, differentiable again: what double backward runs on.
  static variable_list differentiable(const Wiring& w, const std::vector<IValue>& known,
                                      const std::vector<bool>& needs) {
    c10::List<std::optional<Tensor>> grads;
    for (int64_t i = 0; i < w.public_outputs; ++i) grads.push_back(known[i].toOptional<Tensor>());
    Stack stack(known.begin() + w.public_outputs, known.begin() + w.public_outputs + w.arguments);
    c10::List<bool> wanted;
    for (const bool need : needs) wanted.push_back(need);
    stack.emplace_back(std::move(grads));
    stack.emplace_back(std::move(wanted));
    w.reference_gradients.callBoxed(&stack);
    const variable_list given = stack[0].toTensorVector();
    variable_list found(w.arguments);
    size_t next = 0;
    for (int64_t i = 0; i < w.arguments; ++i) {
      if (needs[i]) found[i] = given[next++];
    }
    return found;
  }
};

}  // namespace
}  // namespace fastlm::of_autograd
