// SPDX-License-Identifier: Apache-2.0
// row_topk in CUDA C++, and the same into parts of larger outputs, as encode takes it panel by
// panel.
//
// Measured on an H200, 4096 x 32768, k = 32: fp32 0.153 ms, bf16 0.110 (Triton's 0.208, 0.126).
// Predicted, not measured, for bf16, 8192 x 131072, k = 64:
//   bytes: the matrix 2147 MB, 64 groups of 128 bytes per row again 67 MB, output 5 MB: 2.22 GB,
//     which is 0.52 ms at 4.3 TB/s (H200) and 0.74 ms at 3.0 TB/s (H100).
//   instructions: the loop that reads has 107 in sm_90 code for 1024 elements of a warp (4 loads of
//     16 bytes, 20 packed maxima, 12 shuffles), 13.7 k per row; the selection has about as many.
//     8192 x 27 k at 132 multiprocessors x 4 x 1.755 GHz is 0.24 ms, below half of the bytes' time.
//   in flight: 5 blocks x 256 threads x 64 bytes = 80 kB per multiprocessor, of which a third
//     selects at any time; 33 bytes/ns (H200) x 1 us need 33 kB.
//   Hence 0.55 to 0.62 ms on an H200 and 0.78 to 0.87 ms on an H100: 5 % for the last wave (12
//   waves of 660 blocks) and up to 12 % for what does not overlap. Of the figures measured this
//   would have made 0.142 and 0.072: less overlaps, and bench/gpu/predict.py says 0.67 now.
#include "cuda/device.h"
#include "cuda/row_topk_body.h"

namespace mik::cuda {
namespace {

template <class Format>
void run(const OnDevice& on, const Tensor& scores, int64_t k, bool sorted, const Tensor& values,
         const Tensor& indices, int64_t base) {
  using Bits = typename Format::Bits;
  const uint32_t columns = static_cast<uint32_t>(scores.size(1));
  const Plan plan = make_plan<Format>(columns, static_cast<uint32_t>(k), sorted);
  const uint32_t rows = static_cast<uint32_t>(scores.size(0));
  const Selected<Format> out = {mutable_data<Bits>(values), indices.data_ptr(), values.stride(0),
                                static_cast<uint32_t>(base),
                                indices.scalar_type() == ScalarType::Long};
  row_topk_kernel<Format><<<rows, plan.threads, plan.shared_bytes, on.stream>>>(
      data<Bits>(scores), scores.stride(0), columns, static_cast<uint32_t>(k), sorted, plan, out);
  on.launched();
}

void select(Tensor scores, int64_t k, bool sorted, const Tensor& values, const Tensor& indices,
            int64_t base) {
  check(scores.dim() == 2 && k >= 1 && k <= scores.size(1),
        "row_topk_cuda: expected [N, F], k in 1..F");
  check(scores.size(1) < INT32_MAX && scores.size(0) <= INT32_MAX,
        "row_topk_cuda: at most 2^31 - 1 rows and 2^31 - 2 columns");
  const OnDevice on("row_topk_cuda", scores);
  scores = dense_rows(scores);
  if (scores.size(0) == 0) return;
  switch (scores.scalar_type()) {
    case ScalarType::BFloat16:
      return run<Bf16>(on, scores, k, sorted, values, indices, base);
    case ScalarType::Half:
      return run<Fp16>(on, scores, k, sorted, values, indices, base);
    case ScalarType::Float:
      return run<Fp32>(on, scores, k, sorted, values, indices, base);
    default:
      throw std::runtime_error("row_topk_cuda: expected float32, bfloat16 or float16");
  }
}

std::tuple<Tensor, Tensor> row_topk_cuda(Tensor scores, int64_t k, bool sorted) {
  check(scores.dim() == 2, "row_topk_cuda: expected [N, F]");
  Tensor values = empty(scores, {scores.size(0), k});
  Tensor indices = empty(scores, {scores.size(0), k}, ScalarType::Long);
  select(scores, k, sorted, values, indices, 0);
  return {values, indices};
}

// values and indices [N, k] by ascending index, of one row stride; indices int64 or int32
void row_topk_into_cuda(Tensor scores, int64_t k, Tensor values, Tensor indices, int64_t base) {
  const auto fits = [&](const Tensor& t) {
    return t.dim() == 2 && t.size(0) == scores.size(0) && t.size(1) == k &&
           (k == 1 || t.stride(1) == 1) && t.get_device_index() == scores.get_device_index();
  };
  const ScalarType type = indices.scalar_type();
  check(scores.dim() == 2 && fits(values) && fits(indices) &&
            (scores.size(0) <= 1 || values.stride(0) == indices.stride(0)) &&
            values.scalar_type() == scores.scalar_type() &&
            (type == ScalarType::Long || type == ScalarType::Int),
        "row_topk_into_cuda: expected values and int indices [N, k] with dense rows of one stride");
  check(base >= 0 && base + scores.size(1) <= INT32_MAX,
        "row_topk_into_cuda: indices must stay below 2^31");
  select(scores, k, false, values, indices, base);
}

MIK_DEFINE(m) {
  m.def("row_topk_cuda(Tensor scores, SymInt k, bool sorted) -> (Tensor values, Tensor indices)");
  m.def(
      "row_topk_into_cuda(Tensor scores, SymInt k, Tensor(a!) values, Tensor(b!) indices, "
      "int base) -> ()");
}

MIK_REGISTER(CUDA, m) {
  m.impl("row_topk_cuda", TORCH_BOX(&row_topk_cuda));
  m.impl("row_topk_into_cuda", TORCH_BOX(&row_topk_into_cuda));
}

}  // namespace
}  // namespace mik::cuda
