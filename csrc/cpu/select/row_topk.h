// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace mik {

// the indices of the k best of a row (order.h), unordered, first in `kept`, which has room for n
void select_row(const float* row, int64_t n, int64_t k, int32_t* kept);
void select_row(const double* row, int64_t n, int64_t k, int32_t* kept);

}  // namespace mik
