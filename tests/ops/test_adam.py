# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from adam_cases import BETAS, EPS, LR, plain, unit_rows
from one_level import one_level
from oracle import assert_accurate, identical, num_threads, randn, unchanged

from mikernels._dispatch import accumulate_dtype
from mikernels.ops.sae.adam import adam_rows_op, grad_sumsq_op

LOW = (torch.bfloat16, torch.float16)
SHAPES = [(0, 5), (1, 1), (33, 17), (301, 64), (3, 2305)]


def fused(impl, param, gradients, clip, project, unit_norm):
    p = param.clone()
    acc = accumulate_dtype(param.dtype)
    moments = torch.zeros(param.shape, dtype=acc), torch.zeros(param.shape, dtype=acc)
    clip = torch.tensor(clip, dtype=acc)
    lr, step = torch.tensor(LR, dtype=torch.float64), torch.tensor(0)
    for g in gradients:
        step += 1
        with unchanged(g, clip, lr, step):
            adam_rows_op(p, g, *moments, lr, *BETAS, EPS, step, clip, project, unit_norm, impl=impl)
    return p, *moments


@pytest.mark.parametrize("project, unit_norm", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("rows, d", SHAPES)
def test_adam_equals_torch_adam_and_the_constraint(impl, dtype, rows, d, project, unit_norm):
    param = unit_rows(rows, d, dtype)
    # a low-precision parameter takes gradients of its own dtype or, as here at d = 17, of fp32
    gradients = [
        randn(rows, d, dtype=torch.float32 if d == 17 else dtype, seed=seed) for seed in (1, 2, 3)
    ]
    arguments = param, gradients, 0.5, bool(project), bool(unit_norm)
    actual = fused(impl, *arguments)
    oracle = plain(*arguments, torch.float64, torch.float64)
    eager = plain(*arguments, torch.float32, dtype)
    for result, exact, in_eager in zip(actual, oracle, eager, strict=True):
        assert_accurate(result, exact, in_eager)


def test_adam_in_fp64(impl):
    param = unit_rows(33, 17, torch.float64)
    gradients = [randn(33, 17, dtype=torch.float64, seed=seed) for seed in (1, 2, 3)]
    arguments = param, gradients, 0.5, True, True
    expected = plain(*arguments, torch.float64, torch.float64)
    for result, exact in zip(fused(impl, *arguments), expected, strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-13, atol=1e-16)


def test_adam_of_zero_rows_and_zero_gradients(impl):
    param = unit_rows(5, 8, torch.float32)
    param[2] = 0
    gradient = randn(5, 8)
    gradient[[1, 2]] = 0
    p, m, v = fused(impl, param, [gradient], 1.0, True, True)
    assert p.isfinite().all() and m.isfinite().all() and v.isfinite().all()
    assert torch.equal(p[2], torch.zeros(8))
    torch.testing.assert_close(p[1], param[1])
    assert not m[[1, 2]].any() and not v[[1, 2]].any()


def test_adam_shows_nan_in_its_row_only(impl):
    gradient = randn(6, 9)
    gradient[4, 7] = float("nan")
    results = fused(impl, unit_rows(6, 9, torch.float32), [gradient], 1.0, True, True)
    for result in results:
        assert result[4].isnan().all()
        assert result[[0, 1, 2, 3, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, *LOW, torch.float64])
def test_adam_takes_strided_gradients(level, dtype):
    param, gradient = unit_rows(40, 24, dtype), randn(40, 24, dtype=dtype, seed=1)
    wide = torch.stack([gradient, gradient + 1], -1)[..., 0]
    row = gradient[:1]
    for dense, strided in (
        (gradient, gradient.T.contiguous().T),
        (gradient, wide),
        (row.repeat(40, 1), row.expand(40, 24)),
    ):
        expected = fused("cpp", param, [dense], 1.0, True, True)
        actual = fused("cpp", param, [strided], 1.0, True, True)
        assert all(identical(a, b) for a, b in zip(actual, expected, strict=True))
        expected = grad_sumsq_op(dense, param, True)
        assert torch.equal(grad_sumsq_op(strided, param, True), expected)


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW, torch.float64])
@pytest.mark.parametrize("rows, d", SHAPES)
def test_grad_sumsq(impl, dtype, rows, d, project):
    param, gradient = unit_rows(rows, d, dtype), randn(rows, d, dtype=dtype, seed=1)
    with unchanged(param, gradient):
        actual = grad_sumsq_op(gradient, param, project, impl=impl)
    assert actual.dtype == torch.float64 and actual.shape == ()

    def norm(g, p):
        return (g - (g * p).sum(-1, keepdim=True) * p if project else g).square().sum()

    oracle = norm(gradient.double(), param.double())
    if dtype == torch.float64:
        torch.testing.assert_close(actual, oracle, rtol=1e-13, atol=1e-16)
        return
    # an fp64 number that must be as good as one pass of eager fp32; the projection is a difference
    eager = norm(gradient.float(), param.float())
    scale = gradient.double().square().sum().item()
    assert_accurate(actual.float(), oracle, eager, scale=scale)


def test_adam_is_one_function_of_its_input(level):
    param, gradient = unit_rows(1001, 33, torch.float32), randn(1001, 33, seed=1)

    def run():
        return *fused("cpp", param, [gradient] * 2, 0.7, True, True), grad_sumsq_op(
            gradient, param, True
        )

    first = run()
    for threads in (1, 2, 2):
        with num_threads(threads):
            assert all(identical(a, b) for a, b in zip(run(), first, strict=True))


BROKEN = {
    "shape of the gradient": {"grad": torch.zeros(4, 2)},
    "dtype of the gradient": {"grad": torch.zeros(4, 3).half()},
    "shape of exp_avg": {"exp_avg": torch.zeros(4, 2)},
    "dtype of exp_avg_sq": {"exp_avg_sq": torch.zeros(4, 3).bfloat16()},
    "strides of the parameter": {"param": torch.zeros(3, 4).T},
    "step of 0": {"step": torch.tensor(0)},
    "two steps": {"step": torch.tensor([1, 2])},
    "dtype of the step": {"step": torch.tensor(1, dtype=torch.int32)},
    "two learning rates": {"lr": torch.zeros(2)},
    "dtype of the learning rate": {"lr": torch.tensor(LR).half()},
    "clip": {"clip": torch.zeros(2)},
}


@one_level
@pytest.mark.parametrize("case", BROKEN)
def test_adam_of_mismatched_operands_raises(level, case):
    operands = {
        "param": torch.ones(4, 3),
        "grad": torch.ones(4, 3),
        "exp_avg": torch.zeros(4, 3),
        "exp_avg_sq": torch.zeros(4, 3),
        **{"lr": torch.tensor(LR), "beta1": 0.9, "beta2": 0.999, "eps": EPS},
        "step": torch.tensor(1),
        "clip": torch.tensor(1.0),
        **{"project": False, "unit_norm": False},
        **BROKEN[case],
    }
    with unchanged(operands["param"]), pytest.raises(RuntimeError, match="adam"):
        adam_rows_op(*operands.values())
