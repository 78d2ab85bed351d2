// What bindings that call torch's own ops need.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>

namespace fastlm {

// While it lives, torch's ops neither cast nor record: the public function has cast, the node records.
class WithinKernel {
  c10::impl::ExcludeDispatchKeyGuard guard_{c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                            c10::autocast_dispatch_keyset};
};

}  // namespace fastlm
