// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/row_topk_body.h behind a C function. Each part of the plan can be forced.
#include <cstdio>

#include "cuda/row_topk_body.h"

namespace mik::cuda {

alignas(16) unsigned char shared_bytes[emulator::SHARED_BYTES];

namespace {

struct Call {
  const void* scores;
  int64_t rows, columns, stride, k;
  int32_t sorted;
  void *values, *indices;
  int64_t stride_out, base;
  int32_t wide;
  int32_t threads, spread, whole_row, sort_shared;  // -1: as planned
  uint64_t order;
};

template <class Format>
std::string run(const Call& call) {
  using Bits = typename Format::Bits;
  const uint32_t columns = static_cast<uint32_t>(call.columns), k = static_cast<uint32_t>(call.k);
  Plan plan = make_plan<Format>(columns, k, call.sorted);
  if (call.threads >= 0) plan.threads = call.threads;
  if (call.spread >= 0) plan.spread = call.spread;
  if (call.whole_row >= 0) plan.whole_row = call.whole_row;
  if (call.sort_shared >= 0) plan.sort_shared = call.sort_shared;
  lay_out<Format>(plan, columns, k, call.sorted);
  const Selected<Format> out = {static_cast<Bits*>(call.values), call.indices, call.stride_out,
                                static_cast<uint32_t>(call.base), call.wide != 0};
  return emulator::launch(static_cast<uint32_t>(call.rows), plan.threads, shared_bytes,
                          plan.shared_bytes, call.order, [&] {
                            row_topk_kernel<Format>(static_cast<const Bits*>(call.scores),
                                                    call.stride, columns, k, call.sorted, plan,
                                                    out);
                          });
}

}  // namespace
}  // namespace mik::cuda

// format: 0 bf16, 1 fp16, 2 fp32; "" or what went wrong
extern "C" const char* row_topk(int format, const mik::cuda::Call* call) {
  using namespace mik::cuda;
  static std::string message;
  message = format == 0 ? run<Bf16>(*call) : format == 1 ? run<Fp16>(*call) : run<Fp32>(*call);
  return message.c_str();
}

// the plan of a shape, as [threads, spread, whole_row, sort_shared, shared_bytes]
extern "C" void row_topk_plan(int format, int64_t columns, int64_t k, int sorted, int64_t* out) {
  using namespace mik::cuda;
  const auto n = static_cast<uint32_t>(columns), m = static_cast<uint32_t>(k);
  const Plan plan = format == 2 ? make_plan<Fp32>(n, m, sorted) : make_plan<Bf16>(n, m, sorted);
  const int64_t facts[] = {plan.threads, plan.spread, plan.whole_row, plan.sort_shared,
                           plan.shared_bytes};
  std::memcpy(out, facts, sizeof(facts));
}
