// SPDX-License-Identifier: Apache-2.0
// gram_products_: out[i, j] += sum_{t, s} <acts[i, t], acts2[j, s]> <grads[i, t], grads2[j, s]>.
#include "common.h"
#include "cpu/pairs/pair_scores.h"

namespace mik {
namespace {

void check_side(const Tensor& acts, const Tensor& grads) {
  check(acts.dim() == 3 && grads.dim() == 3 && acts.size(0) == grads.size(0) &&
            acts.size(1) == grads.size(1) && acts.scalar_type() == grads.scalar_type(),
        "gram_products_: expected acts [n, T, d_in] and grads [n, T, d_out] of one dtype");
}

void gram_products(Tensor acts, Tensor grads, Tensor acts2, Tensor grads2, bool symmetric,
                   Tensor out) {
  check_side(acts, grads);
  check_side(acts2, grads2);
  check(acts.size(2) == acts2.size(2) && grads.size(2) == grads2.size(2) &&
            acts.scalar_type() == acts2.scalar_type(),
        "gram_products_: both sides must have the same d_in, d_out and dtype");
  const int64_t n = acts.size(0), m = acts2.size(0);
  const auto wide =
      acts.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(out.dim() == 2 && out.size(0) == n && out.size(1) == m && out.scalar_type() == wide,
        "gram_products_: out must be [n, m] in fp32 (fp64 for fp64)");
  check(!symmetric || n == m, "gram_products_: symmetric goes with one side");
  MIK_DISPATCH_FLOATING(acts, [&] {
    using T = scalar_t;
    const auto at = [](const Tensor& of, int64_t t) {
      return Rows<T>{data<T>(of) + t * of.stride(1), of.stride(0), of.stride(2)};
    };
    const PairScores<accumulator_t<T>> scores(out, std::nullopt, std::nullopt, symmetric);
    const bool in_place = at(acts, 0).in_place() && at(grads, 0).in_place();
    const auto blocks =
        blocks_of(n, m, in_place ? kPairRows : kCopiedRows, kPairCols, scores.limits());
    share(blocks, [&](const auto& next) {
      BlockProduct<T> product;
      std::vector<double> sums, from_acts, from_grads;
      while (const Block* taken = next()) {
        const Block& block = *taken;
        const int64_t* limits = scores.limits(block);
        scores.add(block, 1, sums, [&](int64_t) {
          for (int64_t t = 0; t < acts.size(1); ++t) {
            for (int64_t s = 0; s < acts2.size(1); ++s) {
              from_acts.assign(sums.size(), 0.);
              from_grads.assign(sums.size(), 0.);
              product.add(at(acts, t), at(acts2, s), block, acts.size(2), limits, from_acts.data());
              product.add(at(grads, t), at(grads2, s), block, grads.size(2), limits,
                          from_grads.data());
              add_products(from_acts.data(), from_grads.data(), block.rows * block.cols,
                           sums.data());
            }
          }
        });
      }
    });
  });
}

MIK_REGISTER(CPU, m) { m.impl("gram_products_", TORCH_BOX(&gram_products)); }

}  // namespace
}  // namespace mik
