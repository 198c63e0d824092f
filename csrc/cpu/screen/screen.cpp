// SPDX-License-Identifier: Apache-2.0
#include "cpu/screen/screen.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#define MIK_BODY "cpu/screen/quantise_body.h"
#include "cpu/simd/each_screen_level.h"

namespace mik {
namespace {

std::atomic<int64_t> coarse_so_far{0}, fine_so_far{0};

}  // namespace

ScreenedSoFar screened_so_far() { return {coarse_so_far, fine_so_far}; }

void note_screened(int64_t coarse, int64_t fine) {
  coarse_so_far.fetch_add(coarse, std::memory_order_relaxed);
  fine_so_far.fetch_add(fine, std::memory_order_relaxed);
}

QuantisedRow quantise(const float* row, int64_t d, uint16_t* out, int64_t padded) {
  return MIK_SCREEN(quantise_row)(row, d, out, padded);
}

bool has_coarse_screen(int64_t padded) {
  return (active_level() == Level::avxvnni || active_level() == Level::avx512) &&
         padded <= kCoarseDims;
}

TwiceQuantised quantise_twice(const float* row, const float* columns, int64_t d, int64_t padded,
                              float* scratch, int8_t* coarse, uint16_t* fine) {
#if MIK_X86_LEVELS
  if (active_level() == Level::avxvnni)
    return avxvnni::quantise_row_twice(row, columns, d, padded, scratch, coarse, fine);
  return avx512::quantise_row_twice(row, columns, d, padded, scratch, coarse, fine);
#else
  throw std::logic_error("no coarse screen at this level");
#endif
}

void into_tile(const uint16_t* row, int64_t padded, int64_t n, uint16_t* tiles) {
  uint16_t* tile = tiles + n / kTileTokens * kTileTokens * padded + n % kTileTokens * 2;
  for (int64_t pair = 0; pair < padded / 2; ++pair)
    std::memcpy(tile + pair * kTileTokens * 2, row + pair * 2, 4);
}

void into_byte_tile(const int8_t* row, int64_t padded, int64_t n, uint8_t* tiles) {
  uint8_t* tile = tiles + n / kTileTokens * kTileTokens * padded + n % kTileTokens * 4;
  for (int64_t quad = 0; quad < padded / 4; ++quad) {
    uint32_t bytes;
    std::memcpy(&bytes, row + quad * 4, 4);
    bytes ^= 0x80808080u;
    std::memcpy(tile + quad * kTileTokens * 4, &bytes, 4);
  }
}

double screen_rounding(int64_t padded) {
  // fp32 sums of 2 ceil(d / 2) products on AMX, exact integers elsewhere
  return active_level() == Level::amx ? 2. * static_cast<double>(padded) * 0x1p-24 : 0.;
}

int64_t tiles_in_cache(int64_t padded) {
  // half of the L2 for the tiles, the rest for what streams: 512 KB on Zen 3, 2 MB with AVX-512
  const int64_t l2 = active_level() >= Level::avx512 ? 1 << 20 : 1 << 18;
  return std::max<int64_t>(l2 / (kTileTokens * 2 * padded) / 2 * 2, 2);
}

double exact_dot(const double* x, const float* w, int64_t d) {
  return MIK_AT_LEVEL(exact_dot<float>)(x, w, d);
}

double exact_dot(const double* x, const torch::headeronly::BFloat16* w, int64_t d) {
  return MIK_AT_LEVEL(exact_dot<torch::headeronly::BFloat16>)(x, w, d);
}

double exact_dot(const double* x, const torch::headeronly::Half* w, int64_t d) {
  return MIK_AT_LEVEL(exact_dot<torch::headeronly::Half>)(x, w, d);
}

void exact_dots(const float* w, const float* const* x, int64_t count, int64_t d, double* out) {
  MIK_AT_LEVEL(exact_dots_of<float, float>)(w, x, count, d, out);
}

void exact_dots(const double* x, const float* const* rows, int64_t count, int64_t d, double* out) {
  MIK_AT_LEVEL(exact_dots_of<double, float>)(x, rows, count, d, out);
}

void exact_dots(const double* x, const torch::headeronly::BFloat16* const* rows, int64_t count,
                int64_t d, double* out) {
  MIK_AT_LEVEL(exact_dots_of<double, torch::headeronly::BFloat16>)(x, rows, count, d, out);
}

void exact_dots(const double* x, const torch::headeronly::Half* const* rows, int64_t count,
                int64_t d, double* out) {
  MIK_AT_LEVEL(exact_dots_of<double, torch::headeronly::Half>)(x, rows, count, d, out);
}

}  // namespace mik
