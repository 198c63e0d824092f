# SPDX-License-Identifier: Apache-2.0
import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, best, identical, num_threads, randint, randn, unchanged
from row_topk_cases import INF, NAN, SPECIAL_ROWS

from mikernels import row_topk


def check(scores, k, sorted, impl):
    """row_topk is the definition, bit for bit, and leaves its input alone."""
    with unchanged(scores):
        values, indices = row_topk(scores, k, sorted=sorted, impl=impl)
    expected = best(scores.reshape(-1, scores.shape[-1]), k)
    expected = (expected if sorted else expected.sort(-1).values).reshape(indices.shape)
    assert values.shape == indices.shape == (*scores.shape[:-1], k)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, expected)
    assert identical(values, scores.gather(-1, expected))


@pytest.mark.parametrize("sorted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, n_features, k",
    [(0, 5, 2), (1, 1, 1), (1, 17, 17), (31, 67, 1), (33, 257, 32), (3, 4099, 64), (2, 70001, 9)],
)
def test_row_topk_is_exact(impl, dtype, n, n_features, k, sorted):
    check(randn(n, n_features, dtype=dtype), k, sorted, impl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_topk_ties(impl, dtype):
    scores = randint(33, 301, dtype=dtype)
    for k in (1, 2, 16, 63, 64, 65, 200, 301):
        check(scores, k, False, impl)
        check(scores, k, True, impl)


@pytest.mark.parametrize("case", SPECIAL_ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_topk_special_rows(impl, dtype, case):
    scores = randn(3, 1031, dtype=dtype)
    SPECIAL_ROWS[case](scores[1])
    for k in (1, 31, 1031):
        check(scores, k, True, impl)
        check(scores, k, False, impl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_topk_layouts(impl, dtype):
    base = randint(12, 40, dtype=dtype)
    layouts = {
        "transposed": base.T,
        "strided": base[::2, ::3],
        "offset": base[1:, 7:],
        "expanded rows": base[:1].expand(5, 40),
        "expanded columns": base[:, :1].expand(12, 9),
        "one row": base[3],
        "3-D": base.reshape(3, 4, 40).transpose(0, 1),
        "4-D": base.reshape(2, 3, 2, 40),
    }
    for scores in layouts.values():
        check(scores, min(5, scores.shape[-1]), False, impl)
        check(scores, scores.shape[-1], True, impl)


def test_row_topk_is_one_function_of_its_input(impl):
    scores = randint(67, 3001)
    first = row_topk(scores, 33, impl=impl)
    for threads in (1, 2, 2):
        with num_threads(threads):
            again = row_topk(scores, 33, impl=impl)
        assert identical(again[0], first[0])
        assert identical(again[1], first[1])


@given(
    scores=hnp.arrays(
        "float32",
        hnp.array_shapes(min_dims=2, max_dims=3, min_side=0, max_side=40),
        elements=st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0, 2.0, -1.0, 1e30, 1e-40]),
    ),
    data=st.data(),
)
def test_row_topk_property(impl, scores, data):
    scores = torch.from_numpy(scores)
    if data.draw(st.booleans(), "transposed"):
        scores = scores.transpose(-1, -2)
    if scores.shape[-1] == 0:
        with pytest.raises(ValueError, match="k must be in 1..0"):
            row_topk(scores, 1, impl=impl)
        return
    k = data.draw(st.integers(1, scores.shape[-1]), "k")
    check(scores, k, data.draw(st.booleans(), "sorted"), impl)


def test_row_topk_best_of_the_device():
    check(randint(9, 500), 40, False, None)


@pytest.mark.parametrize(
    "scores, k, error, message",
    [
        (torch.zeros(3, 4), 0, ValueError, r"k must be in 1\.\.4 \(columns of scores\), got 0"),
        (torch.zeros(3, 4), 5, ValueError, r"k must be in 1\.\.4 \(columns of scores\), got 5"),
        (torch.zeros(3, 4), -1, ValueError, r"k must be in 1\.\.4 .* got -1"),
        (torch.zeros(3, 4), 2.0, TypeError, "k must be an int, got float"),
        (torch.zeros(3, 4), True, TypeError, "k must be an int, got bool"),
        (torch.zeros(3, 4, dtype=torch.int64), 1, TypeError, r"float32.*got torch.int64; .*float"),
        (torch.zeros(3, 4, dtype=torch.complex64), 1, TypeError, "got torch.complex64"),
        (torch.zeros(()), 1, ValueError, "at least one dimension, got a scalar"),
        ([[1.0, 2.0]], 1, TypeError, "scores must be a torch.Tensor, got list"),
    ],
)
def test_row_topk_errors(scores, k, error, message):
    with pytest.raises(error, match=f"^row_topk: .*{message}"):
        row_topk(scores, k)
