# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from oracle import best, far_apart, identical, randint, randn, unchanged
from row_topk_cases import SPECIAL_ROWS

from mikernels import _triton, row_topk
from mikernels._dispatch import OPS

IMPLS = ["triton"] if _triton.interpreting() else ["triton", "cuda"]


@pytest.fixture(params=IMPLS)
def impl(request):
    if OPS["row_topk"].backends()[request.param] != "ready":
        pytest.skip(OPS["row_topk"].backends()[request.param])
    return request.param


def check(scores, k, device, impl, sorted=False):
    """row_topk is the definition, bit for bit."""
    placed = scores.to(device)
    with unchanged(placed):
        values, indices = row_topk(placed, k, sorted=sorted, impl=impl)
    assert values.shape == indices.shape == (*scores.shape[:-1], k)
    expected = best(scores, k)
    expected = expected if sorted else expected.sort(-1).values
    assert torch.equal(indices.cpu(), expected)
    assert identical(values.cpu(), scores.gather(-1, expected))


# rows that are held whole, in groups (above 8192), and those that only passes can select from
SHAPES = {
    "empty": (0, 5, 2),
    "one": (1, 1, 1),
    "all": (2, 17, 17),
    "odd": (3, 257, 32),
    "whole": (2, 8192, 100),
    "grouped": (3, 8193, 5),
    "grouped, ragged last group": (2, 20011, 33),
    "grouped, k = 1": (2, 10000, 1),
    "passes, large k": (1, 9001, 3000),
    "passes, k = F": (1, 8200, 8200),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_row_topk_is_exact(device, impl, dtype, shape):
    n, f, k = SHAPES[shape]
    check(randn(n, f, dtype=dtype), k, device, impl)
    check(randint(n, f, dtype=dtype), k, device, impl, sorted=True)


@pytest.mark.parametrize("f, k", [(300, 31), (9000, 20), (8300, 2100)])
def test_row_topk_special_rows(device, impl, dtype, f, k):
    scores = randn(len(SPECIAL_ROWS), f, dtype=dtype)
    for row, change in zip(scores, SPECIAL_ROWS.values(), strict=True):
        change(row)
    check(scores, k, device, impl, sorted=k < 100)


@pytest.mark.parametrize("f", [40, 8400])
def test_row_topk_layouts(device, impl, dtype, f):
    base = randint(6, f, dtype=dtype).to(device)
    layouts = {
        "transposed": base.T[:5].contiguous().T[:, :5],
        "strided columns": base[::2, ::3],
        "offset": base[1:, 7:],
        "expanded rows": base[:1].expand(3, f),
        "expanded columns": base[:2, :1].expand(2, f),
        "3-D": base.reshape(3, 2, f).transpose(0, 1),
    }
    for scores in layouts.values():
        values, indices = row_topk(scores, 3, impl=impl)
        expected = best(scores.cpu(), 3).sort(-1).values
        assert torch.equal(indices.cpu(), expected)
        assert identical(values.cpu(), scores.cpu().gather(-1, expected))


@pytest.mark.parametrize("f, k", [(40, 40), (700, 17), (20_000, 33)])
def test_row_topk_into_part_of_larger_outputs(device, dtype, f, k):
    """As encode selects, panel by panel; by CUDA C++ where it was built."""
    from mikernels.kernels.select.row_topk import select_into

    scores, base = randint(3, f, dtype=dtype), 131_072
    values = torch.full((3, k + 9), 77.0, dtype=dtype, device=device)
    for kind in (torch.int32, torch.int64):
        indices = torch.full((3, k + 9), -77, dtype=kind, device=device)
        select_into(scores.to(device), k, values[:, 4 : 4 + k], indices[:, 4 : 4 + k], base)
        expected = best(scores, k).sort(-1).values
        assert torch.equal(indices[:, 4 : 4 + k].cpu(), (expected + base).to(kind))
        assert identical(values[:, 4 : 4 + k].cpu(), scores.gather(-1, expected))
        for t, kept in ((values, 77), (indices, -77)):
            assert (t[:, :4] == kept).all() and (t[:, 4 + k :] == kept).all()


@pytest.mark.parametrize("f, k", [(50, 7), (8600, 7), (8600, 3000)])
def test_row_topk_beyond_2_to_the_31_elements(device, impl, f, k):
    near = randn(2, f, dtype=torch.float16)
    values, indices = row_topk(far_apart(near.to(device)), k, impl=impl)
    expected = best(near, k).sort(-1).values
    assert torch.equal(indices.cpu(), expected)
    assert identical(values.cpu(), near.gather(-1, expected))


def test_row_topk_is_deterministic(device, impl):
    scores = randint(3 if _triton.interpreting() else 64, 9001).to(device)
    first = row_topk(scores, 33, impl=impl)
    for _ in range(2 if _triton.interpreting() else 20):
        again = row_topk(scores, 33, impl=impl)
        assert identical(first[0], again[0]) and torch.equal(first[1], again[1])


def test_row_topk_compiles_once_for_many_k(device):
    if _triton.interpreting():
        pytest.skip("nothing is compiled in the interpreter")
    from mikernels.kernels.select.row_topk import _row_topk_grouped_kernel

    caches = _row_topk_grouped_kernel.jit.device_caches

    scores = randn(4, 20000).to(device)
    row_topk(scores, 33, impl="triton")
    before = sum(len(cache[0]) for cache in caches.values())
    for k in (34, 48, 63):
        row_topk(scores, k, impl="triton")
    assert sum(len(cache[0]) for cache in caches.values()) == before
