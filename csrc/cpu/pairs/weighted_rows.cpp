// SPDX-License-Identifier: Apache-2.0
#include "cpu/pairs/weighted_rows.h"

#include "cpu/simd/levels.h"

#define MIK_BODY "cpu/pairs/weighted_rows_body.h"
#include "cpu/simd/each_level.h"

namespace mik {

void weighted_rows(const float* weights, const float* b, int64_t ldb, int64_t depth, float* out,
                   int64_t ld) {
  MIK_AT_LEVEL(weighted_rows<float>)(weights, b, ldb, depth, out, ld);
}

void weighted_rows(const double* weights, const double* b, int64_t ldb, int64_t depth, double* out,
                   int64_t ld) {
  MIK_AT_LEVEL(weighted_rows<double>)(weights, b, ldb, depth, out, ld);
}

}  // namespace mik
