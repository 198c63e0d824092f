// SPDX-License-Identifier: Apache-2.0
// What the by-feature operators and their loops (gradients_body.h, per level) share.
#pragma once

#include <cstdint>

namespace mik {

// where the rows of a slot's feature begin: all features share one matrix, or each has its level's
struct OneLevel {
  int64_t operator()(int64_t) const { return 0; }
};

struct GivenLevels {
  const int64_t* levels;
  int64_t stride;

  int64_t operator()(int64_t feature) const { return levels[feature] * stride; }
};

// operands of sae_gradients_, whose outputs are contiguous; levels and d_pre may be null
template <class T, class W>
struct SaeGradients {
  int64_t d_out, d_in;
  const T *values, *d_pre;
  const T* dy;
  int64_t dy_row, dy_level;
  const T* x;
  int64_t x_row;
  const W* w_dec;
  int64_t w_row;
  const int64_t *levels, *offsets, *order;
  float *dw_dec, *dw_enc, *db_enc;
  bool accumulate;
};

}  // namespace mik
