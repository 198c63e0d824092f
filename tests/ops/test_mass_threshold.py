# SPDX-License-Identifier: Apache-2.0
import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mass_cases import FRACTIONS, definition
from oracle import DTYPES, num_threads, randint, randn, unchanged

from mikernels import mass_threshold

NAN, INF = float("nan"), float("inf")


def check(impl, x, frac, absolute=False):
    with unchanged(x):
        threshold = mass_threshold(x, frac, abs=absolute, impl=impl)
    assert threshold.shape == () and threshold.dtype == x.dtype
    assert threshold.item() == definition(x, frac, absolute)
    return threshold


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (2,), (7, 33), (3, 40, 97), (9001,)])
def test_mass_threshold_is_exact(impl, dtype, shape):
    x = randn(*shape, dtype=dtype)
    for frac in FRACTIONS:
        check(impl, x, frac, absolute=True)
        check(impl, x.relu(), frac)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mass_threshold_ties(impl, dtype):
    x = randint(501, dtype=dtype)
    for values in (x, x.abs() + 1, torch.full((33,), 1.5, dtype=dtype), torch.arange(10).to(dtype)):
        for frac in FRACTIONS:
            check(impl, values, frac, absolute=True)
    # of ten ones, eight hold 0.8 of the mass, and so do all: there is one value to choose
    assert check(impl, torch.ones(10, dtype=dtype), 0.8) == 1
    # the entry at which the mass is reached exactly is kept
    assert check(impl, torch.tensor([4, 3, 2, 1], dtype=dtype), 0.7) == 3
    assert check(impl, torch.tensor([4, 3, 2, 1], dtype=dtype), 0.71) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_mass_threshold_keeps_the_fraction(impl, dtype):
    x = randn(40, 50, dtype=dtype).abs()
    for frac in FRACTIONS:
        kept = x >= mass_threshold(x, frac, impl=impl)
        mass = x.double().sum()
        assert x[kept].double().sum() >= frac * mass
        higher = x > mass_threshold(x, frac, impl=impl)
        assert x[higher].double().sum() < frac * mass or frac == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_mass_threshold_extremes(impl, dtype):
    zeros = torch.zeros(5, dtype=dtype)
    tiny = torch.finfo(dtype).tiny
    cases = [
        zeros,
        zeros[:1],
        -zeros,
        torch.tensor(3.0, dtype=dtype),
        torch.tensor([0, 0, 2, 0], dtype=dtype),
        # denormals, and the values around a power of two
        torch.arange(9).to(dtype) * (tiny / 8),
        torch.tensor([1, 1 - 2**-8, 1 + 2**-7, 2, 2 - 2**-7], dtype=dtype),
        torch.tensor([torch.finfo(dtype).max / 8, 1, tiny], dtype=dtype),
    ]
    for x in cases:
        for frac in (0.0, 0.3, 0.75, 1.0):
            check(impl, x, frac)
            check(impl, -x, frac, absolute=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mass_threshold_layouts(impl, dtype):
    wide = randint(12, 9, 40, dtype=dtype).abs()
    for x in (
        wide.mT,
        wide.permute(2, 0, 1),
        wide[::2, 1:, ::3],
        wide[:, :1].expand(12, 7, 40),
        wide[0, 0, :1].expand(40),
        wide[3, :, 5],
        wide[0, 0, 0],
        wide.reshape(2, 6, 3, 3, 4, 10),
    ):
        for frac in (0.0, 0.4, 0.9, 1.0):
            check(impl, x, frac)
            check(impl, -x, frac, absolute=True)


def test_mass_threshold_is_one_function_of_its_input(impl):
    x = randn(300, 501)
    first = [mass_threshold(x, frac, abs=True, impl=impl).item() for frac in FRACTIONS]
    for threads in (1, 2, 2):
        with num_threads(threads):
            again = [mass_threshold(x, frac, abs=True, impl=impl).item() for frac in FRACTIONS]
        assert again == first
    # nor does the order of the entries matter
    shuffled = x.reshape(-1)[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))]
    assert [mass_threshold(shuffled, f, abs=True, impl=impl).item() for f in FRACTIONS] == first


# sums of these are exact in fp64
POOL = st.sampled_from([0.0, -0.0, 1.0, 1.0, 0.5, 3.0, 0.25, 1.0 + 2.0**-20, 2.0**20, 2.0**-20])


@given(
    x=hnp.arrays("float32", hnp.array_shapes(max_dims=3, max_side=9), elements=POOL),
    frac=st.one_of(st.sampled_from(FRACTIONS), st.floats(0, 1)),
    data=st.data(),
)
def test_mass_threshold_property(impl, x, frac, data):
    x = torch.from_numpy(x)
    if x.dim() > 1 and data.draw(st.booleans(), "transposed"):
        x = x.mT
    negative = data.draw(st.booleans(), "negative")
    check(impl, -x if negative else x, frac, absolute=negative)


def test_mass_threshold_is_no_part_of_a_graph(impl):
    assert not mass_threshold(randn(5).requires_grad_(), 0.5, abs=True, impl=impl).requires_grad


X = torch.ones(3, 4)


@pytest.mark.parametrize(
    "x, frac, options, error, message",
    [
        (X, 1.5, {}, ValueError, r"frac must be in 0\.\.1, got 1\.5"),
        (X, -0.1, {}, ValueError, r"frac must be in 0\.\.1, got -0\.1"),
        (X, NAN, {}, ValueError, r"frac must be in 0\.\.1, got nan"),
        (X[:0], 0.5, {}, ValueError, r"x must have entries, got shape \[0, 4\]"),
        (-X, 0.5, {}, ValueError, "x must not be negative, got -1.0; pass abs=True"),
        (X * torch.tensor([1, 1, NAN, 1]), 0.5, {}, ValueError, "x must be finite, got nan to nan"),
        (X * torch.tensor([1, INF, 1, 1]), 0.5, {}, ValueError, "x must be finite, got 1.0 to inf"),
        (X * torch.tensor([1, NAN, 1, 1]), 0.5, {"abs": True}, ValueError, "x must be finite"),
        (X * torch.tensor([1, -INF, 1, 1]), 0.5, {"abs": True}, ValueError, "x must be finite"),
        (X.long(), 0.5, {}, TypeError, "x must be float32, .*, got torch.int64"),
        (X.tolist(), 0.5, {}, TypeError, "x must be a torch.Tensor, got list"),
        (X, 0.5, {"impl": "fast"}, ValueError, "impl must be one of .*, got 'fast'"),
    ],
)
def test_mass_threshold_errors(x, frac, options, error, message):
    with pytest.raises(error, match=message):
        mass_threshold(x, frac, **options)
