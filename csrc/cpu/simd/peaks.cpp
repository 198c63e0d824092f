// SPDX-License-Identifier: Apache-2.0
// The ceilings that benchmarks compare with: measured here and now, never taken from a datasheet.
#include "cpu/simd/peaks.h"

#include "common.h"
#include "cpu/simd/amx.h"
#include "cpu/simd/levels.h"

#include <algorithm>
#include <chrono>
#include <vector>

#define MIK_BODY "cpu/simd/peaks_body.h"
#include "cpu/simd/each_screen_level.h"

namespace mik {
namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// best of five: the sum over workers of work done, by the time of the slowest
template <class F>
double best_rate(int64_t workers, const F& work) {
  double best = 0;
  for (int trial = 0; trial < 5; ++trial) {
    std::vector<double> done(workers);
    const double start = seconds();
    parallel(workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) done[worker] = work(worker);
    });
    const double elapsed = seconds() - start;
    double total = 0;
    for (double amount : done) total += amount;
    best = std::max(best, total / elapsed * 1e-9);
  }
  return best;
}

}  // namespace

Peaks measure_peaks(bool all_threads) {
  constexpr int64_t kRounds = 4'000'000;
  // per worker, larger than any private cache
  constexpr int64_t kFloats = 16 << 20;
  const int64_t workers = all_threads ? torch::stable::get_num_threads() : 1;
  std::vector<std::vector<float>> from(workers), to(workers);
  parallel(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      from[worker].assign(kFloats, 1.f);
      to[worker].assign(kFloats, 0.f);
    }
  });
  Peaks peaks{};
  peaks.fma_gflops =
      best_rate(workers, [&](int64_t w) { return MIK_AT_LEVEL(fma_flops)(kRounds, to[w].data()); });
  peaks.madd16_gops =
      best_rate(workers, [&](int64_t w) { return MIK_SCREEN(madd16_ops)(kRounds, to[w].data()); });
  peaks.dot8_gops =
      best_rate(workers, [&](int64_t w) { return MIK_SCREEN(dot8_ops)(kRounds, to[w].data()); });
  if (active_level() == Level::amx)
    peaks.tile_gflops = best_rate(workers, [&](int64_t) { return amx::tile_flops(kRounds); });
  peaks.copy_gbs = best_rate(workers, [&](int64_t w) {
    std::memcpy(to[w].data(), from[w].data(), kFloats * sizeof(float));
    return 2.0 * kFloats * sizeof(float);
  });
  peaks.read_gbs = best_rate(workers, [&](int64_t w) {
    to[w][0] = MIK_AT_LEVEL(read_sum)(from[w].data(), kFloats);
    return 1.0 * kFloats * sizeof(float);
  });
  return peaks;
}

}  // namespace mik
