// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda_fp16.h"

struct __nv_bfloat162 {
  uint16_t x, y;
};

inline __nv_bfloat162 __hmax2_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {emulator::max_nan(a.x, b.x, 0x7f80), emulator::max_nan(a.y, b.y, 0x7f80)};
}
