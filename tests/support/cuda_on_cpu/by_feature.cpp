// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/by_feature_body.h behind a C function.
#include "cuda/by_feature_body.h"

#include <vector>

namespace mik::cuda {

alignas(16) unsigned char shared_bytes[emulator::SHARED_BYTES];

namespace {

struct Call {
  const int64_t* features;
  int64_t slots, n_features, most_chunks, few_chunks;
  int64_t *offsets, *order;
  uint64_t order_of_threads;
};

std::string run(const Call& call) {
  const SortPlan plan =
      make_sort_plan(call.slots, call.n_features, call.most_chunks, call.few_chunks);
  // behind its end nothing may change
  constexpr uint32_t guard = 0x5a5a5a5a;
  struct alignas(16) Quad {
    uint32_t n[4] = {guard, guard, guard, guard};
  };
  std::vector<Quad> counts(plan.chunks * MAX_DIGITS / 4 + 1);
  const size_t size = 2 * std::min(plan.passes - 1, 2u) * call.slots;
  std::vector<uint32_t> between(size + 4, guard);
  SortPass pass = {};
  pass.features = call.features;
  pass.order = call.order;
  pass.offsets = call.offsets;
  pass.counts = counts[0].n;
  pass.slots = static_cast<uint32_t>(call.slots);
  pass.n_features = static_cast<uint32_t>(call.n_features);
  std::string message;
  by_feature_kernels(plan, pass, between.data(),
                     [&](auto kernel, uint32_t bytes, const SortPass& each) {
                       if (!message.empty()) return;
                       message = emulator::launch(plan.chunks, SORT_THREADS, shared_bytes, bytes,
                                                  call.order_of_threads, [&] { kernel(each); });
                     });
  for (size_t i = 0; i < 4; ++i)
    if (counts.back().n[i] != guard || between[size + i] != guard) return "scratch was overrun";
  return message;
}

}  // namespace
}  // namespace mik::cuda

// "" or what went wrong
extern "C" const char* by_feature(const mik::cuda::Call* call) {
  static std::string message;
  message = mik::cuda::run(*call);
  return message.c_str();
}

// [passes, digit_bits, bits, items, chunks, tiles] of sizes
extern "C" void by_feature_plan(int64_t slots, int64_t features, int64_t* out) {
  const mik::cuda::SortPlan plan = mik::cuda::make_sort_plan(slots, features);
  const int64_t facts[] = {plan.passes, plan.digit_bits, plan.bits,
                           plan.items,  plan.chunks,     plan.tiles};
  std::memcpy(out, facts, sizeof(facts));
}
