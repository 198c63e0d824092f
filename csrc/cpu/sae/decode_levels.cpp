// SPDX-License-Identifier: Apache-2.0
// decode_levels: nested decodes, their errors, and the errors' mixtures; by token. See
// mikernels/ops/sae/decode_levels.py.
#include "cpu/sae/decode_levels.h"

#include "common.h"
#include "cpu/sae/decode.h"
#include "cpu/simd/levels.h"
#include "cpu/simd/scalar.h"

#define MIK_BODY "cpu/sae/decode_levels_body.h"
#include "cpu/simd/each_level.h"

namespace mik {
namespace {

std::tuple<Tensor, Tensor, Tensor> decode_levels(Tensor values, Tensor indices,
                                                 OptionalTensor row_offsets, Tensor w,
                                                 OptionalTensor bias, Tensor x, Tensor levels,
                                                 Tensor mix) {
  const char* name = "decode_levels";
  const int64_t n = check_codes(name, values, indices, row_offsets, w, bias), d = w.size(1);
  check_target(name, x, n, d, values);
  check(mix.dim() == 2 && mix.size(0) == mix.size(1) && mix.size(0) > 0 &&
            mix.scalar_type() == ScalarType::Float,
        "decode_levels: mix must be [L, L] float32 of at least one level");
  const int64_t count = mix.size(0);
  check(levels.dim() == 1 && levels.size(0) == w.size(0),
        "decode_levels: levels must be [F], one for each row of w");
  levels = torch::stable::contiguous(levels);
  check_indices(name, levels, levels.numel(), count, "levels");
  mix = torch::stable::contiguous(mix);
  Tensor mixed = empty(x, {count, n, d}), error = empty(x, {n, d}), squares = empty(x, {count, n});
  MIK_DISPATCH_FLOATING(values, [&] {
    using T = scalar_t;
    using A = accumulator_t<T>;
    DecodeLevels<T, A> o{};
    o.n = n, o.d = d, o.count = count;
    o.values = data<T>(values), o.indices = data<int64_t>(indices);
    o.w = data<T>(w), o.w_row = w.stride(0), o.bias = data_or_null<T>(bias);
    o.x = data<A>(x), o.x_row = x.stride(0);
    o.levels = data<int64_t>(levels), o.mix = data<float>(mix);
    o.mixed = mutable_data<A>(mixed), o.error = mutable_data<A>(error);
    o.squares = mutable_data<A>(squares);
    parallel_rows(n, values.size(-1), values.numel(), row_offsets,
                  [&](auto owned, int64_t begin, int64_t end) {
                    const int64_t longest = longest_row(owned, begin, end);
                    std::unique_ptr<A[]> errors(new A[count * d]), weights(new A[longest]);
                    std::unique_ptr<const T*[]> rows(new const T*[longest]);
                    std::unique_ptr<int64_t[]> ends(new int64_t[count + 1]);
                    std::unique_ptr<const A*[]> sources(new const A*[count * count]);
                    std::unique_ptr<A[]> shares(new A[count * count]);
                    std::unique_ptr<int64_t[]> mixes(new int64_t[count]);
                    MIK_AT_LEVEL(decode_by_level<T, A, decltype(owned)>)(
                        begin, end, owned, o,
                        LevelScratch<T, A>{errors.get(), rows.get(), weights.get(), ends.get(),
                                           sources.get(), shares.get(), mixes.get()});
                  });
  });
  return {mixed, error, squares};
}

MIK_REGISTER(CPU, m) { m.impl("decode_levels", TORCH_BOX(&decode_levels)); }

}  // namespace
}  // namespace mik
