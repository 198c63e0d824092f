// SPDX-License-Identifier: Apache-2.0
#include "cpu/mix_tile.h"

#include "cpu/levels.h"

#define MIK_BODY "cpu/mix_tile_body.h"
#include "cpu/each_level.h"

namespace mik {

void mix_tile(const float* weights, const float* b, int64_t ldb, int64_t depth, float* out) {
  MIK_AT_LEVEL(mix_tile<float>)(weights, b, ldb, depth, out);
}

void mix_tile(const double* weights, const double* b, int64_t ldb, int64_t depth, double* out) {
  MIK_AT_LEVEL(mix_tile<double>)(weights, b, ldb, depth, out);
}

}  // namespace mik
