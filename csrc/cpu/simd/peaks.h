// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace mik {

// operations and bytes per second of this machine, measured now; 0 where a unit is absent
struct Peaks {
  double fma_gflops, madd16_gops, dot8_gops, tile_gflops, copy_gbs, read_gbs;
};

Peaks measure_peaks(bool all_threads);

}  // namespace mik
