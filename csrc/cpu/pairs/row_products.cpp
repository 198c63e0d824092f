// SPDX-License-Identifier: Apache-2.0
#include "cpu/pairs/row_products.h"

#include "cpu/simd/levels.h"

#define MIK_BODY "cpu/pairs/row_products_body.h"
#include "cpu/simd/each_level.h"

namespace mik {

#define MIK_BLOCK_PRODUCTS(A)                                                                      \
  void block_products(const A* const* a, int64_t rows, const A* const* b, int64_t cols, int64_t d, \
                      const int64_t* limits, int64_t first_row, double* acc, int64_t ld) {         \
    MIK_AT_LEVEL(block_products<A>)(a, rows, b, cols, d, limits, first_row, acc, ld);              \
  }

#define MIK_COPY_ROW(T)                                                                         \
  void copy_row(const T* from, int64_t stride, const T* scale, int64_t scale_stride, int64_t d, \
                accumulator_t<T>* to) {                                                         \
    MIK_AT_LEVEL(copy_row<T, accumulator_t<T>>)(from, stride, scale, scale_stride, d, to);      \
  }

MIK_BLOCK_PRODUCTS(float)
MIK_BLOCK_PRODUCTS(double)
MIK_COPY_ROW(float)
MIK_COPY_ROW(double)
MIK_COPY_ROW(torch::headeronly::BFloat16)
MIK_COPY_ROW(torch::headeronly::Half)

}  // namespace mik
