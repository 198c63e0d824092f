// SPDX-License-Identifier: Apache-2.0
// pairwise_topk: the k strongest of row_scale[i] col_scale[j] <a[i], b[j]>, without the matrix. The
// method is in mikernels/ops/pairs/pairwise_topk.py; pairwise_topk_select.h keeps the candidates,
// pairwise_topk_screen.h and pairwise_topk_wide.h are the two ways to find them.
#include "cpu/pairs/pairwise_topk_screen.h"
#include "cpu/pairs/pairwise_topk_wide.h"

namespace mik {
namespace {

std::vector<double> scales(const OptionalTensor& scale, int64_t n) {
  std::vector<double> wide(n, 1.);
  if (scale.has_value()) {
    MIK_DISPATCH_FLOATING(*scale, [&] {
      for (int64_t i = 0; i < n; ++i) {
        const auto value =
            static_cast<accumulator_t<scalar_t>>(data<scalar_t>(*scale)[i * scale->stride(0)]);
        wide[i] = static_cast<double>(value);
      }
    });
  }
  return wide;
}

std::vector<int64_t> ranks(const OptionalTensor& rank, int64_t n) {
  std::vector<int64_t> found;
  if (rank.has_value())
    for (int64_t i = 0; i < n; ++i) found.push_back(data<int64_t>(*rank)[i * rank->stride(0)]);
  return found;
}

void check_side(const OptionalTensor& scale, const OptionalTensor& rank, const Tensor& rows) {
  const int64_t n = rows.size(2);
  check(!scale.has_value() || (scale->dim() == 1 && scale->size(0) == n &&
                               scale->scalar_type() == rows.scalar_type()),
        "pairwise_topk: scales must be [n] and [m] in the dtype of a");
  check(!rank.has_value() ||
            (rank->dim() == 1 && rank->size(0) == n && rank->scalar_type() == ScalarType::Long),
        "pairwise_topk: ranks must be [n] and [m] int64");
}

template <class T>
std::vector<Pair<accumulator_t<T>>> search(const LongRows<T>& a, const LongRows<T>& b,
                                           const PairRule& rule) {
  if constexpr (!std::is_same_v<T, double>)
    if (a.length() <= kScreened) return ScreenedPairs<T>(a, b, rule).run();
  return WidePairs<T>(a, b, rule).run();
}

std::tuple<Tensor, Tensor, Tensor> pairwise_topk(Tensor a, Tensor b, OptionalTensor row_scale,
                                                 OptionalTensor col_scale, OptionalTensor row_rank,
                                                 OptionalTensor col_rank, int64_t k, std::string by,
                                                 double min_value, bool symmetric) {
  check(a.dim() == 4 && b.dim() == 4 && a.scalar_type() == b.scalar_type() &&
            a.size(0) == b.size(0) && a.size(1) == b.size(1) && a.size(3) == b.size(3),
        "pairwise_topk: expected a [B, P, n, D] and b [B, P, m, D] of one dtype");
  check(k >= 1 && (by == "abs" || by == "value"),
        "pairwise_topk: k must be at least 1, by abs or value");
  check_side(row_scale, row_rank, a);
  check_side(col_scale, col_rank, b);
  check(row_rank.has_value() == col_rank.has_value(), "pairwise_topk: ranks go together");
  const int64_t n = a.size(2), m = b.size(2);
  check(n < INT32_MAX && m < INT32_MAX, "pairwise_topk: at most 2^31 - 2 rows");
  check(!symmetric || n == m, "pairwise_topk: symmetric goes with b = a");
  // never n m before it is known to be small enough
  k = n == 0 || m == 0 ? 0 : k / m >= n ? n * m : k;
  const auto wide = a.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor values = empty(a, {k}, wide), rows = empty(a, {k}, ScalarType::Long),
         cols = empty(a, {k}, ScalarType::Long);
  if (k == 0) return {values, rows, cols};
  // compared in the dtype of the scores
  if (wide == ScalarType::Float) min_value = static_cast<float>(min_value);
  PairRule rule{n, m, k, by == "abs", min_value, ranks(row_rank, n), ranks(col_rank, m), false};
  if (symmetric && !row_rank.has_value()) {
    // pairs i <= j, each standing for its mirror image too
    rule.mirrored = true;
    for (int64_t i = 0; i < n; ++i) {
      rule.row_rank.push_back(i);
      rule.col_rank.push_back(i + 1);
    }
  }
  MIK_DISPATCH_FLOATING(a, [&] {
    using T = scalar_t;
    using S = accumulator_t<T>;
    const LongRows<T> left(a, scales(row_scale, n)), right(b, scales(col_scale, m));
    const std::vector<Pair<S>> found = search(left, right, rule);
    for (int64_t i = 0; i < k; ++i) {
      const bool here = i < static_cast<int64_t>(found.size());
      mutable_data<S>(values)[i] = here ? found[i].value : S(0);
      mutable_data<int64_t>(rows)[i] = here ? found[i].row : -1;
      mutable_data<int64_t>(cols)[i] = here ? found[i].col : -1;
    }
  });
  return {values, rows, cols};
}

MIK_REGISTER(CPU, m) { m.impl("pairwise_topk", TORCH_BOX(&pairwise_topk)); }

}  // namespace
}  // namespace mik
