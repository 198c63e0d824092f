// SPDX-License-Identifier: Apache-2.0
// decode: y[n] = sum_j values[n, j] w[indices[n, j]] + bias, by token.
#include "common.h"
#include "cpu/indices.h"
#include "cpu/levels.h"
#include "cpu/scalar.h"

#define MIK_BODY "cpu/decode_body.h"
#include "cpu/each_level.h"

namespace mik {
namespace {

Tensor decode(Tensor values, Tensor indices, Tensor w, OptionalTensor bias) {
  check(values.dim() == 2 && indices.dim() == 2 && w.dim() == 2, "decode: expected 2-D tensors");
  check(values.scalar_type() == w.scalar_type(), "decode: values and w must share a dtype");
  check(values.size(0) == indices.size(0) && values.size(1) == indices.size(1),
        "decode: values and indices must have one shape");
  check(!bias.has_value() || (bias->numel() == w.size(1) && bias->scalar_type() == w.scalar_type()),
        "decode: bias must be [d] in the dtype of w");
  values = torch::stable::contiguous(values);
  indices = torch::stable::contiguous(indices);
  w = dense_rows(w);
  if (bias.has_value()) bias = torch::stable::contiguous(*bias);
  const int64_t n = values.size(0), k = values.size(1), d = w.size(1);
  check_indices("decode", indices, n * k, w.size(0));
  Tensor y = empty(values, {n, d});
  MIK_DISPATCH_FLOATING(values, [&] {
    using A = accumulator_t<scalar_t>;
    parallel(n, 16, [&](int64_t begin, int64_t end) {
      std::unique_ptr<A[]> sum(new A[d]), weights(new A[k]);
      std::unique_ptr<const scalar_t*[]> rows(new const scalar_t*[k]);
      MIK_AT_LEVEL(decode_tokens<scalar_t, A>)(
          begin, end, k, d, data<scalar_t>(values), data<int64_t>(indices), data<scalar_t>(w),
          w.stride(0), data_or_null<scalar_t>(bias), mutable_data<scalar_t>(y), sum.get(),
          rows.get(), weights.get());
    });
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(mikernels, CPU, m) { m.impl("decode", TORCH_BOX(&decode)); }

}  // namespace
}  // namespace mik
