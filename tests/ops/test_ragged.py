# SPDX-License-Identifier: Apache-2.0
"""Codes with as many slots a token as it needs, in every operator and form."""

import pytest
import ragged_cases
import torch
from oracle import DTYPES, identical, num_threads, randn
from ragged_cases import CASES, ragged

import mikernels as mk
from mikernels import SparseCodes, _crossover
from mikernels.ops.sae import decode
from mikernels.ops.sae.decode import decode_error, decode_op


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_decode(impl, dtype, case):
    ragged_cases.check_decode(case, dtype, impl)


def test_decode_skips_what_is_not_in_use(impl):
    ragged_cases.check_decode_skips(torch.float32, impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_gather_dot(impl, dtype, case):
    ragged_cases.check_gather_dot(case, dtype, impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_feature_sum(impl, dtype, case):
    ragged_cases.check_feature_sum(case, dtype, impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_levels(impl, dtype, case):
    ragged_cases.check_levels(case, dtype, impl)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_sae_gradients(impl, dtype, case, accumulate):
    ragged_cases.check_sae_gradients(case, dtype, impl, accumulate=accumulate)


@pytest.mark.parametrize("case", CASES)
def test_update(impl, case):
    ragged_cases.check_update(case, impl)


@pytest.mark.parametrize("case", CASES)
def test_by_the_dense_product(monkeypatch, case):
    monkeypatch.setattr(_crossover, "sparse_wins", lambda *sizes: False)
    monkeypatch.setattr(decode, "DENSE_SCRATCH", 1000)  # a few tokens at a time
    r = ragged(case, torch.float32)
    w, bias, x = randn(r.f, r.d, seed=1).round(), randn(r.d).round(), randn(r.n, r.d).round()
    with torch.no_grad():
        y = mk.sparse_decode(r.codes(), w, bias)
        error, squares = decode_error(r.codes(), w, bias, x)
    assert torch.equal(y, r.codes().to_dense() @ w + bias)
    assert torch.equal(error, y - x)
    torch.testing.assert_close(squares, (y - x).square().sum(-1))


def test_ragged_decode_is_one_function_of_its_input(impl):
    r = ragged("many tokens", torch.float32, randn)
    given = r.values, r.indices, r.row_offsets, randn(r.f, r.d, seed=1), None
    first = decode_op(*given, impl=impl)
    for threads in (1, 2, 3):
        with num_threads(threads):
            assert identical(decode_op(*given, impl=impl), first)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forms(case, dtype):
    r = ragged(case, dtype)
    codes = r.codes()
    dense = torch.zeros(r.n, r.f, dtype=dtype)
    for token, index, value in zip(codes.tokens, r.indices, r.values, strict=True):
        dense[token, index] += value
    assert codes.is_ragged and codes.shape == (r.n, r.f) and len(codes) == r.n
    assert torch.equal(codes.to_dense(), dense)
    assert torch.equal(codes.l0(), (dense != 0).sum(-1))
    assert torch.equal(codes.fired(), (dense != 0).sum(0))
    csr = codes.to_csr()
    assert torch.equal(csr.to_dense(), dense) and csr.values().numel() == (dense != 0).sum()
    assert codes.tokens is codes.tokens and codes.tokens.dtype == torch.int64
    offsets, order = codes.by_feature()
    assert offsets.shape == (r.f + 1,) and torch.equal(
        order.sort().values, torch.arange(len(order))
    )
    moved = codes.to(torch.float64)
    assert moved.is_ragged and torch.equal(moved.to_dense(), dense.double())
    assert codes.to("meta").row_offsets.is_meta
    assert codes.detach().is_ragged
    padded = SparseCodes(r.padded, r.padded_indices, r.f)
    assert not padded.is_ragged and padded.tokens is None and padded.row_offsets is None


def test_indexing():
    r = ragged("uneven", torch.float32)
    codes, dense = r.codes(), r.codes().to_dense()
    mask = torch.arange(8) % 3 == 0
    for index in (0, 2, -1, slice(1, 7, 2), slice(0, 0), torch.tensor([6, 2, 6]), mask):
        part = codes[index]
        assert torch.equal(part.to_dense(), dense[index])
        assert part.is_ragged == (not isinstance(index, int))
    for index in (..., (0, 0), (slice(None), 3), torch.ones(8, 2, dtype=torch.bool), 8):
        with pytest.raises(IndexError):
            codes[index]


def test_ragged_codes_have_no_k():
    with pytest.raises(ValueError, match=r"SparseCodes: ragged codes have no k, .* use l0\(\)"):
        _ = ragged("uneven", torch.float32).codes().k


VALUES, INDICES = torch.ones(4), torch.tensor([0, 2, 1, 5])
ROWS = torch.tensor([0, 2, 2, 4])


@pytest.mark.parametrize(
    "values, indices, rows, error, message",
    [
        (VALUES, INDICES, ROWS.int(), TypeError, "row_offsets must be int64, got torch.int32"),
        (VALUES, INDICES, ROWS[None], ValueError, r"row_offsets must be \[N \+ 1\], got \[1, 4\]"),
        (VALUES, INDICES, ROWS[:0], ValueError, r"row_offsets must be \[N \+ 1\], got \[0\]"),
        (VALUES, INDICES, ROWS[:1], ValueError, "must have a token for the 4 slots, got none"),
        (VALUES, INDICES, ROWS + 1, ValueError, "must ascend from 0 to at most 4, got 1 to 5"),
        (VALUES, INDICES, ROWS * 2, ValueError, "must ascend from 0 to at most 4, got 0 to 8"),
        (VALUES, INDICES, torch.tensor([0, 3, 2, 4]), ValueError, "must ascend from 0"),
        (VALUES, INDICES, ROWS.tolist(), TypeError, "row_offsets must be a torch.Tensor, got list"),
        (VALUES, INDICES, torch.tensor([0, 4]), ValueError, r"must ascend within .*, got \[2, 1\]"),
        (VALUES, INDICES.clamp(max=1), ROWS, ValueError, r"ascend within .*, got \[1, 1\]"),
        (VALUES, INDICES + 1, ROWS, ValueError, r"indices must be in 0\.\.5, got 6"),
        (VALUES[None], INDICES[None], ROWS, ValueError, r"values must be \[S\] with row_offsets"),
        (VALUES, INDICES, ROWS.to("meta"), ValueError, "row_offsets must be on cpu, got meta"),
    ],
)
def test_codes_errors(values, indices, rows, error, message):
    with pytest.raises(error, match=f"SparseCodes: .*{message}"):
        SparseCodes.ragged(values, indices, rows, 6)
    SparseCodes.ragged(VALUES, INDICES, ROWS, 6)
    # slots that are not in use need not ascend
    SparseCodes.ragged(VALUES * 0, INDICES * 0, ROWS // 4, 6)


@pytest.mark.parametrize("bounds", [[0, 2**40, 3], [0, -5, 4], [-(2**62), 0, 4], [0, 3, 2**62]])
def test_row_offsets_changed_in_place_reach_no_foreign_memory(impl, bounds):
    codes = SparseCodes.ragged(VALUES, torch.arange(4), torch.tensor([0, 2, 4]), 6)
    before = codes.tokens
    codes.row_offsets.copy_(torch.tensor(bounds))
    uses = (
        lambda: codes.tokens,
        codes.to_dense,
        codes.to_csr,
        codes.l0,
        lambda: codes[1],
        lambda: codes[0:2],
        lambda: mk.sparse_decode(codes, torch.ones(6, 3), impl=impl),
    )
    for use in uses:
        with pytest.raises((ValueError, RuntimeError), match="offsets must"):
            use()
    codes.row_offsets.copy_(torch.tensor([0, 2, 4]))
    assert torch.equal(codes.tokens, before)


def test_ragged_codes_in_a_graph_are_checked():
    def function(values, indices, rows):
        return SparseCodes.ragged(values, indices, rows, 6).to_dense()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(VALUES, INDICES, ROWS), function(VALUES, INDICES, ROWS))
    for bad in ((INDICES + 1, ROWS), (INDICES, ROWS + 1), (INDICES.flip(0), ROWS)):
        with pytest.raises((ValueError, RuntimeError), match="SparseCodes: "):
            compiled(VALUES, *bad)
