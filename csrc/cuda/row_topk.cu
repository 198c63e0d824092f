// SPDX-License-Identifier: Apache-2.0
// row_topk in CUDA C++, as an operator of its own: the CUDA key of row_topk is Triton's.
#include "cuda/device.h"
#include "cuda/row_topk_body.h"

namespace mik::cuda {
namespace {

template <class Format>
void run(const Tensor& scores, int64_t k, bool sorted, const Tensor& values,
         const Tensor& indices) {
  using Bits = typename Format::Bits;
  const OnDevice on("row_topk_cuda", scores);
  const uint32_t columns = static_cast<uint32_t>(scores.size(1));
  const Plan plan = make_plan<Format>(columns, static_cast<uint32_t>(k), sorted);
  const uint32_t rows = static_cast<uint32_t>(scores.size(0));
  row_topk_kernel<Format><<<rows, plan.threads, plan.shared_bytes, on.stream>>>(
      data<Bits>(scores), scores.stride(0), columns, static_cast<uint32_t>(k), sorted, plan,
      mutable_data<Bits>(values), mutable_data<int64_t>(indices));
  on.launched();
}

std::tuple<Tensor, Tensor> row_topk_cuda(Tensor scores, int64_t k, bool sorted) {
  check(scores.dim() == 2 && k >= 1 && k <= scores.size(1),
        "row_topk_cuda: expected [N, F], k in 1..F");
  check(scores.size(1) < INT32_MAX && scores.size(0) <= INT32_MAX,
        "row_topk_cuda: at most 2^31 - 1 rows and 2^31 - 2 columns");
  scores = dense_rows(scores);
  Tensor values = empty(scores, {scores.size(0), k});
  Tensor indices = empty(scores, {scores.size(0), k}, ScalarType::Long);
  if (scores.size(0) == 0) return {values, indices};
  switch (scores.scalar_type()) {
    case ScalarType::BFloat16:
      run<Bf16>(scores, k, sorted, values, indices);
      break;
    case ScalarType::Half:
      run<Fp16>(scores, k, sorted, values, indices);
      break;
    case ScalarType::Float:
      run<Fp32>(scores, k, sorted, values, indices);
      break;
    default:
      throw std::runtime_error("row_topk_cuda: expected float32, bfloat16 or float16");
  }
  return {values, indices};
}

STABLE_TORCH_LIBRARY_FRAGMENT(mikernels, m) {
  m.def("row_topk_cuda(Tensor scores, SymInt k, bool sorted) -> (Tensor values, Tensor indices)");
}

STABLE_TORCH_LIBRARY_IMPL(mikernels, CUDA, m) {
  m.impl("row_topk_cuda", TORCH_BOX(&row_topk_cuda));
}

}  // namespace
}  // namespace mik::cuda
