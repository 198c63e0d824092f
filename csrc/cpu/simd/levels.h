// SPDX-License-Identifier: Apache-2.0
// Instruction-set levels: chosen at run time, forced by tests.
//
// A kernel body (`<op>_body.h`) is compiled once per level by each_level.h, in a namespace of the
// level's name; MIK_AT_LEVEL(f)(args...) calls the active one.
#pragma once

namespace mik {

enum class Level { portable = 0, avx2 = 1, avxvnni = 2, avx512 = 3, amx = 4 };

Level active_level();
Level best_level();
bool is_supported(Level level);
void set_level(Level level);
const char* level_name(Level level);

}  // namespace mik

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MIK_X86_LEVELS 1
// avxvnni and amx have bodies of their own for the screens only (MIK_SCREEN); elsewhere they run
// the avx2 and avx512 ones
#define MIK_AT_LEVEL(...)                                              \
  (::mik::active_level() >= ::mik::Level::avx512 ? avx512::__VA_ARGS__ \
   : ::mik::active_level() >= ::mik::Level::avx2 ? avx2::__VA_ARGS__   \
                                                 : portable::__VA_ARGS__)
#else
#define MIK_X86_LEVELS 0
#define MIK_AT_LEVEL(...) (portable::__VA_ARGS__)
#endif
