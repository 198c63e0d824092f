# SPDX-License-Identifier: Apache-2.0
"""JumpReLU and the step against each library's formulas; the gather's sums."""

import pytest
import torch
from oracle import DTYPES, assert_accurate, identical, randint, randn, unchanged

from mikernels import jump, step_above
from mikernels.ops.sae.jump import gather_features, jump_floor

N, F, EPS = 67, 23, 0.75
NAN, INF = float("nan"), float("inf")


def operands(dtype=torch.float64):
    """h with entries exactly at the threshold and at both ends of the rectangle, and g."""
    h, g = randn(N, F, dtype=dtype), randn(N, F, dtype=dtype, seed=1)
    t = randn(F, dtype=dtype, seed=2).abs() + 0.125
    h[0], h[1], h[2], h[3] = t, t - EPS / 2, t + EPS / 2, 0.0
    return h.requires_grad_(), t.requires_grad_(), g


def rect(h, t, edges=False):
    far = (h - t).abs()
    return ((far <= EPS / 2) if edges else (far < EPS / 2)).to(h.dtype)


# name -> (arguments of jump, dh, dt before the sum over tokens), as the libraries' papers have them
JUMPS = {
    "SAELens, dictionary_learning, CLT-Forge, circuit-tracer": (
        {},
        lambda h, t, g: (h > t) * g,
        lambda h, t, g: -t / EPS * rect(h, t) * g,
    ),
    "SAELens ste_to_input": (
        {"input_gradient": "both"},
        lambda h, t, g: (h > t) * g + t / EPS * rect(h, t) * g,
        lambda h, t, g: -t / EPS * rect(h, t) * g,
    ),
    "Goreg": (
        {"input_gradient": "relu"},
        lambda h, t, g: (h >= 0) * g,
        lambda h, t, g: -t / EPS * rect(h, t) * g,
    ),
    "Tigges": (
        {"inclusive": True, "threshold_gradient": "score"},
        lambda h, t, g: (h >= t) * g,
        lambda h, t, g: -h / EPS * rect(h, t, edges=True) * g,
    ),
}
STEPS = {
    "SAELens": ({}, lambda h, t, g: 0 * g, lambda h, t, g: -1 / EPS * rect(h, t) * g),
    "SAELens ste_to_input": (
        {"to_input": True},
        lambda h, t, g: 1 / EPS * rect(h, t) * g,
        lambda h, t, g: -1 / EPS * rect(h, t) * g,
    ),
    "with edges": (
        {"inclusive": True},
        lambda h, t, g: 0 * g,
        lambda h, t, g: -1 / EPS * rect(h, t, edges=True) * g,
    ),
}


def gradients(y, leaves, g):
    found = torch.autograd.grad(y, leaves, g, allow_unused=True, create_graph=True)
    return [torch.zeros_like(t) if d is None else d for t, d in zip(leaves, found, strict=True)]


def above(h, t, inclusive=False, **_):
    return h >= t if inclusive else h > t


@pytest.mark.parametrize("name", JUMPS)
def test_jump_has_the_gradients_of(name):
    arguments, dh, dt = JUMPS[name]
    h, t, g = operands()
    with unchanged(h, t, g):
        f = jump(h, t, bandwidth=EPS, **arguments)
        found = gradients(f, (h, t), g)
    assert torch.equal(f, torch.where(above(h, t, **arguments), h, 0))
    torch.testing.assert_close(found[0], dh(h, t, g))
    torch.testing.assert_close(found[1], dt(h, t, g).sum(0))


@pytest.mark.parametrize("name", STEPS)
def test_step_has_the_gradients_of(name):
    arguments, dh, dt = STEPS[name]
    h, t, g = operands()
    with unchanged(h, t, g):
        s = step_above(h, t, bandwidth=EPS, **arguments)
        found = gradients(s, (h, t), g)
    assert torch.equal(s, above(h, t, **arguments).to(h.dtype))
    torch.testing.assert_close(found[0], dh(h, t, g))
    torch.testing.assert_close(found[1], dt(h, t, g).sum(0))


@pytest.mark.parametrize("to_input", [False, True])
def test_of_sae_lens_itself(to_input):
    jumprelu = pytest.importorskip("sae_lens.saes.jumprelu_sae")
    h, t, g = operands(torch.float32)
    theirs = jumprelu.JumpReLU.apply(h, t, EPS, to_input), jumprelu.Step.apply(h, t, EPS, to_input)
    ours = (
        jump(h, t, bandwidth=EPS, input_gradient="both" if to_input else "gated"),
        step_above(h, t, bandwidth=EPS, to_input=to_input),
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        mine, its = gradients(a, (h, t), g), gradients(b, (h, t), g)
        torch.testing.assert_close(mine[0], its[0], rtol=0, atol=0)
        torch.testing.assert_close(mine[1], its[1])


def test_the_missing_factor_of_a_log_threshold():
    """Bussmann: what should be multiplied by t is the gradient of log t as it is."""
    h, t, g = operands()
    log_t = t.detach().log().requires_grad_()
    free = log_t.detach().exp() + (log_t - log_t.detach())
    relu = h.detach().relu()
    (found,) = torch.autograd.grad(jump(relu, free, bandwidth=EPS), log_t, g)
    theta = log_t.detach().exp()
    torch.testing.assert_close(found, (-theta / EPS * rect(relu, theta) * g).sum(0))
    (found,) = torch.autograd.grad(step_above(relu, free, bandwidth=EPS), log_t, g)
    torch.testing.assert_close(found, (-1 / EPS * rect(relu, theta) * g).sum(0))


def test_through_the_exponential():
    h, t, g = operands()
    log_t = t.detach().log().requires_grad_()
    theta = log_t.exp()
    (found,) = torch.autograd.grad(jump(h, theta, bandwidth=EPS), log_t, g)
    torch.testing.assert_close(found, (-(theta**2) / EPS * rect(h, theta) * g).sum(0))


@pytest.mark.parametrize("name", JUMPS)
def test_second_derivatives_are_those_of_the_formulas(name):
    arguments, dh, dt = JUMPS[name]
    h, t, g = operands()
    g.requires_grad_()
    ours = gradients(jump(h, t, bandwidth=EPS, **arguments), (h, t), g)
    formulas = dh(h, t, g), dt(h, t, g).sum(0)
    for a, b in zip(ours, formulas, strict=True):
        weights = randn(*a.shape, dtype=torch.float64, seed=9)
        for x, y in zip(
            gradients(a, (h, t, g), weights), gradients(b, (h, t, g), weights), strict=True
        ):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", STEPS)
def test_second_derivatives_of_the_step(name):
    arguments, dh, dt = STEPS[name]
    h, t, g = operands()
    g.requires_grad_()
    ours = gradients(step_above(h, t, bandwidth=EPS, **arguments), (h, t), g)
    for a, b in zip(ours, (dh(h, t, g), dt(h, t, g).sum(0)), strict=True):
        if a.requires_grad:
            weights = randn(*a.shape, dtype=torch.float64, seed=9)
            for x, y in zip(
                gradients(a, (h, t, g), weights), gradients(b, (h, t, g), weights), strict=True
            ):
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize("bandwidth", [0, 0.0])
def test_without_a_bandwidth_the_threshold_has_no_gradient(bandwidth):
    h, t, g = operands()
    for f in (jump(h, t, bandwidth=bandwidth), jump(h, t, bandwidth=0, input_gradient="both")):
        dh, dt = torch.autograd.grad(f, (h, t), g, allow_unused=True)
        assert dt is None and torch.equal(dh, (h > t) * g)
    s = step_above(h, t, bandwidth=bandwidth, to_input=True)
    assert torch.autograd.grad(s, (h, t), g, allow_unused=True) == (None, None)


@pytest.mark.parametrize("shape", [(), (F,), (1, F), (N, 1), (N, F), (1, 1)])
def test_thresholds_broadcast(shape):
    h, _, g = operands()
    t = (randn(*shape, dtype=torch.float64, seed=2).abs() + 0.125).requires_grad_()
    for function in (jump, step_above):
        found = torch.autograd.grad(function(h, t, bandwidth=EPS), (t,), g)[0]
        wide = t.detach().expand(N, F).clone().requires_grad_()
        each = torch.autograd.grad(function(h, wide, bandwidth=EPS), (wide,), g)[0]
        torch.testing.assert_close(found, each.sum_to_size(t.shape))
    assert torch.equal(jump(h, 0.5, bandwidth=EPS), jump(h, h.new_tensor(0.5), bandwidth=EPS))


def test_what_is_not_finite_and_zeros():
    h = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0], requires_grad=True)
    for inclusive, at_zero in ((False, 0.0), (True, 0.0)):
        f = jump(h, 0.0, bandwidth=0.5, inclusive=inclusive)
        expected = torch.tensor([NAN, INF, 0, at_zero, -0.0 if inclusive else 0.0, 1, 0])
        assert identical(f, expected)
    assert step_above(h, 0.0, bandwidth=0.5).tolist() == [1, 1, 0, 0, 0, 1, 0]
    assert step_above(h, 0.0, bandwidth=0.5, inclusive=True).tolist() == [1, 1, 0, 1, 1, 1, 0]
    assert jump(h, INF, bandwidth=0.5).detach().nan_to_num(7).tolist() == [7, 0, 0, 0, 0, 0, 0]
    (dh,) = torch.autograd.grad(jump(h, 0.0, bandwidth=0.5), h, torch.full((7,), 3.0))
    assert dh.tolist() == [3, 3, 0, 0, 0, 3, 0]
    g = torch.full((7,), 3.0)
    (dh,) = torch.autograd.grad(jump(h, 2.0, bandwidth=0.5, input_gradient="relu"), h, g)
    assert dh.tolist() == [3, 3, 0, 3, 3, 3, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_16_bit_scores_with_wide_thresholds(dtype):
    """Compared and summed in the threshold's dtype."""
    h = randn(4001, 3, dtype=dtype).requires_grad_()
    t = (randn(3, seed=1).abs() + 0.1).double().requires_grad_()
    for wide in (t, t.detach().float().requires_grad_()):
        f = jump(h, wide, bandwidth=EPS)
        exact = wide.to(torch.promote_types(dtype, wide.dtype))
        assert f.dtype == dtype and torch.equal(f, torch.where(h.to(exact.dtype) > exact, h, 0))
        dh, dt = torch.autograd.grad(f.sum(), (h, wide))
        assert dh.dtype == dtype and dt.dtype == wide.dtype
        count = rect(h.to(exact.dtype), exact).sum(0)
        torch.testing.assert_close(dt, -count.to(wide.dtype) * wide / EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_below_the_floor_there_is_nothing(dtype):
    """Also where t and eps are such that every step of the distance is rounded."""
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(2000, generator=generator, dtype=dtype) * 10 ** (
        torch.rand(2000, generator=generator, dtype=dtype) * 8 - 6
    )
    for bandwidth in (0.0, 1e-7, 1e-3, 0.1, 1 / 3, 2.0):
        for inclusive in (False, True):
            for input_gradient in ("gated", "relu", "both"):
                forms = {"inclusive": inclusive, "input_gradient": input_gradient}
                floor = jump_floor(t, bandwidth=bandwidth, **forms)
                h, theta = (x.clone().requires_grad_() for x in (floor, t))
                f = jump(h, theta, bandwidth=bandwidth, **forms)
                s = step_above(h, theta, bandwidth=bandwidth, inclusive=inclusive, to_input=True)
                ones = torch.ones_like(f)
                for y in (f, s):
                    assert not y.any()
                    for d in torch.autograd.grad(y, (h, theta), ones, allow_unused=True):
                        assert d is None or not d.any()
                # and it is not far below
                expected = t - bandwidth / 2
                expected = expected.clamp_max(0) if input_gradient == "relu" else expected
                near = (expected - floor) <= 8 * torch.finfo(dtype).eps * (t + bandwidth + 1e-30)
                assert near.all()
    zero = jump_floor(torch.zeros(1, dtype=dtype), bandwidth=0, inclusive=True)
    assert zero < 0 and not (torch.nextafter(zero, torch.ones_like(zero)) < 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (5000,), (40, 25)])
def test_gather_sums_by_feature(impl, dtype, shape):
    parameter = randn(7, dtype=dtype).requires_grad_()
    indices = torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(1))
    g = randn(*shape, dtype=dtype, seed=2)
    out = gather_features(parameter, indices, impl=impl)
    assert torch.equal(out, parameter[indices])
    (found,) = torch.autograd.grad(out, parameter, g)
    exact, eager = (
        torch.zeros(7, dtype=t.dtype).index_add_(0, indices.reshape(-1), t.reshape(-1))
        for t in (g.double(), g)
    )
    assert found.dtype == dtype
    assert_accurate(found, exact, eager)


def test_gather_gradients(impl):
    parameter = randn(7, dtype=torch.float64).requires_grad_()
    indices = torch.randint(0, 6, (5, 4), generator=torch.Generator().manual_seed(1))

    def cubes(p):
        return gather_features(p, indices, impl=impl) ** 3

    assert torch.autograd.gradcheck(cubes, (parameter,))
    assert torch.autograd.gradgradcheck(cubes, (parameter,))


def test_in_a_graph():
    def function(h, t, indices):
        slots = gather_features(t, indices)
        return jump(h, slots, bandwidth=EPS), step_above(h, slots, bandwidth=EPS).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n in (5, 9):
        h, t = randn(n).requires_grad_(), randn(4, seed=1).abs().requires_grad_()
        indices = torch.arange(n) % 4
        results = []
        for run in (function, compiled):
            f, s = run(h, t, indices)
            results.append((f, s, *torch.autograd.grad(f.sum() + s, (h, t))))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


H = randint(3, 4)


@pytest.mark.parametrize(
    "h, t, forms, error, message",
    [
        (H.int(), 0.0, {}, TypeError, r"h must be floating, got torch.int32; pass h.float\(\)"),
        (H.tolist(), 0.0, {}, TypeError, "h must be a torch.Tensor, got list"),
        (H, True, {}, TypeError, "threshold must be a tensor or a number, got bool"),
        (H, torch.zeros(4).long(), {}, TypeError, "threshold must be floating, got torch.int64"),
        (H, torch.zeros(3), {}, ValueError, r"threshold must broadcast to h \[3, 4\], got \[3\]"),
        (H, torch.zeros(1, 3, 4), {}, ValueError, r"threshold must broadcast to h .*got \[1, 3, 4"),
        (H[0, 0], torch.zeros(3), {}, ValueError, r"threshold must broadcast to h \[\], got \[3\]"),
        (H, torch.zeros(4, device="meta"), {}, ValueError, "threshold must be on the device of h"),
        (H, 0.0, {"bandwidth": -1.0}, ValueError, "bandwidth must be finite .*, got -1.0"),
        (H, 0.0, {"bandwidth": NAN}, ValueError, "bandwidth must be finite .*, got nan"),
        (H, 0.0, {"bandwidth": INF}, ValueError, "bandwidth must be finite .*, got inf"),
        (H, 0.0, {"bandwidth": True}, TypeError, "bandwidth must be a number, got bool"),
        (H, 0.0, {"bandwidth": "1"}, TypeError, "bandwidth must be a number, got str"),
        (H, 0.0, {"input_gradient": "all"}, ValueError, "input_gradient must be one of .*'all'"),
        (H, 0.0, {"threshold_gradient": "h"}, ValueError, "threshold_gradient must be one .*'h'"),
    ],
)
def test_bad_arguments(h, t, forms, error, message):
    with pytest.raises(error, match=f"jump: {message}"):
        jump(h, t, **{"bandwidth": EPS, **forms})
    if forms.keys() <= {"bandwidth"}:
        with pytest.raises(error, match=f"step_above: {message}"):
            step_above(h, t, **{"bandwidth": EPS, **forms})


def test_bad_gathers():
    with pytest.raises(TypeError, match="gather_features: parameter must be floating, got"):
        gather_features(torch.arange(3), torch.arange(2))
    with pytest.raises(ValueError, match=r"gather_features: parameter must be \[F\], got \[3, 4\]"):
        gather_features(H, torch.arange(2))
    with pytest.raises(TypeError, match="gather_features: indices must be int64, got torch.int32"):
        gather_features(H[0], torch.arange(2).int())
    with pytest.raises(IndexError, match="out of range"):
        gather_features(H[0], torch.tensor([4]))
