// SPDX-License-Identifier: Apache-2.0
// What adam_rows_ and its loops (adam_body.h, per level) share.
#pragma once

#include <cstdint>

namespace mik {

// one step over contiguous rows of d numbers
template <class P, class G, class A>
struct AdamRows {
  int64_t d;
  P* param;
  const G* grad;
  A *exp_avg, *exp_avg_sq;
  // rest1 = 1 - beta1 and rest2 = 1 - beta2 come rounded from fp64: in fp32 1 - 0.999 is off by
  // 1.3e-5
  A rest1, beta2, rest2;
  // lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t)
  A step_size, inverse_correction;
  A eps, clip;
  // the gradient's part along the row is taken out; the row is scaled to norm 1
  bool project, unit_norm;
};

}  // namespace mik
