// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/amx.h"

#include "cpu/simd/levels.h"

#if MIK_X86_LEVELS
#include <immintrin.h>

namespace mik::amx {
namespace {

// the layout that ldtilecfg reads: eight tiles of 16 rows by 64 bytes
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
// static: GCC 12's _tile_loadconfig tells the compiler of its first 8 bytes only, so the stores
// that would fill a local one can be dropped
const TileConfig kTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

}  // namespace

#define MIK_AMX __attribute__((target("amx-tile,amx-bf16")))

MIK_AMX void configure_tiles() { _tile_loadconfig(&kTiles); }

MIK_AMX void release_tiles() { _tile_release(); }

// tiles 0..3 hold the 2 x 2 sums, 4..5 two blocks of 16 features, 6..7 two blocks of 16 tokens
MIK_AMX void multiply_tiles(const uint16_t* w, int64_t ldw, const uint16_t* x, int64_t tile_stride,
                            int64_t pairs, float* out) {
  const int64_t w_bytes = ldw * 2;
  const uint16_t *w1 = w + 16 * ldw, *x1 = x + tile_stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t pair = 0; pair < pairs; pair += 16) {
    _tile_loadd(4, w + pair * 2, w_bytes);
    _tile_loadd(6, x + pair * 32, 64);
    _tile_loadd(7, x1 + pair * 32, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, w1 + pair * 2, w_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, 128);
  _tile_stored(1, out + 16, 128);
  _tile_stored(2, out + 16 * 32, 128);
  _tile_stored(3, out + 16 * 32 + 16, 128);
}

MIK_AMX double tile_flops(int64_t rounds) {
  configure_tiles();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t round = 0; round < rounds / 16; ++round) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  release_tiles();
  return 2.0 * 16 * 16 * 32 * 4 * static_cast<double>(rounds / 16);
}

}  // namespace mik::amx

#else

namespace mik::amx {

// never reached: the level is not offered without x86
void configure_tiles() {}
void release_tiles() {}
void multiply_tiles(const uint16_t*, int64_t, const uint16_t*, int64_t, int64_t, float*) {}
double tile_flops(int64_t) { return 0; }

}  // namespace mik::amx

#endif
