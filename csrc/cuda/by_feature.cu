// SPDX-License-Identifier: Apache-2.0
// by_feature in CUDA C++: a radix sort over as many bits as features have, whose last pass has the
// offsets in hand. torch's sort knows neither.
//
// Predicted, not measured, for 8192 x 64 slots of 131072 features (17 bits, two passes), H200:
//   bytes: 8 in, 8 out a slot and 16 between the passes, the counts twice more: 20 MB, mostly from
//     L2, 5 us; offsets 1 MB. All counts in each of 128 blocks, 67 MB of L2: 12 us.
//   within a tile: 128 tiles on 132 multiprocessors, one each, some 4 us a pass.
//   launches: 4, 12 us.
//   Hence some 37 us; torch's sort and search were measured at 110, with a check of the indices.
#include "cuda/by_feature_body.h"
#include "cuda/device.h"

namespace mik::cuda {
namespace {

std::tuple<Tensor, Tensor> by_feature_cuda(Tensor indices, int64_t n_features) {
  check(indices.dim() == 1 && indices.scalar_type() == ScalarType::Long && n_features >= 0,
        "by_feature_cuda: expected int64 indices [M], n_features >= 0");
  const int64_t slots = indices.numel();
  check(slots < INT32_MAX && n_features < INT32_MAX,
        "by_feature_cuda: at most 2^31 - 2 slots and features");
  check(slots == 0 || n_features > 0, "by_feature_cuda: there is nothing to index");
  const OnDevice on("by_feature_cuda", indices);
  indices = torch::stable::contiguous(indices);
  Tensor order = empty(indices, {slots});
  if (slots == 0) return {torch::stable::new_zeros(indices, {n_features + 1}), order};
  Tensor offsets = empty(indices, {n_features + 1});
  const SortPlan plan = make_sort_plan(slots, n_features);
  Tensor counts = empty(indices, {plan.chunks, MAX_DIGITS}, ScalarType::Int);
  Tensor between =
      empty(indices, {2 * std::min<int64_t>(plan.passes - 1, 2), slots}, ScalarType::Int);
  SortPass pass = {};
  pass.features = data<int64_t>(indices);
  pass.order = mutable_data<int64_t>(order);
  pass.offsets = mutable_data<int64_t>(offsets);
  pass.counts = mutable_data<uint32_t>(counts);
  pass.slots = static_cast<uint32_t>(slots);
  pass.n_features = static_cast<uint32_t>(n_features);
  by_feature_kernels(plan, pass, mutable_data<uint32_t>(between),
                     [&](auto kernel, uint32_t shared_bytes, const SortPass& each) {
                       kernel<<<plan.chunks, SORT_THREADS, shared_bytes, on.stream>>>(each);
                       on.launched();
                     });
  return {offsets, order};
}

MIK_DEFINE(m) {
  m.def("by_feature_cuda(Tensor indices, SymInt n_features) -> (Tensor offsets, Tensor order)");
}

MIK_REGISTER(CUDA, m) { m.impl("by_feature_cuda", TORCH_BOX(&by_feature_cuda)); }

}  // namespace
}  // namespace mik::cuda
