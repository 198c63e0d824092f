// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common.h"

namespace mik {

// an index outside 0..limit-1 would read or write foreign memory
inline void check_indices(const char* op, const Tensor& indices, int64_t count, int64_t limit,
                          const char* what = "indices") {
  if (indices.scalar_type() != ScalarType::Long)
    throw std::runtime_error(std::string(op) + ": " + what + " must be int64");
  const int64_t* at = data<int64_t>(indices);
  uint64_t bad = 0;
  for (int64_t i = 0; i < count; ++i)
    bad |= static_cast<uint64_t>(static_cast<uint64_t>(at[i]) >= static_cast<uint64_t>(limit));
  if (bad)
    throw std::runtime_error(std::string(op) + ": " + what + " must be in 0.." +
                             std::to_string(limit - 1) + ", got one outside");
}

}  // namespace mik
