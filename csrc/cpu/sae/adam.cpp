// SPDX-License-Identifier: Apache-2.0
// adam_rows_, grad_sumsq: see mikernels/ops/sae/adam.py.
#include "cpu/sae/adam.h"

#include "common.h"
#include "cpu/simd/levels.h"
#include "cpu/simd/scalar.h"

#include <cmath>

#if defined(__x86_64__) && defined(__GLIBC__)
// glibc 2.29 renamed pow for its errno alone; under its old name it is the same function, and the
// extension loads on glibc 2.28 too (manylinux_2_28)
__asm__(".symver pow, pow@GLIBC_2.2.5");
#endif

#define MIK_BODY "cpu/sae/adam_body.h"
#include "cpu/simd/each_level.h"

namespace mik {
namespace {

// rows of one task, and of one partial sum of squares
constexpr int64_t kPieceRows = 64;

// P, G over the pairs that occur: one dtype, or fp32 gradients of a low-precision parameter
template <class F>
void dispatch_pair(const Tensor& param, const Tensor& grad, const F& f) {
  check(param.is_contiguous() && param.dim() == 2 && grad.dim() == 2 &&
            grad.size(0) == param.size(0) && grad.size(1) == param.size(1),
        "adam: expected a contiguous parameter [R, C] and a gradient of its shape");
  MIK_DISPATCH_FLOATING(param, [&] {
    using A = accumulator_t<scalar_t>;
    if (grad.scalar_type() == param.scalar_type()) {
      f(static_cast<scalar_t*>(nullptr), static_cast<scalar_t*>(nullptr), A());
    } else {
      check(grad.scalar_type() == ScalarType::Float && sizeof(A) == sizeof(float),
            "adam: the gradient must have the parameter's dtype or be float32");
      f(static_cast<scalar_t*>(nullptr), static_cast<float*>(nullptr), A());
    }
  });
}

// lr, step and clip are tensors for the sake of CUDA graphs; here they are read once per call
double number(const Tensor& t, bool whole, const char* message) {
  check(t.dim() == 0 && (whole || t.scalar_type() != ScalarType::Long), message);
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return *data<double>(t);
    case ScalarType::Float:
      return static_cast<double>(*data<float>(t));
    case ScalarType::Long:
      return static_cast<double>(*data<int64_t>(t));
    default:
      throw std::runtime_error(message);
  }
}

void adam_rows(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor lr_tensor,
               double beta1, double beta2, double eps, Tensor step_tensor, Tensor clip,
               bool project, bool unit_norm) {
  grad = torch::stable::contiguous(grad);
  const double factor = number(clip, false, "adam_rows_: clip must be one float32 or float64");
  const double lr = number(lr_tensor, false, "adam_rows_: lr must be one float32 or float64");
  const double step =
      number(step_tensor, true, "adam_rows_: step must be one int64, float32 or float64");
  check(step >= 1, "adam_rows_: step must be at least 1");
  dispatch_pair(param, grad, [&]<class P, class G, class A>(P*, G*, A) {
    for (const Tensor* state : {&exp_avg, &exp_avg_sq})
      check(state->is_contiguous() && state->dim() == 2 && state->size(0) == param.size(0) &&
                state->size(1) == param.size(1) &&
                state->scalar_type() ==
                    (sizeof(A) == sizeof(double) ? ScalarType::Double : ScalarType::Float),
            "adam_rows_: exp_avg and exp_avg_sq must be contiguous, of the parameter's shape, in "
            "its accumulation dtype");
    const int64_t rows = param.size(0), d = param.size(1);
    const AdamRows<P, G, A> all{
        .d = d,
        .param = mutable_data<P>(param),
        .grad = data<G>(grad),
        .exp_avg = mutable_data<A>(exp_avg),
        .exp_avg_sq = mutable_data<A>(exp_avg_sq),
        .rest1 = static_cast<A>(1 - beta1),
        .beta2 = static_cast<A>(beta2),
        .rest2 = static_cast<A>(1 - beta2),
        .step_size = static_cast<A>(lr / (1 - std::pow(beta1, step))),
        .inverse_correction = static_cast<A>(1 / std::sqrt(1 - std::pow(beta2, step))),
        .eps = static_cast<A>(eps),
        .clip = static_cast<A>(factor),
        .project = project,
        .unit_norm = unit_norm,
    };
    parallel(rows, kPieceRows, [&](int64_t begin, int64_t end) {
      std::unique_ptr<A[]> next(new A[d]);
      MIK_AT_LEVEL(adam_range<P, G, A>)(begin, end, all, next.get());
    });
  });
}

Tensor grad_sumsq(Tensor grad, Tensor param, bool project) {
  grad = torch::stable::contiguous(grad);
  Tensor out = empty(grad, {}, ScalarType::Double);
  dispatch_pair(param, grad, [&]<class P, class G, class A>(P*, G*, A) {
    const int64_t rows = param.size(0), d = param.size(1);
    const int64_t pieces = (rows + kPieceRows - 1) / kPieceRows;
    // one partial sum per fixed piece, added in order: the same bits for any thread count
    std::unique_ptr<double[]> partial(new double[pieces]);
    parallel(pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece)
        partial[piece] = MIK_AT_LEVEL(sumsq_range<P, G, A>)(
            piece * kPieceRows, std::min(rows, (piece + 1) * kPieceRows), d, data<P>(param),
            data<G>(grad), project);
    });
    double total = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) total += partial[piece];
    *mutable_data<double>(out) = total;
  });
  return out;
}

MIK_REGISTER(CPU, m) {
  m.impl("adam_rows_", TORCH_BOX(&adam_rows));
  m.impl("grad_sumsq", TORCH_BOX(&grad_sumsq));
}

}  // namespace
}  // namespace mik
