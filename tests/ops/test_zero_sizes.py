# SPDX-License-Identifier: Apache-2.0
"""Every public operator with every size at 0: the value of the equation, or an error by name."""

import pytest
import torch
from public_samples import PUBLIC
from zero_cases import CASES, check

import mikernels as mk
from mikernels import SparseCodes, _crossover
from mikernels.ops.sae import decode


def test_every_public_function_has_samples():
    # these take no tensor
    functions = {n for n in mk.__all__ if callable(getattr(mk, n)) and n[0].islower()}
    functions -= {"accelerate", "log"}
    functions -= {"cpu_level", "force_level", "supported_levels"}
    assert {name.split()[0] for name in PUBLIC} == functions


@pytest.mark.parametrize("name, letter", CASES)
def test_a_size_of_zero(impl, name, letter):
    check(name, impl, **{letter: 0})


@pytest.mark.parametrize("name, letter", CASES)
def test_a_size_of_zero_by_default(name, letter):
    check(name, None, **{letter: 0})


@pytest.mark.parametrize("letter", "NKFd")
def test_a_size_of_zero_by_the_dense_product(monkeypatch, letter):
    monkeypatch.setattr(_crossover, "sparse_wins", lambda *sizes: False)
    check("sparse_decode", None, **{letter: 0})


@pytest.mark.parametrize("name", PUBLIC)
def test_all_sizes(impl, name):
    check(name, impl)


def test_decode_without_features_or_slots(impl):
    codes = SparseCodes(torch.ones(3, 0), torch.zeros(3, 0, dtype=torch.int64), 0)
    bias = torch.arange(4.0)
    y = mk.sparse_decode(codes, torch.ones(0, 4), bias, impl=impl)
    assert torch.equal(y, bias.expand(3, 4))
    assert torch.equal(decode._dense(*codes.flat(), None, torch.ones(0, 4), bias), y)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 3), (0,), (0, 0)])
def test_codes_of_nothing(shape):
    codes = SparseCodes(torch.ones(shape), torch.zeros(shape, dtype=torch.int64), 5)
    tokens = torch.Size(shape[:-1]).numel()
    assert torch.equal(codes.to_dense(), torch.zeros(*shape[:-1], 5))
    assert torch.equal(codes.to_csr().to_dense(), torch.zeros(tokens, 5))
    assert torch.equal(codes.fired(), torch.zeros(5, dtype=torch.int64))
    assert codes.l0().shape == shape[:-1] and not codes.l0().any()
    assert codes.by_feature()[0].tolist() == [0] * 6
    assert mk.sparse_decode(codes, torch.ones(5, 0)).shape == (*shape[:-1], 0)
    nothing = SparseCodes.from_dense(torch.zeros(4, 0))
    assert nothing.shape == (4, 0) and nothing.k == 0
