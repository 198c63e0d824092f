// SPDX-License-Identifier: Apache-2.0
// row_topk: how a block goes about its row, chosen on the host from the shape.
#pragma once

#include "cuda/select.h"

namespace mik::cuda {

constexpr uint32_t MAX_THREADS = 256;
// 48 registers per thread are enough; 5 blocks keep up to 80 kB of loads in flight
constexpr uint32_t MIN_BLOCKS = 5;

struct Plan {
  uint32_t threads;  // of a block, a multiple of 32
  uint32_t spread;   // a group is 2^spread vectors of 16 bytes, at most a warp's load
  bool whole_row;    // no groups: select from the row itself
  bool sort_shared;  // else the sort, if any, runs in the output
  uint32_t buffer;   // offset in shared memory of the maxima, and of the sort after them
  uint32_t shared_bytes;
};

// bytes of shared memory for the maxima or the sort; all of it stays below the 48 kB that need no
// permission
constexpr uint32_t MAX_BUFFER = 36 << 10;
constexpr uint32_t MAX_LIST = 4096;

// 16 bytes each: the maxima of the groups of a row, wherever it starts
template <class Format>
uint64_t slots_of_maxima(uint32_t columns, uint32_t spread) {
  const uint64_t vectors = (columns + 2ull * width<Format> - 2) / width<Format>;
  const uint64_t groups = (vectors + (1u << spread) - 1) >> spread;
  return (groups + width<Format> - 1) / width<Format>;
}

// what the choices in the plan need of shared memory
template <class Format>
void lay_out(Plan& plan, uint32_t columns, uint32_t k, bool sorted) {
  const uint64_t list = plan.whole_row ? 0 : 2ull * k;
  const uint64_t maxima = plan.whole_row ? 0 : 16 * slots_of_maxima<Format>(columns, plan.spread);
  const uint64_t sort = sorted && plan.sort_shared ? 8ull * k : 0;
  plan.buffer = static_cast<uint32_t>((sizeof(Workspace) + list + 15) / 16 * 16);
  plan.shared_bytes = plan.buffer + static_cast<uint32_t>(maxima > sort ? maxima : sort);
}

template <class Format>
Plan make_plan(uint32_t columns, uint32_t k, bool sorted) {
  Plan plan = {};
  // short rows: 128 threads read them in one or two goes, and more rows are in flight
  plan.threads = columns / width<Format> <= 2048 ? 128 : MAX_THREADS;
  // maxima kept and elements read again, columns / group + k group, are fewest at
  // group = sqrt(columns / k)
  uint64_t group = width<Format>;
  const auto room = [&] {
    return 16 * slots_of_maxima<Format>(columns, plan.spread) <= MAX_BUFFER;
  };
  while (plan.spread < 5 && (group * group * k < columns || !room())) {
    group *= 2;
    ++plan.spread;
  }
  // the row read 3 times (16 bits) or 5, or once and k groups 3 times or 5
  plan.whole_row = 2 * k * group >= columns || k > MAX_LIST || !room();
  plan.sort_shared = 8ull * k <= MAX_BUFFER;
  lay_out<Format>(plan, columns, k, sorted);
  return plan;
}

}  // namespace mik::cuda
