// SPDX-License-Identifier: Apache-2.0
// Includes MIK_BODY once per level, inside namespace mik::<level>: the one list of each level's
// targets. With MIK_WITH_SCREENS also for AVX-VNNI and AMX tiles (see each_screen_level.h). No
// include guard on purpose. Bodies use no std templates: one instantiated here could replace
// another file's portable copy.

namespace mik::portable {
#define MIK_VECTOR_BYTES 16
#include MIK_BODY
#undef MIK_VECTOR_BYTES
}  // namespace mik::portable

#if MIK_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
namespace mik::avx2 {
#define MIK_VECTOR_BYTES 32
#include MIK_BODY
#undef MIK_VECTOR_BYTES
}  // namespace mik::avx2
#pragma GCC pop_options
#if defined(MIK_WITH_SCREENS)

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt,avxvnni")
namespace mik::avxvnni {
#define MIK_VECTOR_BYTES 32
#define MIK_DOT_BYTES
#include MIK_BODY
#undef MIK_DOT_BYTES
#undef MIK_VECTOR_BYTES
}  // namespace mik::avxvnni
#pragma GCC pop_options
#endif

#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt,prefer-vector-width=512")
namespace mik::avx512 {
#define MIK_VECTOR_BYTES 64
#define MIK_DOT_BYTES
#include MIK_BODY
#undef MIK_DOT_BYTES
#undef MIK_VECTOR_BYTES
}  // namespace mik::avx512
#if defined(MIK_WITH_SCREENS)
// tiles are used through amx.h, so this level needs no target of its own
namespace mik::amx {
#define MIK_VECTOR_BYTES 64
#define MIK_AMX_TILES
#include MIK_BODY
#undef MIK_AMX_TILES
#undef MIK_VECTOR_BYTES
}  // namespace mik::amx
#endif
#pragma GCC pop_options
#endif
#undef MIK_BODY
