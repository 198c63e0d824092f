// SPDX-License-Identifier: Apache-2.0
// decode: y[n] = sum of values[s] w[indices[s]] over the slots s of token n, + bias; by token.
#include "cpu/sae/decode.h"

#include "common.h"
#include "cpu/simd/levels.h"
#include "cpu/simd/scalar.h"

#define MIK_BODY "cpu/sae/decode_body.h"
#include "cpu/simd/each_level.h"

namespace mik {
namespace {

Tensor decode(Tensor values, Tensor indices, OptionalTensor row_offsets, Tensor w,
              OptionalTensor bias) {
  const int64_t n = check_codes("decode", values, indices, row_offsets, w, bias), d = w.size(1);
  Tensor y = empty(values, {n, d});
  MIK_DISPATCH_FLOATING(values, [&] {
    using A = accumulator_t<scalar_t>;
    parallel_rows(n, values.size(-1), values.numel(), row_offsets,
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
  const int64_t n = check_codes("decode_error", values, indices, row_offsets, w, bias);
  const int64_t d = w.size(1);
  check_target("decode_error", x, n, d, values);
  Tensor error = empty(x, {n, d});
  Tensor squares = empty(x, {n});
  MIK_DISPATCH_FLOATING(values, [&] {
    using A = accumulator_t<scalar_t>;
    parallel_rows(n, values.size(-1), values.numel(), row_offsets,
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

MIK_REGISTER(CPU, m) {
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("decode_error", TORCH_BOX(&decode_error));
}

}  // namespace
}  // namespace mik
