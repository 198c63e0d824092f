// SPDX-License-Identifier: Apache-2.0
// each_level.h for a body that screens in 16 bits: once more for AMX tiles. MIK_SCREEN(f)(args...)
// calls the active level's. No include guard on purpose.

#include "cpu/amx.h"
#include "cpu/levels.h"

#if MIK_X86_LEVELS
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt,prefer-vector-width=512")
namespace mik::amx {
#define MIK_VECTOR_BYTES 64
#define MIK_AMX_TILES
#include MIK_BODY
#undef MIK_AMX_TILES
#undef MIK_VECTOR_BYTES
}  // namespace mik::amx
#pragma GCC pop_options
#define MIK_SCREEN(f) (::mik::active_level() == ::mik::Level::amx ? amx::f : MIK_AT_LEVEL(f))
#else
#define MIK_SCREEN(f) (MIK_AT_LEVEL(f))
#endif

#include "cpu/each_level.h"
