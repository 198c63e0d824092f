# SPDX-License-Identifier: Apache-2.0
"""adam_rows_ and grad_sumsq by Triton, against torch.optim.Adam with the constraint by hand."""

import pytest
import torch
from adam_cases import BETAS, EPS, LR, plain, unit_rows
from oracle import assert_accurate, identical, randn, unchanged

from mikernels.ops.sae.adam import adam_rows_op, grad_sumsq_op

# a row in registers of odd and even width, one number, one long row, rows wider than registers hold
SHAPES = [(0, 5), (1, 1), (9, 17), (5, 64), (3, 769), (1, 2500), (2, 4097), (2, 8208)]
FLAGS = [(False, False), (True, False), (False, True), (True, True)]


def fused(device, param, gradients, clip, project, unit_norm, *, start=0, lr=LR, eps=EPS):
    """On `device`, and back on the CPU; `clip` is a tensor."""
    p = param.to(device, copy=True)
    moments = [torch.zeros(param.shape, device=device) for _ in range(2)]
    clip = clip.to(device)
    rate = torch.tensor(lr, device=device, dtype=torch.float64)
    step = torch.tensor(start, device=device)
    for g in gradients:
        step += 1
        g = g.to(device)
        with unchanged(g, clip, rate, step):
            arguments = p, g, *moments, rate, *BETAS, eps, step, clip, project, unit_norm
            adam_rows_op(*arguments, impl="triton")
    return [t.cpu() for t in (p, *moments)]


def gradients_of(rows, d, dtype):
    """Of the parameter's dtype, or, for some shapes, of float32."""
    dtype = torch.float32 if d % 2 else dtype
    return [randn(rows, d, dtype=dtype, seed=seed) for seed in (1, 2, 3)]


@pytest.mark.parametrize("project, unit_norm", FLAGS)
@pytest.mark.parametrize("rows, d", SHAPES)
def test_adam_equals_torch_adam_and_the_constraint(device, dtype, rows, d, project, unit_norm):
    arguments = unit_rows(rows, d, dtype), gradients_of(rows, d, dtype)
    flags = project, unit_norm
    actual = fused(device, *arguments, torch.tensor(0.5), *flags)
    oracle = plain(*arguments, 0.5, *flags, torch.float64, torch.float64)
    eager = plain(*arguments, 0.5, *flags, torch.float32, dtype)
    for result, exact, in_eager in zip(actual, oracle, eager, strict=True):
        assert_accurate(result, exact, in_eager)


@pytest.mark.parametrize("steps_done", [1, 9, 1000, 10**6, 2**31])
def test_bias_corrections_at_any_step(device, steps_done):
    gradient = randn(1, 40)
    # p starts at 0 and m, v are one gradient: after the step p holds the corrections alone
    p, m, v = fused(
        device, torch.zeros(1, 40), [gradient], torch.tensor(1.0), False, False,
        start=steps_done - 1, eps=0.0,
    )  # fmt: skip
    correction1, correction2 = (1 - beta**steps_done for beta in BETAS)

    def by_hand(g):
        m, v = (1 - BETAS[0]) * g, (1 - BETAS[1]) * g * g
        return -(LR / correction1) * m / (v.sqrt() / correction2**0.5)

    assert_accurate(p, by_hand(gradient.double()), by_hand(gradient))


@pytest.mark.parametrize("clip_dtype", [torch.float32, torch.float64])
def test_clip_is_read_on_the_device(device, clip_dtype):
    param, gradients = unit_rows(4, 33, torch.float32), gradients_of(4, 33, torch.float32)
    clip = torch.tensor(0.25, dtype=clip_dtype)
    clipped = fused(device, param, gradients, clip, True, True)
    scaled = fused(device, param, [g / 4 for g in gradients], torch.tensor(1.0), True, True)
    assert all(identical(a, b) for a, b in zip(clipped, scaled, strict=True))


@pytest.mark.parametrize("d", [9, 4099])
@pytest.mark.parametrize("eps", [EPS, 0.0])
def test_zero_rows_stay_and_zero_gradients_move_nothing(device, d, eps):
    param = unit_rows(3, d, torch.float32)
    param[2] = 0
    gradient = randn(3, d, seed=1)
    gradient[[1, 2]] = 0
    one = torch.tensor(1.0)
    p, m, v = fused(device, param, [gradient], one, True, True, eps=eps)
    assert not m[[1, 2]].any() and not v[[1, 2]].any()
    if eps:
        assert torch.equal(p[2], torch.zeros(d))
        torch.testing.assert_close(p[1], param[1])
    torch.testing.assert_close(p[0].norm(), one)


@pytest.mark.parametrize("d", [9, 4099])
def test_nan_stays_in_its_row(device, d):
    gradient = randn(3, d)
    gradient[1, 7] = float("nan")
    for result in fused(
        device, unit_rows(3, d, torch.float32), [gradient], torch.tensor(1.0), True, True
    ):
        assert result[1].isnan().all() and result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("project, unit_norm", FLAGS)
def test_strided_gradients(device, dtype, project, unit_norm):
    param, gradient = unit_rows(6, 24, dtype), randn(6, 24, dtype=dtype, seed=1)
    row = gradient[:1]
    for dense, strided in (
        (gradient, gradient.T.contiguous().T),
        (gradient, torch.stack([gradient, gradient + 1], -1)[..., 0]),
        (row.repeat(6, 1), row.expand(6, 24)),
    ):
        settings = torch.tensor(1.0), project, unit_norm
        expected = fused(device, param, [dense], *settings)
        # .to keeps the strides
        actual = fused(device, param, [strided], *settings)
        assert all(identical(a, b) for a, b in zip(actual, expected, strict=True))
        on_device = [t.to(device) for t in (dense, strided, param)]
        sums = [grad_sumsq_op(g, on_device[2], project, impl="triton") for g in on_device[:2]]
        assert torch.equal(*sums)


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("rows, d", [*SHAPES, (7, 1500)])
def test_grad_sumsq(device, dtype, rows, d, project):
    param, gradient = unit_rows(rows, d, dtype), gradients_of(rows, d, dtype)[0]
    p, g = param.to(device), gradient.to(device)
    with unchanged(p, g):
        actual = grad_sumsq_op(g, p, project, impl="triton")
    assert actual.dtype == torch.float64 and actual.shape == ()

    def squares(g, p):
        return (g - (g * p).sum(-1, keepdim=True) * p if project else g).square().sum()

    oracle = squares(gradient.double(), param.double())
    # an fp64 number that must be as good as one pass of eager fp32; the projection is a difference
    eager = squares(gradient.float(), param.float())
    scale = gradient.double().square().sum().item()
    assert_accurate(actual.cpu().float(), oracle, eager, scale=scale)


def test_grad_sumsq_of_numbers_whose_squares_leave_float32(device):
    for size in (1e25, 1e-25):
        gradient = torch.full((3, 5), size, device=device)
        actual = grad_sumsq_op(gradient, torch.zeros_like(gradient), True, impl="triton")
        exact = 15 * gradient[0, 0].double() ** 2
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("project, unit_norm", FLAGS)
def test_same_input_same_bits(device, dtype, project, unit_norm):
    param, gradients = unit_rows(3, 65, dtype), gradients_of(3, 65, dtype)

    def run():
        on_device = gradients[0].to(device), param.to(device)
        total = grad_sumsq_op(*on_device, project, impl="triton")
        return *fused(device, param, gradients, torch.tensor(0.7), project, unit_norm), total

    first = run()
    for _ in range(2):
        assert all(identical(a, b) for a, b in zip(run(), first, strict=True))


def test_mismatched_operands_raise(device):
    w = torch.ones(4, 3, device=device)
    good = {"param": w, "grad": w.clone(), "exp_avg": w.clone(), "exp_avg_sq": w.clone()}
    numbers = torch.tensor(LR, device=device), *BETAS, EPS, torch.tensor(1, device=device)
    for wrong in (
        {"param": torch.ones(3, 4, device=device).T},
        {"grad": w[:3]},
        {"grad": w.half()},
        {"exp_avg": w[:3]},
        {"exp_avg_sq": w.half()},
    ):
        operands = {**good, **wrong}.values()
        with unchanged(w), pytest.raises((RuntimeError, ValueError), match="adam_rows_: "):
            adam_rows_op(
                *operands, *numbers, torch.ones((), device=device), True, True, impl="triton"
            )
    with pytest.raises(ValueError, match=r"grad_sumsq: param must be T\[R,C\] .* got"):
        grad_sumsq_op(w[:3], w, True, impl="triton")
