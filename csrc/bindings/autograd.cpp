// The autograd side of every op: one node, wired by what fastlm/_op.py read from the op's two schemas. In C++
// because an autograd.Function in Python costs 20 us forward and 30 us backward, which a small op never
// earns back.
#include <ATen/FuncTorchTLS.h>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "autograd_node.h"

namespace fastlm::of_autograd {
namespace {

bool needs_graph(const IValue* args, int64_t count) {
  if (!at::GradMode::is_enabled()) return false;
  for (int64_t i = 0; i < count; ++i) {
    if (args[i].isTensor() && args[i].toTensor().requires_grad()) return true;
  }
  return false;
}

// No transform of torch.func has a rule for a node in C++, nor has forward mode.
void refuse_transforms(const IValue* args, int64_t count) {
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (transforms) transforms->checkSupportsCppAutogradFunction();
  for (int64_t i = 0; i < count; ++i) {
    const bool dual = args[i].isTensor() && args[i].toTensor()._fw_grad(0).defined();
    TORCH_CHECK_NOT_IMPLEMENTED(!dual, "fastlm: no kernel has a rule for forward-mode gradients");
  }
}

void run_below_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

struct AutogradKernel : c10::OperatorKernel {
  Wiring wiring;
  explicit AutogradKernel(Wiring w) : wiring(std::move(w)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const IValue* args = stack->data() + stack->size() - wiring.arguments;
    if (!needs_graph(args, wiring.arguments)) return run_below_autograd(op, keys, stack);
    refuse_transforms(args, wiring.arguments);
    const NodePointer node = new_node<NodePointer>(args);
    {
      const at::AutoGradMode off(false);  // a kernel's body may be Python
      run_below_autograd(op, keys, stack);
    }
    static_cast<KernelNode*>(node.get())->record(node, stack->data() + stack->size() - wiring.outputs);
  }

  template <class Pointer>
  Pointer new_node(const IValue* args) const {
    torch::autograd::edge_list edges;
    for (int64_t i = 0; i < wiring.arguments; ++i) {
      if (args[i].isTensor()) edges.push_back(torch::autograd::impl::gradient_edge(args[i].toTensor()));
    }
    if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
      // The deleter of those releases.
      const auto deleter = [](auto* node) { deleteNode(node); };
      return Pointer(new KernelNode(wiring, std::move(edges), args), deleter);
    } else {
      return Pointer(c10::make_intrusive<KernelNode>(wiring, std::move(edges), args));
    }
  }
};

// What follows the dot of "op.backend"; empty without one.
std::string backend_of(const std::string& name) {
  const size_t dot = name.find('.');
  return dot == std::string::npos ? "" : name.substr(dot + 1);
}

// forward, backward: "op.backend"; reference_gradients: an op's name. The rest as in Wiring.
void register_autograd(const std::string& forward, const std::string& backward,
                       const std::string& reference_gradients, int64_t public_outputs, Ints saved_outputs,
                       Ints sources, Ints wanted, Ints gradient_of, Ints shared, Ints units) {
  const auto find = [](const std::string& name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(
        ("fastlm::" + name.substr(0, name.find('.'))).c_str(), backend_of(name).c_str());
  };
  const c10::FunctionSchema& schema = find(forward).schema();
  Wiring wiring{find(backward),
                find(reference_gradients),
                static_cast<int64_t>(schema.arguments().size()),
                static_cast<int64_t>(schema.returns().size()),
                public_outputs,
                std::move(saved_outputs),
                std::move(sources),
                std::move(wanted),
                std::move(gradient_of),
                std::move(shared),
                std::move(units),
                c10::Dispatcher::singleton().findSchema({"fastlm::scale_units", backend_of(forward)})};
  // Kept for ever: at exit the dispatcher may be gone before it.
  auto* library =
      new torch::Library(torch::Library::IMPL, "fastlm", c10::DispatchKey::Autograd, __FILE__, __LINE__);
  library->impl(forward.c_str(), torch::CppFunction::makeFromBoxedFunctor(
                                     std::make_unique<AutogradKernel>(std::move(wiring))));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastlm, m) {
  m.def(
      "register_autograd(str forward, str backward, str reference_gradients, int public_outputs,"
      " int[] saved_outputs, int[] sources, int[] wanted, int[] gradient_of, int[] shared,"
      " int[] units) -> ()",
      &register_autograd);
}

}  // namespace fastlm::of_autograd
