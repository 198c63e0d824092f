// SPDX-License-Identifier: Apache-2.0
// positional_dot_: out[i, b] += scale[i] <grads[b, positions[i]], vectors[i]>, position by
// position.
#include "common.h"
#include "cpu/pairs/row_products.h"

namespace mik {
namespace {

// vectors of one position that meet its gradients at a time
constexpr int64_t kVectors = 48;

struct Group {
  int64_t position, begin, end;
};

// the vectors in order of position, and runs of at most kVectors at one position
std::vector<Group> grouped(const int64_t* positions, int64_t stride, int64_t n, int64_t count,
                           std::vector<int64_t>& order) {
  std::vector<int64_t> offsets(count + 1);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t p = positions[i * stride];
    check(p >= 0 && p < count, "positional_dot_: positions must be in 0..P-1");
    ++offsets[p + 1];
  }
  for (int64_t p = 0; p < count; ++p) offsets[p + 1] += offsets[p];
  order.resize(n);
  std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
  for (int64_t i = 0; i < n; ++i) order[next[positions[i * stride]]++] = i;
  std::vector<Group> groups;
  for (int64_t p = 0; p < count; ++p)
    for (int64_t i = offsets[p]; i < offsets[p + 1]; i += kVectors)
      groups.push_back({p, i, std::min(offsets[p + 1], i + kVectors)});
  return groups;
}

template <class T>
void run(const Tensor& grads, const Tensor& vectors, const std::vector<Group>& groups,
         const std::vector<int64_t>& order, const OptionalTensor& scale, const Tensor& out) {
  using A = accumulator_t<T>;
  const int64_t batch = grads.size(0), d = grads.size(2);
  parallel(static_cast<int64_t>(groups.size()), 1, [&](int64_t begin, int64_t end) {
    BlockProduct<T> product;
    std::vector<double> sums;
    for (int64_t g = begin; g < end; ++g) {
      const Group& group = groups[g];
      const int64_t found = group.end - group.begin;
      const Rows<T> here{data<T>(grads) + group.position * grads.stride(1), grads.stride(0),
                         grads.stride(2)};
      sums.assign(batch * found, 0.);
      Rows<T> met{data<T>(vectors), vectors.stride(0), vectors.stride(1)};
      met.index = order.data() + group.begin;
      product.add(here, met, {0, batch, 0, found}, d, nullptr, sums.data());
      for (int64_t j = 0; j < found; ++j) {
        const int64_t i = order[group.begin + j];
        const double factor =
            scale.has_value()
                ? static_cast<double>(static_cast<A>(data<T>(*scale)[i * scale->stride(0)]))
                : 1.;
        A* to = mutable_data<A>(out) + i * out.stride(0);
        for (int64_t b = 0; b < batch; ++b)
          to[b * out.stride(1)] += static_cast<A>(factor * sums[b * found + j]);
      }
    }
  });
}

void positional_dot(Tensor grads, Tensor vectors, Tensor positions, OptionalTensor scale,
                    Tensor out) {
  check(grads.dim() == 3 && vectors.dim() == 2 && vectors.size(1) == grads.size(2) &&
            vectors.scalar_type() == grads.scalar_type(),
        "positional_dot_: expected grads [B, P, d] and vectors [n, d] of one dtype");
  const int64_t n = vectors.size(0);
  check(
      positions.dim() == 1 && positions.size(0) == n && positions.scalar_type() == ScalarType::Long,
      "positional_dot_: positions must be [n] int64");
  check(!scale.has_value() || (scale->dim() == 1 && scale->size(0) == n &&
                               scale->scalar_type() == grads.scalar_type()),
        "positional_dot_: scale must be [n] in the dtype of grads");
  const auto wide =
      grads.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(out.dim() == 2 && out.size(0) == n && out.size(1) == grads.size(0) &&
            out.scalar_type() == wide,
        "positional_dot_: out must be [n, B] in fp32 (fp64 for fp64)");
  std::vector<int64_t> order;
  const auto groups =
      grouped(data<int64_t>(positions), positions.stride(0), n, grads.size(1), order);
  MIK_DISPATCH_FLOATING(grads, [&] { run<scalar_t>(grads, vectors, groups, order, scale, out); });
}

MIK_REGISTER(CPU, m) { m.impl("positional_dot_", TORCH_BOX(&positional_dot)); }

}  // namespace
}  // namespace mik
