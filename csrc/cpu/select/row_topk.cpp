// SPDX-License-Identifier: Apache-2.0
// row_topk: lane maxima bound the k-th value, one filter pass keeps what reaches the bound (about
// k (1 + k / 2 lanes) elements), nth_element selects among those.
#include "cpu/select/row_topk.h"

#include "common.h"
#include "cpu/simd/levels.h"
#include "cpu/select/order.h"
#include "cpu/simd/scalar.h"

#include <algorithm>
#include <vector>

#if MIK_X86_LEVELS
#include <immintrin.h>
#endif

#define MIK_BODY "cpu/select/row_topk_body.h"
#include "cpu/simd/each_level.h"

namespace mik {
namespace {

// the indices of the k best of a row, unordered, first in `kept`, which has room for n
template <class A>
void select(const A* row, int64_t n, int64_t k, int32_t* kept) {
  static thread_local std::vector<A> maxima;
  const auto better = [row](int32_t a, int32_t b) {
    const auto ka = rank_key(row[a]), kb = rank_key(row[b]);
    return ka != kb ? ka > kb : a < b;
  };
  int64_t found = n;
  // more lanes sharpen the bound and cost more to select from; 4 k leave about 1.15 k survivors
  int64_t lanes = 64;
  while (lanes < 4 * k) lanes *= 2;
  if (lanes * 4 > n) {
    for (int64_t i = 0; i < n; ++i) kept[i] = static_cast<int32_t>(i);
  } else {
    maxima.resize(lanes);
    MIK_AT_LEVEL(lane_maxima<A>)(row, n, maxima.data(), lanes);
    std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(),
                     [](A a, A b) { return a > b; });
    found = MIK_AT_LEVEL(filter_row<A>)(row, n, maxima[k - 1], kept);
  }
  if (found > k) std::nth_element(kept, kept + (k - 1), kept + found, better);
}

template <class T>
void run(const Tensor& scores, int64_t k, bool sorted, T* values, int64_t* indices) {
  using A = accumulator_t<T>;
  const int64_t n = scores.size(1);
  parallel(scores.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<A> wide(std::is_same_v<T, A> ? 0 : n);
    std::unique_ptr<int32_t[]> kept(new int32_t[n]);
    for (int64_t r = begin; r < end; ++r) {
      const T* source = data<T>(scores) + r * scores.stride(0);
      const A* row;
      if constexpr (std::is_same_v<T, A>) {
        row = source;
      } else {
        MIK_AT_LEVEL(widen<T, A>)(source, wide.data(), n);
        row = wide.data();
      }
      // memory would idle while this row's winners are chosen
      if (r + 1 < end) MIK_AT_LEVEL(prefetch_start<T>)(source + scores.stride(0), n);
      select(row, n, k, kept.get());
      std::sort(kept.get(), kept.get() + k, [&](int32_t a, int32_t b) {
        if (!sorted) return a < b;
        const auto ka = rank_key(row[a]), kb = rank_key(row[b]);
        return ka != kb ? ka > kb : a < b;
      });
      for (int64_t j = 0; j < k; ++j) {
        values[r * k + j] = source[kept[j]];
        indices[r * k + j] = kept[j];
      }
    }
  });
}

std::tuple<Tensor, Tensor> row_topk(Tensor scores, int64_t k, bool sorted) {
  check(scores.dim() == 2 && k >= 1 && k <= scores.size(1), "row_topk: expected [N, F], k in 1..F");
  check(scores.size(1) < INT32_MAX, "row_topk: at most 2^31 - 2 columns");
  scores = dense_rows(scores);
  Tensor values = empty(scores, {scores.size(0), k});
  Tensor indices = empty(scores, {scores.size(0), k}, ScalarType::Long);
  MIK_DISPATCH_FLOATING(scores, [&] {
    run<scalar_t>(scores, k, sorted, mutable_data<scalar_t>(values),
                  mutable_data<int64_t>(indices));
  });
  return {values, indices};
}

MIK_REGISTER(CPU, m) { m.impl("row_topk", TORCH_BOX(&row_topk)); }

}  // namespace

void select_row(const float* row, int64_t n, int64_t k, int32_t* kept) { select(row, n, k, kept); }
void select_row(const double* row, int64_t n, int64_t k, int32_t* kept) { select(row, n, k, kept); }

}  // namespace mik
