// SPDX-License-Identifier: Apache-2.0
// Weighted sums of rows: out[r] = sum_k weights[k, r] b[k], a tile at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/pairs/row_products.h"

namespace mik {

constexpr int kSumRows = 6, kSumCols = 64;

// out[kSumRows][kSumCols] = weights[depth][kSumRows]^T b[depth][kSumCols]
void weighted_rows(const float* weights, const float* b, int64_t ldb, int64_t depth, float* out);
void weighted_rows(const double* weights, const double* b, int64_t ldb, int64_t depth,
                   double* out);

// columns first..first + cols of `depth` rows, in place where that is possible
template <class T>
class Columns {
 public:
  using A = accumulator_t<T>;

  void take(const Rows<T>& from, int64_t depth, int64_t first, int64_t cols) {
    if constexpr (std::is_same_v<T, A>) {
      if (from.in_place() && cols == kSumCols) {
        at = from.base + first;
        ld = from.row;
        return;
      }
    }
    copy_.assign(depth * kSumCols, A(0));
    for (int64_t k = 0; k < depth; ++k)
      copy_row(from.base + k * from.row + first * from.inner, from.inner,
               static_cast<const T*>(nullptr), 0, cols, copy_.data() + k * kSumCols);
    at = copy_.data();
    ld = kSumCols;
  }

  const A* at = nullptr;
  int64_t ld = 0;

 private:
  std::vector<A> copy_;
};

}  // namespace mik
