// SPDX-License-Identifier: Apache-2.0
#include "cpu/pairs/row_products.h"

#include "cpu/simd/levels.h"

#define MIK_BODY "cpu/pairs/row_products_body.h"
#include "cpu/simd/each_level.h"

namespace mik {

void block_products(const RowProducts<float>& of) { MIK_AT_LEVEL(block_products<float>)(of); }
void block_products(const RowProducts<double>& of) { MIK_AT_LEVEL(block_products<double>)(of); }

void across_products(const AcrossProducts<float>& of) { MIK_AT_LEVEL(across_products<float>)(of); }
void across_products(const AcrossProducts<double>& of) {
  MIK_AT_LEVEL(across_products<double>)(of);
}

void add_scores(const double* sums, int64_t ld, int64_t rows, int64_t cols, double weight,
                int64_t row, float* out, float* mirrored) {
  MIK_AT_LEVEL(add_scores<float>)(sums, ld, rows, cols, weight, row, out, mirrored);
}
void add_scores(const double* sums, int64_t ld, int64_t rows, int64_t cols, double weight,
                int64_t row, double* out, double* mirrored) {
  MIK_AT_LEVEL(add_scores<double>)(sums, ld, rows, cols, weight, row, out, mirrored);
}

void add_products(const double* a, const double* b, int64_t count, double* sums) {
  MIK_AT_LEVEL(add_products)(a, b, count, sums);
}

double sum_squares(const double* of, int64_t count) { return MIK_AT_LEVEL(sum_squares)(of, count); }

#define MIK_COPIES(T)                                                                           \
  void copy_row(const T* from, int64_t stride, const T* scale, int64_t scale_stride, int64_t d, \
                accumulator_t<T>* to) {                                                         \
    MIK_AT_LEVEL(copy_row<T, accumulator_t<T>>)(from, stride, scale, scale_stride, d, to);      \
  }                                                                                             \
  void pack_across(const T* from, int64_t stride, int64_t count, int64_t d, bool rows,          \
                   accumulator_t<T>* to) {                                                      \
    MIK_AT_LEVEL(pack_across<T, accumulator_t<T>>)(from, stride, count, d, rows, to);           \
  }

MIK_COPIES(float)
MIK_COPIES(double)
MIK_COPIES(torch::headeronly::BFloat16)
MIK_COPIES(torch::headeronly::Half)

}  // namespace mik
