// SPDX-License-Identifier: Apache-2.0
// AMX tiles: configuration and the 32 x 32 bf16 product that the screens are made of.
#pragma once

#include <cstdint>

namespace mik::amx {

// set up and give back this thread's tile registers; oneDNN shares them, so never hold them across
// calls
void configure_tiles();
void release_tiles();

// out[32][32] = w[32 rows, ldw] x tile pair, fp32 sums of bf16 products; `pairs` is a multiple
// of 16. x holds two tiles of 16 tokens as [pairs][16 tokens][2], tile_stride elements apart
void multiply_tiles(const uint16_t* w, int64_t ldw, const uint16_t* x, int64_t tile_stride,
                    int64_t pairs, float* out);

// `rounds` tile products on this thread, without memory traffic; returns flops
double tile_flops(int64_t rounds);

}  // namespace mik::amx
