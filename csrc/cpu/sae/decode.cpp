// SPDX-License-Identifier: Apache-2.0
// decode: y[n] = sum of values[s] w[indices[s]] over the slots s of token n, + bias; by token.
#include "common.h"
#include "cpu/sae/indices.h"
#include "cpu/simd/levels.h"
#include "cpu/simd/scalar.h"
#include "cpu/sae/slots.h"

#define MIK_BODY "cpu/sae/decode_body.h"
#include "cpu/simd/each_level.h"

namespace mik {
namespace {

// makes the operands contiguous; returns the number of tokens
int64_t check_operands(Tensor& values, Tensor& indices, OptionalTensor& row_offsets, Tensor& w,
                       OptionalTensor& bias) {
  check(w.dim() == 2, "decode: w must be 2-D");
  check(values.scalar_type() == w.scalar_type(), "decode: values and w must share a dtype");
  check_rows("decode", indices, row_offsets);
  check(values.dim() == indices.dim() && values.size(0) == indices.size(0) &&
            values.size(-1) == indices.size(-1),
        "decode: values and indices must have one shape");
  check(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == w.size(1) &&
                              bias->scalar_type() == w.scalar_type()),
        "decode: bias must be [d] in the dtype of w");
  values = torch::stable::contiguous(values);
  w = dense_rows(w);
  if (bias.has_value()) bias = torch::stable::contiguous(*bias);
  check_indices("decode", indices, indices.numel(), w.size(0));
  return row_offsets.has_value() ? row_offsets->size(0) - 1 : indices.size(0);
}

Tensor decode(Tensor values, Tensor indices, OptionalTensor row_offsets, Tensor w,
              OptionalTensor bias) {
  const int64_t n = check_operands(values, indices, row_offsets, w, bias), d = w.size(1);
  Tensor y = empty(values, {n, d});
  MIK_DISPATCH_FLOATING(values, [&] {
    using A = accumulator_t<scalar_t>;
    parallel_rows(
        n, values.size(-1), values.numel(), row_offsets,
        [&](auto owned, int64_t begin, int64_t end) {
          const int64_t longest = longest_row(owned, begin, end);
          std::unique_ptr<A[]> sum(new A[d]), weights(new A[longest]);
          std::unique_ptr<const scalar_t*[]> rows(new const scalar_t*[longest]);
          MIK_AT_LEVEL(decode_tokens<scalar_t, A, decltype(owned)>)(
              begin, end, owned, d, data<scalar_t>(values), data<int64_t>(indices),
              data<scalar_t>(w), w.stride(0), data_or_null<scalar_t>(bias),
              mutable_data<scalar_t>(y), sum.get(), rows.get(), weights.get());
        });
  });
  return y;
}

std::tuple<Tensor, Tensor> decode_error(Tensor values, Tensor indices, OptionalTensor row_offsets,
                                        Tensor w, OptionalTensor bias, Tensor x) {
  const int64_t n = check_operands(values, indices, row_offsets, w, bias), d = w.size(1);
  const bool wide = values.scalar_type() == ScalarType::Double;
  check(x.dim() == 2 && x.size(0) == n && x.size(1) == d &&
            x.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
        "decode_error: x must be [N, d] in float32 (float64 for float64)");
  x = dense_rows(x);
  Tensor error = empty(x, {n, d});
  Tensor squares = empty(x, {n});
  MIK_DISPATCH_FLOATING(values, [&] {
    using A = accumulator_t<scalar_t>;
    parallel_rows(
        n, values.size(-1), values.numel(), row_offsets,
        [&](auto owned, int64_t begin, int64_t end) {
          const int64_t longest = longest_row(owned, begin, end);
          std::unique_ptr<A[]> weights(new A[longest]);
          std::unique_ptr<const scalar_t*[]> rows(new const scalar_t*[longest]);
          MIK_AT_LEVEL(decode_errors<scalar_t, A, decltype(owned)>)(
              begin, end, owned, d, data<scalar_t>(values), data<int64_t>(indices),
              data<scalar_t>(w), w.stride(0), data_or_null<scalar_t>(bias), data<A>(x),
              x.stride(0), mutable_data<A>(error), mutable_data<A>(squares), rows.get(),
              weights.get());
        });
  });
  return {error, squares};
}

STABLE_TORCH_LIBRARY_IMPL(mikernels, CPU, m) {
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("decode_error", TORCH_BOX(&decode_error));
}

}  // namespace
}  // namespace mik
