// SPDX-License-Identifier: Apache-2.0
// pair_products_: out[q, i, j] += sum_s weights[q, s] sum_p <a[s, p, i] * scale, b[s, p, j]>.
#include "common.h"
#include "cpu/pairs/pair_scores.h"

namespace mik {
namespace {

void pair_products(Tensor a, Tensor b, OptionalTensor scale, OptionalTensor weights,
                   OptionalTensor prefix, bool symmetric, Tensor out) {
  check(a.dim() == 4 && b.dim() == 4 && a.scalar_type() == b.scalar_type() &&
            a.size(0) == b.size(0) && a.size(1) == b.size(1) && a.size(3) == b.size(3),
        "pair_products_: expected a [S, P, n, D] and b [S, P, m, D] of one dtype");
  const int64_t n = a.size(2), m = b.size(2), d = a.size(3);
  check(!scale.has_value() ||
            (scale->dim() == 1 && scale->size(0) == d && scale->scalar_type() == a.scalar_type()),
        "pair_products_: scale must be [D] in the dtype of a");
  check(!symmetric || (n == m && !prefix.has_value()),
        "pair_products_: symmetric goes with b = a and without prefix");
  check_scores(a, m, weights, prefix, out);
  MIK_DISPATCH_FLOATING(a, [&] {
    using T = scalar_t;
    const PairScores<accumulator_t<T>> scores(out, weights, prefix, symmetric);
    const auto rows = [&](const Tensor& of, int64_t s, int64_t p) {
      return Rows<T>{data<T>(of) + s * of.stride(0) + p * of.stride(1), of.stride(2), of.stride(3)};
    };
    const auto left = [&](int64_t s, int64_t p) {
      Rows<T> found = rows(a, s, p);
      found.scale = data_or_null<T>(scale);
      found.scale_stride = scale.has_value() ? scale->stride(0) : 0;
      return found;
    };
    const int64_t most = left(0, 0).in_place() || left(0, 0).across() ? kPairRows : kCopiedRows;
    const int64_t across = rows(b, 0, 0).across() ? kAcrossCols : kPairCols;
    const auto blocks = blocks_of(n, m, most, across, scores.limits());
    share(blocks, [&](const auto& next) {
      BlockProduct<T> product;
      std::vector<double> sums;
      while (const Block* taken = next()) {
        const Block& block = *taken;
        scores.add(block, a.size(0), sums, [&](int64_t s) {
          for (int64_t p = 0; p < a.size(1); ++p)
            product.add(left(s, p), rows(b, s, p), block, d, scores.limits(block), sums.data());
        });
      }
    });
  });
}

MIK_REGISTER(CPU, m) { m.impl("pair_products_", TORCH_BOX(&pair_products)); }

}  // namespace
}  // namespace mik
