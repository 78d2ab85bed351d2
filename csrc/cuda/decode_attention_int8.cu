// decode_attention of a cache of int8; decode_attention.cuh has the rest.
#include "decode_attention.cuh"

namespace fastlm {

void decode_quantised_parts(const Context& context, const Decode& d) {
  with_device_dtype(d.a.dtype, [&]<class Q>() { decode_parts<Q, int8_t>(context, d); });
}

}  // namespace fastlm
