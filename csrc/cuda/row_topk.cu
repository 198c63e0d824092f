// SPDX-License-Identifier: Apache-2.0
// row_topk in CUDA C++, as an operator of its own: the CUDA key of row_topk is Triton's.
//
// Predicted, not measured, for bf16, 8192 x 131072, k = 64:
//   bytes: the matrix 2147 MB, 64 groups of 128 bytes per row again 67 MB, output 5 MB: 2.22 GB,
//     which is 0.52 ms at 4.3 TB/s (H200) and 0.74 ms at 3.0 TB/s (H100).
//   instructions: the loop that reads has 107 in sm_90 code for 1024 elements of a warp (4 loads of
//     16 bytes, 20 packed maxima, 12 shuffles), 13.7 k per row; the selection has about as many.
//     8192 x 27 k at 132 multiprocessors x 4 x 1.755 GHz is 0.24 ms, below half of the bytes' time.
//   in flight: 5 blocks x 256 threads x 64 bytes = 80 kB per multiprocessor, of which a third
//     selects at any time; 33 bytes/ns (H200) x 1 us need 33 kB.
//   Hence 0.55 to 0.62 ms on an H200 and 0.78 to 0.87 ms on an H100: 5 % for the last wave (12
//   waves of 660 blocks) and up to 12 % for what does not overlap.
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
