// SPDX-License-Identifier: Apache-2.0
// Weighted sums of rows: out[r] = sum_k weights[k, r] b[k], a tile at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/pairs/row_products.h"

namespace mik {

constexpr int kSumRows = 6, kSumCols = 64;

// out[kSumRows][kSumCols] = weights[depth][kSumRows]^T b[depth][kSumCols]; rows of out are ld apart
void weighted_rows(const float* weights, const float* b, int64_t ldb, int64_t depth, float* out,
                   int64_t ld);
void weighted_rows(const double* weights, const double* b, int64_t ldb, int64_t depth, double* out,
                   int64_t ld);

// columns of `depth` rows in panels of kSumCols, in place where that is possible
template <class T>
class Columns {
 public:
  using A = accumulator_t<T>;

  // columns first..first + cols, which are met `times` times: where that is often they are copied,
  // since rows a power of two apart share few cache sets
  void take(const Rows<T>& from, int64_t depth, int64_t first, int64_t cols, int64_t times) {
    if constexpr (std::is_same_v<T, A>) {
      if (from.in_place() && cols % kSumCols == 0 && times <= kInPlaceTimes) {
        at_ = from.base + first;
        panel_ = kSumCols;
        ld = from.row;
        return;
      }
    }
    panel_ = depth * kSumCols;
    ld = kSumCols;
    A* const copy = copy_.take((cols + kSumCols - 1) / kSumCols * panel_);
    // row by row: what lies together is read together
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t c = 0; c < cols; c += kSumCols) {
        const int64_t here = std::min<int64_t>(kSumCols, cols - c);
        A* const to = copy + c / kSumCols * panel_ + k * kSumCols;
        copy_row(from.base + k * from.row + (first + c) * from.inner, from.inner,
                 static_cast<const T*>(nullptr), 0, here, to);
        std::fill(to + here, to + kSumCols, A(0));
      }
    at_ = copy;
  }

  const A* panel(int64_t c) const { return at_ + c * panel_; }

  int64_t ld = 0;

 private:
  static constexpr int64_t kInPlaceTimes = 2;

  const A* at_ = nullptr;
  int64_t panel_ = 0;
  Scratch<A> copy_;
};

}  // namespace mik
