# SPDX-License-Identifier: Apache-2.0
import sys

import pytest
import torch
from one_level import one_impl
from oracle import (
    DTYPES,
    assert_accurate,
    far_apart,
    identical,
    num_threads,
    randint,
    randn,
    unchanged,
)

from mikernels import positional_dot
from mikernels._dispatch import accumulate_dtype

NAN, INF = float("nan"), float("inf")


def plain(grads, vectors, positions, scale=None, dtype=torch.float64):
    products = torch.einsum("bid,id->ib", grads[:, positions].to(dtype), vectors.to(dtype))
    return products if scale is None else products * scale[:, None].to(dtype)


def check(impl, grads, vectors, positions, scale=None, exact=False):
    with unchanged(grads, vectors, positions, scale):
        dots = positional_dot(grads, vectors, positions, scale=scale, impl=impl)
    acc = accumulate_dtype(grads.dtype)
    assert dots.dtype == acc
    oracle = plain(grads, vectors, positions, scale)
    if exact:
        torch.testing.assert_close(dots, oracle.to(acc), rtol=0, atol=0, equal_nan=True)
        return dots
    sizes = plain(grads.abs(), vectors.abs(), positions, None if scale is None else scale.abs())
    size = sizes.max().item() if sizes.numel() else 0
    assert_accurate(dots, oracle, plain(grads, vectors, positions, scale, acc), scale=size)
    return dots


def places(n, limit, seed=0):
    return torch.randint(limit, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, limit, d, n",
    [
        (1, 1, 1, 1),
        (3, 5, 17, 40),
        (2, 9, 64, 100),
        (65, 3, 33, 20),
        (7, 130, 768, 50),
        (1, 2, 9, 97),
    ],
)
def test_positional_dot_accuracy(impl, dtype, batch, limit, d, n):
    grads, vectors = randn(batch, limit, d, dtype=dtype), randn(n, d, dtype=dtype, seed=1)
    positions, scale = places(n, limit), randn(n, dtype=dtype, seed=2)
    check(impl, grads, vectors, positions)
    check(impl, grads, vectors, positions, scale)
    check(impl, grads, vectors, positions.sort().values, scale)
    check(impl, grads, vectors, positions.fill_(limit - 1), scale)


@pytest.mark.parametrize(
    "batch, limit, d, n", [(0, 3, 4, 5), (2, 0, 4, 0), (2, 3, 0, 5), (2, 3, 4, 0)]
)
def test_positional_dot_empty(impl, batch, limit, d, n):
    operands = torch.ones(batch, limit, d), torch.ones(n, d), torch.zeros(n, dtype=torch.int64)
    check(impl, *operands, exact=True)
    check(impl, *operands, torch.ones(n), exact=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_positional_dot_layouts(impl, dtype):
    wide, scale = randint(6, 20, 80, dtype=dtype), randint(74, dtype=dtype, seed=1)
    positions = places(37, 7)
    grads = {
        "sliced": wide[::2, ::3, ::4],
        "offset": wide[1:4, 3:10, 7:27],
        "[P, B, d]": randint(7, 3, 20, dtype=dtype).transpose(0, 1),
        "[B, d, P]": wide[:3, :, :7].mT,
        "all reversed": randint(20, 7, 3, dtype=dtype).permute(2, 1, 0),
        "expanded batch": wide[:1, :7, :20].expand(3, 7, 20),
        "expanded positions": wide[:3, :1, :20].expand(3, 7, 20),
        "expanded width": wide[:3, :7, :1].expand(3, 7, 20),
    }
    vectors = {
        "dense": randint(37, 20, dtype=dtype, seed=3),
        "transposed": randint(20, 37, dtype=dtype, seed=3).T,
        "strided": wide[:3, :, 1:41:2].reshape(60, 20)[:37],
        "one for all": wide[0, :1, :20].expand(37, 20),
        "expanded width": wide[0, 0, :37, None].expand(37, 20),
    }
    for rows in vectors.values():
        for g in grads.values():
            check(impl, g, rows, positions, scale[::2], exact=True)
        check(impl, g, rows, places(74, 7)[::2], scale[:1].expand(37), exact=True)
        check(impl, g, rows, positions[:1].expand(37), exact=True)


def test_positional_dot_of_rows_far_apart(impl):
    far, positions = far_apart(randint(2, 33)), torch.tensor([1, 0, 1])
    for grads in (far[None], far.T[None], far[:, None].expand(2, 2, 33)):
        vectors = randint(3, grads.shape[2], seed=1)
        dots = positional_dot(grads, vectors, positions, impl=impl)
        assert torch.equal(dots.double(), plain(grads.contiguous(), vectors, positions))
    grads = randint(3, 2, 33, seed=2)
    dots = positional_dot(grads, far, positions[:2], impl=impl)
    assert torch.equal(dots.double(), plain(grads, far.contiguous(), positions[:2]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_positional_dot_adds_to_out(impl, dtype):
    acc = accumulate_dtype(dtype)
    pages = torch.full((40, 12), 7, dtype=acc)
    for out in (pages[::2, ::4], pages.T[::4, ::2].T):
        start, total = out.clone(), 0
        for seed in range(3):
            grads, vectors = randint(3, 5, 9, dtype=dtype, seed=seed), randint(20, 9, dtype=dtype)
            positions, scale = places(20, 5, seed), randint(20, dtype=dtype, seed=seed + 9)
            returned = positional_dot(grads, vectors, positions, scale=scale, out=out, impl=impl)
            assert returned is out
            total = total + plain(grads, vectors, positions, scale).to(acc)
        assert torch.equal(out, start + total)
    assert (pages[1::2] == 7).all() and (pages[:, 1::4] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_positional_dot_non_finite_stay_with_their_pairs(impl, dtype):
    grads, vectors = randint(3, 6, 9, dtype=dtype), randint(40, 9, dtype=dtype, seed=1)
    scale, positions = randint(40, dtype=dtype, seed=2), places(40, 5)
    # nothing is at position 5
    grads[:, 5], grads[1, 2, 3], vectors[7, 8], scale[9] = NAN, INF, -INF, NAN
    dots = check(impl, grads, vectors, positions, scale, exact=True)
    touched = torch.zeros(40, 3, dtype=torch.bool)
    touched[positions == 2, 1] = touched[7] = touched[9] = True
    assert dots[~touched].isfinite().all()
    assert not dots[[7, 9]].isfinite().any()


def test_positional_dot_in_chunks(impl, monkeypatch):
    # the function has the module's name
    monkeypatch.setattr(sys.modules[positional_dot.__module__], "CHUNK", 3 * 17 * 4 * 7)
    operands = randint(3, 5, 17), randint(40, 17, seed=1), places(40, 5), randint(40, seed=2)
    check(impl, *operands, exact=True)


def test_positional_dot_is_one_function_of_its_input(impl):
    operands = randn(5, 31, 97), randn(301, 97, seed=1), places(301, 31)
    scale = randn(301, seed=2)
    first = positional_dot(*operands, scale=scale, impl=impl)
    for threads in (1, 2, 2):
        with num_threads(threads):
            assert identical(positional_dot(*operands, scale=scale, impl=impl), first)


@one_impl
@pytest.mark.parametrize("position", [5, -1, -5, 2**40, -(2**40)])
def test_positional_dot_of_a_position_out_of_range_raises(impl, position):
    positions = torch.tensor([0, 4, position])
    with pytest.raises(ValueError, match=rf"positional_dot: positions .* 0\.\.4, got {position}"):
        positional_dot(torch.ones(2, 5, 3), torch.ones(3, 3), positions, impl=impl)


@one_impl
def test_positional_dot_is_no_part_of_a_graph(impl):
    leaves = [t.requires_grad_() for t in (randn(2, 3, 4), randn(5, 4), randn(5))]
    dots = positional_dot(*leaves[:2], places(5, 3), scale=leaves[2], impl=impl)
    assert not dots.requires_grad


def test_positional_dot_takes_meta_tensors():
    grads, vectors = torch.empty(2, 3, 4, device="meta"), torch.empty(5, 4, device="meta")
    dots = positional_dot(grads, vectors, torch.empty(5, device="meta", dtype=torch.int64))
    assert dots.is_meta and dots.shape == (5, 2)


G, V, P, OUT = torch.ones(2, 3, 4), torch.ones(5, 4), torch.zeros(5).long(), torch.zeros(5, 2)


@pytest.mark.parametrize(
    "grads, vectors, positions, options, error, message",
    [
        (
            G[0],
            V,
            P,
            {},
            ValueError,
            r"expected grads \[B, P, d\] and vectors \[n, d\], got \[3, 4",
        ),
        (G, V[0], P, {}, ValueError, r"vectors \[n, d\], got \[2, 3, 4\] and \[4\]"),
        (G, V[:, :3], P, {}, ValueError, r"vectors \[n, d\], got \[2, 3, 4\] and \[5, 3\]"),
        (G, V, P[:4], {}, ValueError, r"positions must have shape \[5\], got \[4\]"),
        (G, V, P.int(), {}, TypeError, "positions must be int64 on cpu, got torch.int32 on cpu"),
        (G, V, P.to("meta"), {}, TypeError, "positions must be int64 on cpu, got .* on meta"),
        (G, V, P.tolist(), {}, TypeError, "positions must be .*, got list"),
        (G, V, P, {"scale": V[0]}, ValueError, r"scale must have shape \[5\], got \[4\]"),
        (G, V, P, {"scale": P}, TypeError, "scale must be float32, .*, got torch.int64"),
        (G, V.half(), P, {}, TypeError, r"vectors must have the dtype of grads \(torch.float32\)"),
        (G, V, P, {"out": OUT.T}, ValueError, r"out must have shape \[5, 2\], got \[2, 5\]"),
        (G, V, P, {"out": OUT.half()}, TypeError, "out must be torch.float32 for torch.float32"),
        (G, V, P, {"out": OUT.clone().requires_grad_()}, ValueError, "out must not require grad"),
        (G, V, P, {"impl": "fast"}, ValueError, "impl must be one of .*, got 'fast'"),
    ],
)
def test_positional_dot_errors(grads, vectors, positions, options, error, message):
    with pytest.raises(error, match=message):
        positional_dot(grads, vectors, positions, **options)
