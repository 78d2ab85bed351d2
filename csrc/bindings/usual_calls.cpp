// The module of the builtins that run usual calls, in the same library as the kernels: importing
// fastlm._cpu_<isa> gives them. In C++ because what Python spends on a small call before its kernel starts,
// 5 us, is more than torch spends on all of it.
#include "usual_calls.h"

namespace fastlm::usual {
namespace {

PyObject* module() {
  // The number beside each is of its arguments; fastlm/_ops/<op>.py passes them.
  static PyMethodDef methods[] = {method<norm_layer, 7>("layer_norm"),
                                  method<norm_rms, 7>("rms_norm"),
                                  method<biased_activation, 5>("bias_act"),
                                  method<gated, 3>("glu"),
                                  method<softmaxed, 4>("softmax"),
                                  method<loss, 6>("cross_entropy"),
                                  method<linear_loss, 8>("linear_cross_entropy"),
                                  method<added, 4>("dropout_add"),
                                  method<rotated, 4>("rope"),
                                  method<attended, 14>("attention"),
                                  method<attended_packed, 15>("attention_varlen"),
                                  method<decoded, 12>("decode_attention"),
                                  method<appended, 8>("append_kv"),
                                  method<fed_forward, 8>("feed_forward"),
                                  {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "fastlm._cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

}  // namespace
}  // namespace fastlm::usual

// One object serves the libraries of all instruction sets, and Python wants each one's own name.
PyMODINIT_FUNC PyInit__cpu_default() { return fastlm::usual::module(); }
PyMODINIT_FUNC PyInit__cpu_avx2() { return fastlm::usual::module(); }
PyMODINIT_FUNC PyInit__cpu_avx512() { return fastlm::usual::module(); }
