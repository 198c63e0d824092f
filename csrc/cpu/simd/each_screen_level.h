// SPDX-License-Identifier: Apache-2.0
// each_level.h for a body that screens: once more for AVX-VNNI and for AMX tiles.
// MIK_SCREEN(f)(args...) calls the active level's. No include guard on purpose.

#include "cpu/simd/amx.h"
#include "cpu/simd/levels.h"

#if MIK_X86_LEVELS
#include <immintrin.h>

#define MIK_SCREEN(f)                                            \
  (::mik::active_level() == ::mik::Level::amx       ? amx::f     \
   : ::mik::active_level() == ::mik::Level::avxvnni ? avxvnni::f \
                                                    : MIK_AT_LEVEL(f))
#else
#define MIK_SCREEN(f) (MIK_AT_LEVEL(f))
#endif

#define MIK_WITH_SCREENS
#include "cpu/simd/each_level.h"
#undef MIK_WITH_SCREENS
