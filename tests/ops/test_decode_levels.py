# SPDX-License-Identifier: Apache-2.0
import level_cases
import pytest
import ragged_cases
import torch
from one_level import one_impl, one_level
from oracle import DTYPES, identical, num_threads, randint, random_indices

from mikernels import SparseCodes
from mikernels.ops.sae.decode import decode_error
from mikernels.ops.sae.decode_levels import decode_levels, decode_levels_op
from mikernels.ops.sae.gradients import by_feature_op, sae_gradients_op


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, d, f, k, count", level_cases.SHAPES)
def test_accuracy(impl, dtype, n, d, f, k, count):
    level_cases.check(level_cases.operands(n, d, f, k, count, dtype), impl)
    level_cases.check(level_cases.operands(n, d, f, k, count, dtype, bias=False), impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ragged_cases.CASES)
def test_ragged(impl, dtype, case):
    level_cases.check_ragged(case, dtype, impl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(impl, dtype):
    level_cases.check_layouts(dtype, impl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inactive_slots_and_shares_of_zero_add_nothing(impl, dtype):
    level_cases.check_skips(dtype, impl)


def test_non_finite_numbers_stay_with_their_prefixes(impl):
    level_cases.check_non_finite(impl)


def test_one_level_is_decode_error(impl):
    codes = SparseCodes(randint(33, 7), random_indices(33, 7, 101), 101)
    w, bias, x = randint(101, 17, seed=1), randint(17, seed=2), randint(33, 17, seed=3)
    levels, mix = torch.zeros(101, dtype=torch.int64), torch.ones(1, 1)
    operands = codes.values, codes.indices, None, w, bias, x, levels, mix
    mixed, error, squares = decode_levels_op(*operands, impl=impl)
    for found, expected in zip((error, squares[0]), decode_error(codes, w, bias, x), strict=True):
        assert identical(found, expected)
    assert identical(mixed[0], error)


@pytest.mark.parametrize("mix", ["nested", "detached"])
def test_mixed_is_the_gradient_at_the_output_of_each_level(impl, mix):
    """d loss / d w_dec through autograd, of nested losses, is sae_gradients_ of mixed by level."""
    n, d, f, k, count = 21, 8, 30, 6, 3
    values, indices, w, bias, x, levels, _ = level_cases.operands(
        n, d, f, k, count, torch.float64, data=randint
    )
    weights = torch.tensor([1.0, 2.0, 4.0])
    w.requires_grad_()
    loss, total, level = 0, bias - x, levels[indices]
    for p in range(count):
        ring = torch.where(level == p, values, 0)
        here = (ring[..., None] * w[indices]).sum(1)
        # detached: the inner levels of a prefix take nothing from its loss, but the whole does
        inner = total.detach() if mix == "detached" and p < count - 1 else total
        total = total + here
        loss = loss + weights[p] * (inner + here).square().sum() / 2
    (expected,) = torch.autograd.grad(loss, w)
    shares = weights.expand(count, count).triu()
    if mix == "detached":
        shares = torch.diag(weights)
        shares[:, -1] = weights[-1]
    w = w.detach()
    mixed, _, _ = decode_levels_op(
        *(t.float() if t.is_floating_point() else t for t in (values, indices)),
        None, *(t.float() for t in (w, bias, x)), levels, shares, impl=impl,
    )  # fmt: skip
    slots = by_feature_op(indices.reshape(-1), f)
    out = torch.empty(f, d), torch.empty(f, d), torch.empty(f)
    rows = mixed, x.float(), w.float(), levels, None
    sae_gradients_op(values.float(), indices, *slots, None, *rows, *out, False, impl=impl)
    assert torch.equal(out[0], expected.float())


def test_the_function_takes_codes_and_any_mix(impl, monkeypatch):
    monkeypatch.setenv("MIKERNELS_IMPL", impl)
    operands = level_cases.operands(5, 6, 20, 3, 2, torch.float32, data=randint)
    values, indices, w, bias, x, levels, mix = operands
    w.requires_grad_(), values.requires_grad_()
    codes = SparseCodes(values, indices, 20)
    found = decode_levels(codes, w, bias, x, levels, mix.double())
    expected = level_cases.plain(torch.float64, *operands)
    for a, e in zip(found, expected, strict=True):
        assert not a.requires_grad and torch.equal(a, e.float())


def test_one_function_of_its_input(impl):
    operands = level_cases.arguments(level_cases.operands(301, 97, 500, 16, 4, torch.float32))
    first = decode_levels_op(*operands, impl=impl)
    for threads in (1, 2, 2):
        with num_threads(threads):
            assert all(map(identical, decode_levels_op(*operands, impl=impl), first))


@one_level
@pytest.mark.parametrize("bad", [3, -1, 2**40, -(2**62)])
def test_a_level_out_of_range_raises(level, bad):
    operands = level_cases.arguments(level_cases.operands(4, 5, 9, 2, 3, torch.float32))
    operands[6][4] = bad
    for chosen in ("reference", "cpp"):
        with pytest.raises((RuntimeError, ValueError), match=r"levels must be in 0\.\.2, got"):
            decode_levels_op(*operands, impl=chosen)


@one_impl
def test_compiles(impl):
    operands = level_cases.arguments(level_cases.operands(9, 17, 30, 4, 3, torch.float32))
    run = torch.compile(lambda *a: decode_levels_op(*a), fullgraph=True, backend="aot_eager")
    assert all(map(identical, run(*operands), decode_levels_op(*operands)))
