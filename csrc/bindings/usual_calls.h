// What the builtins of usual_calls.cpp share. Each runs one op's public call if it is a usual one, and
// returns None if it is not: then the Python function goes on with its checks, its words for errors and its
// choice of a backend. So every condition here must imply that Python's check passes the arguments on as they
// are, and that it would choose the CPU kernel.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/randint.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <string_view>
#include <utility>

#include "tensors.h"

namespace fastlm::usual {

// The arguments of a builtin, in the order in which the Python function passes them.
using Arguments = PyObject* const*;

// Whether calls here mean what they say: no autocast, tracing, functional transform or mode of any kind.
inline bool nothing_special() {
  constexpr c10::DispatchKeySet always({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  return (keys.included_.raw_repr() & ~always.raw_repr()) == 0 &&
         keys.excluded_.has(c10::DispatchKey::AutocastCPU) && !at::impl::torch_function_mode_enabled();
}

// A dense CPU tensor of torch's own class with nothing behind it (a subclass, a wrapper, a lazy negation);
// null for all else. Borrowed from `object`.
inline const Tensor* dense(PyObject* object) {
  constexpr c10::DispatchKeySet plain({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                       c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& t = THPVariable_Unpack(object);
  const c10::DispatchKeySet keys = t.key_set();
  const bool fits = (keys.raw_repr() & ~plain.raw_repr()) == 0 && keys.has(c10::DispatchKey::CPU);
  return fits ? &t : nullptr;
}

// The same of a type that kernels take.
inline const Tensor* floating(PyObject* object) {
  const Tensor* t = dense(object);
  if (!t) return nullptr;
  const at::ScalarType type = t->scalar_type();
  return type == at::kFloat || type == at::kHalf || type == at::kBFloat16 ? t : nullptr;
}

inline const Tensor* integers(PyObject* object, at::ScalarType type) {
  const Tensor* t = dense(object);
  return t && t->scalar_type() == type && t->is_contiguous() ? t : nullptr;
}

inline bool alike(const Tensor* t, const Tensor& other) {
  return t && t->scalar_type() == other.scalar_type() && t->sizes() == other.sizes();
}

// None, or a vector of `cols` in x's type or float32: kept in *to.
inline bool parameter(PyObject* object, int64_t cols, const Tensor& x, OptionalTensor* to) {
  if (object == Py_None) return true;
  const Tensor* t = floating(object);
  if (!t || t->dim() != 1 || t->size(0) != cols) return false;
  if (t->scalar_type() != x.scalar_type() && t->scalar_type() != at::kFloat) return false;
  *to = *t;
  return true;
}

// None, or a tensor like x: kept in *to.
inline bool like_or_none(PyObject* object, const Tensor& x, OptionalTensor* to) {
  if (object == Py_None) return true;
  const Tensor* t = dense(object);
  if (!alike(t, x)) return false;
  *to = *t;
  return true;
}

// A finite float, not an int or a bool.
inline bool number(PyObject* object, double* to) {
  if (!PyFloat_CheckExact(object)) return false;
  *to = PyFloat_AS_DOUBLE(object);
  return std::isfinite(*to);
}

inline bool integer(PyObject* object, int64_t* to) {
  int overflow = 0;
  if (!PyLong_CheckExact(object)) return false;
  *to = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

inline bool zero(PyObject* object) { return PyFloat_CheckExact(object) && PyFloat_AS_DOUBLE(object) == 0.0; }

// dropout_p and seed.
struct DropoutArguments {
  double p;
  OptionalTensor given;

  // int64 [1], drawn as _check.dropout_seed draws it; none without dropout. For calls that will run.
  OptionalTensor seed() const {
    if (p == 0) return {};
    return given ? given : at::randint(INT64_MIN, INT64_MAX, {1}, at::kLong);
  }
};

inline bool dropout(PyObject* p, PyObject* seed, DropoutArguments* to) {
  if (!number(p, &to->p) || to->p < 0 || to->p >= 1) return false;
  if (to->p == 0 || seed == Py_None) return true;
  int64_t value;
  if (integer(seed, &value)) {
    to->given = new_tensor({1}, at::kLong);
    *to->given->mutable_data_ptr<int64_t>() = value;
    return true;
  }
  const Tensor* t = integers(seed, at::kLong);
  if (!t || t->dim() != 1 || t->size(0) != 1) return false;
  to->given = *t;
  return true;
}

inline bool boolean(PyObject* object, bool* to) {
  *to = object == Py_True;
  return *to || object == Py_False;
}

// A str as UTF-8, alive as long as it is; empty for anything else.
inline std::string_view text(PyObject* object) {
  if (!PyUnicode_CheckExact(object)) return {};
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(object, &size);
  if (!data) PyErr_Clear();
  return data ? std::string_view(data, static_cast<size_t>(size)) : std::string_view();
}

inline bool activation(PyObject* object, c10::string_view* to) {
  *to = text(object);
  return *to == "gelu" || *to == "gelu_tanh" || *to == "relu" || *to == "silu";
}

template <class... Tensors>
bool needs_graph(const Tensors&... tensors) {
  const auto requires_grad = [](const Tensor& t) { return t.requires_grad(); };
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

inline const Tensor& or_undefined(const OptionalTensor& t) {
  static const Tensor undefined;
  return t ? *t : undefined;
}

// fastlm::<name>.cpu, once Python has declared it.
template <class Signature>
c10::TypedOperatorHandle<Signature> kernel(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, BACKEND).typed<Signature>();
}

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// Through the dispatcher, as any op; past autograd where that has nothing to do, as its kernel would find out
// after boxing the arguments. `arguments` are owned: a count of a tensor that Python alone holds takes the
// GIL.
template <class Signature, class... Values>
auto run(const c10::TypedOperatorHandle<Signature>& kernel, bool graph, const Values&... arguments) {
  const WithoutGil guard;
  if (graph) return kernel.call(arguments...);
  const at::AutoDispatchBelowADInplaceOrView below;
  return kernel.call(arguments...);
}

inline PyObject* unusual() { Py_RETURN_NONE; }

inline PyObject* wrapped(Tensor& t) { return THPVariable_Wrap(std::move(t)); }

inline PyObject* wrapped(Tensor& first, Tensor& second) {
  PyObject* pair = PyTuple_New(2);
  if (!pair) return nullptr;
  PyTuple_SET_ITEM(pair, 0, wrapped(first));
  PyTuple_SET_ITEM(pair, 1, wrapped(second));
  return pair;
}

// A builtin: C++ exceptions become Python's, as at any other op.
template <PyObject* call(Arguments), Py_ssize_t count>
PyObject* builtin(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  HANDLE_TH_ERRORS
  return given == count && nothing_special() ? call(arguments) : unusual();
  END_HANDLE_TH_ERRORS
}

template <PyObject* call(Arguments), Py_ssize_t count>
PyMethodDef method(const char* name) {
  // Python calls it with an array: METH_FASTCALL says so, the type of the member does not.
  const auto pointer = reinterpret_cast<void (*)()>(&builtin<call, count>);
  return {name, reinterpret_cast<PyCFunction>(pointer), METH_FASTCALL, nullptr};
}

// usual_rows.cpp
PyObject* norm_layer(Arguments);
PyObject* norm_rms(Arguments);
PyObject* biased_activation(Arguments);
PyObject* gated(Arguments);
PyObject* softmaxed(Arguments);
PyObject* loss(Arguments);
PyObject* linear_loss(Arguments);
PyObject* added(Arguments);
PyObject* fed_forward(Arguments);

// usual_attention.cpp
PyObject* rotated(Arguments);
PyObject* attended(Arguments);
PyObject* attended_packed(Arguments);
PyObject* decoded(Arguments);
PyObject* appended(Arguments);

}  // namespace fastlm::usual
