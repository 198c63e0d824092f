# SPDX-License-Identifier: Apache-2.0
import sys

import pytest
import torch
from oracle import DTYPES, assert_accurate, identical, num_threads, randint, randn, unchanged

from mikernels import second_moment
from mikernels._dispatch import accumulate_dtype

NAN, INF = float("nan"), float("inf")


def plain(x, mask=None, dtype=torch.float64):
    rows = x.to(dtype).reshape(x.shape[:-1].numel(), x.shape[-1])
    rows = rows if mask is None else rows[mask.reshape(-1)]
    return rows.T @ rows


def check(impl, x, mask=None, exact=False):
    with unchanged(x, mask):
        moment = second_moment(x, mask=mask, impl=impl)
    acc = accumulate_dtype(x.dtype)
    assert moment.dtype == acc
    oracle = plain(x, mask)
    if exact:
        torch.testing.assert_close(moment, oracle.to(acc), rtol=0, atol=0, equal_nan=True)
    else:
        assert_accurate(moment, oracle, plain(x, mask, acc))
    if impl == "cpp":  # one half is the mirror image of the other
        assert identical(moment, moment.T)
    return moment


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (513, 5), (3, 40, 97), (2, 3, 5, 130), (17,)])
def test_second_moment_accuracy(impl, dtype, shape):
    x = randn(*shape, dtype=dtype)
    check(impl, x)
    check(impl, x, randint(*shape[:-1]) > 0)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3), (0, 0)])
def test_second_moment_empty(impl, shape):
    x = torch.ones(shape)
    check(impl, x, exact=True)
    check(impl, x, torch.ones(shape[:-1], dtype=torch.bool), exact=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_moment_layouts(impl, dtype):
    wide = randint(40, 120, dtype=dtype)
    for x in (
        wide.T,
        wide[::2, ::3],
        wide[3:, 7:60],
        wide[:1].expand(9, 120),
        wide[:, :1].expand(40, 50),
        wide.reshape(4, 10, 120).transpose(0, 1),
        wide.reshape(4, 10, 120).movedim(2, 0),
    ):
        check(impl, x, exact=True)
        check(impl, x, (randint(*x.shape[:-1], 2, seed=1) > 0)[..., 1], exact=True)


def test_second_moment_of_tokens_left_out_is_nothing(impl):
    x = randint(50, 7)
    mask = torch.arange(50) % 3 > 0
    x[~mask] = NAN
    assert check(impl, x, mask, exact=True).isfinite().all()
    assert torch.equal(second_moment(x, mask=mask & False, impl=impl), torch.zeros(7, 7))
    x[1, 2], x[2, 5] = INF, NAN
    moment = check(impl, x, mask, exact=True)
    kept = [0, 1, 3, 4, 6]
    assert moment[kept][:, kept].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_moment_adds_to_out(impl, dtype):
    acc = accumulate_dtype(dtype)
    stream = [randint(30, 11, dtype=dtype, seed=i) for i in range(5)]
    for out_dtype in (acc, torch.float64):
        out = torch.ones(11, 22, dtype=out_dtype)[:, ::2]
        for x in stream:
            assert second_moment(x, out=out, impl=impl) is out
        assert torch.equal(out, 1 + sum(plain(x) for x in stream).to(out_dtype))


def test_second_moment_in_fp64_keeps_what_fp32_drops(impl):
    out = torch.full((2, 2), 2.0**30, dtype=torch.float64)
    for _ in range(3):
        second_moment(torch.ones(1, 2), out=out, impl=impl)
    assert torch.equal(out, torch.full((2, 2), 2.0**30 + 3, dtype=torch.float64))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64])
def test_second_moment_piece_by_piece(impl, monkeypatch, out_dtype):
    x = randint(100, 6)
    # the function has the module's name
    monkeypatch.setattr(sys.modules[second_moment.__module__], "PIECE", 7 * 6 * 4)
    out = torch.zeros(6, 6, dtype=out_dtype)
    assert torch.equal(second_moment(x, out=out, impl=impl).double(), plain(x))
    check(impl, x, x[:, 0] > 0, exact=True)


def test_second_moment_is_one_function_of_its_input(impl):
    x = randn(501, 97)
    first = second_moment(x, impl=impl)
    for threads in (1, 2, 2):
        with num_threads(threads):
            assert identical(second_moment(x, impl=impl), first)


def test_second_moment_is_no_part_of_a_graph(impl):
    assert not second_moment(randn(3, 4).requires_grad_(), impl=impl).requires_grad


X, OUT = torch.ones(4, 3), torch.zeros(3, 3)


@pytest.mark.parametrize(
    "x, options, error, message",
    [
        (X[0, 0], {}, ValueError, r"x must be \[\.\.\., d\], got a scalar"),
        (X.long(), {}, TypeError, "x must be float32, .*, got torch.int64"),
        (X, {"mask": X[0] > 0}, ValueError, r"mask must have shape \[4\], got \[3\]"),
        (X, {"mask": X[:, 0]}, TypeError, "mask must be bool, got torch.float32; pass mask != 0"),
        (X, {"out": OUT[:2]}, ValueError, r"out must have shape \[3, 3\], got \[2, 3\]"),
        (X, {"out": OUT.half()}, TypeError, "out must be torch.float32 or torch.float64 for"),
        (X.double(), {"out": OUT}, TypeError, "out must be torch.float64 .*, got torch.float32"),
        (X, {"out": OUT.clone().requires_grad_()}, ValueError, "out must not require grad"),
        (X, {"out": OUT.to("meta")}, ValueError, "out must be on cpu, got meta"),
        (X, {"impl": "fast"}, ValueError, "impl must be one of .*, got 'fast'"),
    ],
)
def test_second_moment_errors(x, options, error, message):
    with pytest.raises(error, match=message):
        second_moment(x, **options)
