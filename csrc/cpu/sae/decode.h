// SPDX-License-Identifier: Apache-2.0
// What the operators that decode check of their operands.
#pragma once

#include "common.h"
#include "cpu/sae/indices.h"
#include "cpu/sae/slots.h"

namespace mik {

// makes the operands contiguous; returns the number of tokens
inline int64_t check_codes(const char* op, Tensor& values, Tensor& indices,
                           OptionalTensor& row_offsets, Tensor& w, OptionalTensor& bias) {
  const auto need = [&](bool condition, const char* message) {
    if (!condition) throw std::runtime_error(std::string(op) + ": " + message);
  };
  need(w.dim() == 2, "w must be 2-D");
  need(values.scalar_type() == w.scalar_type(), "values and w must share a dtype");
  check_rows(op, indices, row_offsets);
  need(values.dim() == indices.dim() && values.size(0) == indices.size(0) &&
           values.size(-1) == indices.size(-1),
       "values and indices must have one shape");
  need(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == w.size(1) &&
                             bias->scalar_type() == w.scalar_type()),
       "bias must be [d] in the dtype of w");
  values = torch::stable::contiguous(values);
  w = dense_rows(w);
  if (bias.has_value()) bias = torch::stable::contiguous(*bias);
  check_indices(op, indices, indices.numel(), w.size(0));
  return row_offsets.has_value() ? row_offsets->size(0) - 1 : indices.size(0);
}

// x, whose rows are made dense, is [N, d] in the accumulation dtype
inline void check_target(const char* op, Tensor& x, int64_t n, int64_t d, const Tensor& values) {
  const bool wide = values.scalar_type() == ScalarType::Double;
  if (x.dim() != 2 || x.size(0) != n || x.size(1) != d ||
      x.scalar_type() != (wide ? ScalarType::Double : ScalarType::Float))
    throw std::runtime_error(std::string(op) +
                             ": x must be [N, d] in float32 (float64 for float64)");
  x = dense_rows(x);
}

}  // namespace mik
