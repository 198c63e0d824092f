// SPDX-License-Identifier: Apache-2.0
// encode: exact top-k of (x - b_dec) w^T + b_enc without the matrix; the method and its proof are
// in mikernels/ops/sae/encode.py. encode_panels.h packs and deals out the work, encode_body.h
// screens, encode_lists.h keeps the candidates, candidates.h selects.
#include "cpu/sae/encode.h"

#include "common.h"
#include "cpu/screen/candidates.h"
#include "cpu/select/row_topk.h"

#define MIK_BODY "cpu/sae/encode_body.h"
#include "cpu/simd/each_screen_level.h"

#define MIK_BODY "cpu/sae/encode_tighten_body.h"
#include "cpu/simd/each_level.h"

#include "cpu/sae/encode_lists.h"

namespace mik {
namespace {

// fp64 needs no screen: it is for gradcheck and oracles
void encode_double(const Tensor& x, const Tensor& w, const double* b_enc, const double* b_dec,
                   const double* scale, int64_t k, bool relu, double* values, int64_t* indices) {
  const int64_t features = w.size(0), d = w.size(1), w0 = w.stride(0), w1 = w.stride(1);
  parallel(x.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<double> h(features), ranked(scale == nullptr ? 0 : features);
    std::vector<int32_t> order(features);
    for (int64_t n = begin; n < end; ++n) {
      const double *row = data<double>(x) + n * x.stride(0), *weights = data<double>(w);
      for (int64_t f = 0; f < features; ++f) {
        double sum = 0;
        for (int64_t i = 0; i < d; ++i)
          sum += (row[i] - (b_dec == nullptr ? 0. : b_dec[i])) * weights[f * w0 + i * w1];
        h[f] = sum + (b_enc == nullptr ? 0. : b_enc[f]);
        if (scale != nullptr) ranked[f] = h[f] * scale[f];
      }
      select_row(scale == nullptr ? h.data() : ranked.data(), features, k, order.data());
      std::sort(order.begin(), order.begin() + k);
      for (int64_t j = 0; j < k; ++j) {
        indices[n * k + j] = order[j];
        values[n * k + j] = relu && h[order[j]] <= 0 ? 0. : h[order[j]];
      }
    }
  });
}

std::tuple<Tensor, Tensor> encode(Tensor x, Tensor w, OptionalTensor b_enc, OptionalTensor b_dec,
                                  OptionalTensor scale, int64_t k, bool relu) {
  x = check_encoder("encode", x, w, b_enc, b_dec, scale);
  check(k >= 1 && k <= w.size(0), "encode: k must be in 1..F");
  const int64_t n = x.size(0);
  Tensor values = empty(x, {n, k}), indices = empty(x, {n, k}, ScalarType::Long);
  if (n == 0) return {values, indices};
  MIK_DISPATCH_FLOATING(x, [&] {
    if constexpr (std::is_same_v<scalar_t, double>) {
      encode_double(x, w, data_or_null<double>(b_enc), data_or_null<double>(b_dec),
                    data_or_null<double>(scale), k, relu, mutable_data<double>(values),
                    mutable_data<int64_t>(indices));
    } else {
      const int64_t chunk = tokens_a_chunk(k, w.size(0), w.size(1));
      for (int64_t first = 0; first < n; first += chunk)
        Encoder<scalar_t>(x, first, std::min(chunk, n - first), w, b_enc, b_dec, scale, k)
            .run(mutable_data<scalar_t>(values) + first * k,
                 mutable_data<int64_t>(indices) + first * k, relu);
    }
  });
  return {values, indices};
}

MIK_REGISTER(CPU, m) { m.impl("encode", TORCH_BOX(&encode)); }

}  // namespace
}  // namespace mik
