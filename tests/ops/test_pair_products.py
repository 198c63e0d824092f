# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
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

from mikernels import pairwise_products
from mikernels._dispatch import accumulate_dtype

NAN, INF = float("nan"), float("inf")
SAME = {"rtol": 0, "atol": 0, "equal_nan": True}


def plain(a, b=None, weight=None, dtype=torch.float64):
    """The products in one dtype, and the largest sum of their terms' absolute values."""
    a, b = (t.detach().to(dtype) for t in (a, a if b is None else b))
    a, b = (t if t.dim() == 3 else t[None] for t in (a, b))
    a = a if weight is None else a * weight.detach().to(dtype)
    terms = torch.einsum("bid,bjd->ij", a.abs(), b.abs())
    return torch.einsum("bid,bjd->ij", a, b), terms.max().item() if terms.numel() else 0


def check(impl, a, b=None, weight=None, exact=False):
    with unchanged(a, b, weight):
        products = pairwise_products(a, b, weight=weight, impl=impl)
    acc = accumulate_dtype(a.dtype)
    assert products.dtype == acc
    oracle, scale = plain(a, b, weight)
    if exact:
        torch.testing.assert_close(products, oracle.to(acc), **SAME)
    else:
        assert_accurate(products, oracle, plain(a, b, weight, acc)[0], scale=scale)
    return products


SHAPES = [  # B, n, m, D
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 97, 33, 17),
    (1, 31, 130, 65),
    (65, 7, 2, 3),
    (2, 200, 1, 768),
    (5, 9, 100, 1031),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, n, m, d", SHAPES)
def test_products_accuracy(impl, dtype, batch, n, m, d):
    a, b = randn(batch, n, d, dtype=dtype), randn(batch, m, d, dtype=dtype, seed=1)
    weight = randn(d, dtype=dtype, seed=2)
    check(impl, a, b)
    check(impl, a, b, weight)
    check(impl, a)
    check(impl, b, None, weight)
    check(impl, a[-1], b[-1], weight)


@pytest.mark.parametrize("batch, n, m, d", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_products_empty(impl, batch, n, m, d):
    a, b = torch.ones(batch, n, d), torch.ones(batch, m, d)
    check(impl, a, b, torch.ones(d), exact=True)
    check(impl, a, exact=True)
    check(impl, b, None, torch.ones(d), exact=True)
    check(impl, a[:1].sum(0), b[:1].sum(0), exact=True)
    out = torch.ones(n, m)
    pairwise_products(a, b, out=out, impl=impl)
    assert torch.equal(out, 1 + plain(a, b)[0].float())
    leaves = [t.clone().requires_grad_() for t in (a, b, torch.ones(d))]
    pairwise_products(*leaves[:2], weight=leaves[2], impl=impl).sum().backward()
    for leaf in leaves:
        assert leaf.grad.shape == leaf.shape and (leaf.grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_layouts(impl, dtype):
    wide = randint(6, 130, 80, dtype=dtype)
    b, weight = randint(3, 37, 20, dtype=dtype, seed=1), wide[0, 0, ::4]
    layouts = {
        "sliced": wide[::2, ::2, ::4],
        "offset": wide[1:4, 3:104, 7:27],
        "transposed": wide[:3, :20, :77].transpose(1, 2),
        "batches last": randint(101, 20, 3, dtype=dtype).movedim(2, 0),
        "all reversed": randint(20, 101, 3, dtype=dtype).permute(2, 1, 0),
        "expanded batch": wide[:1, :101, :20].expand(3, 101, 20),
        "expanded rows": wide[:3, :1, :20].expand(3, 99, 20),
        "expanded columns": wide[:3, :99, :1].expand(3, 99, 20),
        "one number": wide[:1, :1, :1].expand(3, 5, 20),
    }
    for a in layouts.values():
        check(impl, a, b, weight, exact=True)
        check(impl, b, a, exact=True)
        check(impl, a, weight=weight[:1].expand(20), exact=True)
        check(impl, a[1], b[1].T.contiguous().T, exact=True)
        # one operand on both sides is the symmetric product
        check(impl, a, a, weight, exact=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_rows_across_memory(impl, dtype):
    """Several chunks, panels and tiles of them, none of them whole."""
    a, b = (randn(2, 300, n, dtype=dtype, seed=n).mT for n in (77, 301))
    check(impl, a, b)
    check(impl, a.contiguous(), b)
    check(impl, b.contiguous(), a, randn(300, dtype=dtype))
    check(impl, b)
    first = pairwise_products(b, impl=impl)
    with num_threads(2):
        assert identical(pairwise_products(b, impl=impl), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_of_rows_far_apart(impl, dtype):
    near, b = randint(2, 33, dtype=dtype), randint(3, 33, dtype=dtype, seed=1)
    far = far_apart(near)
    for rows in (far, far.T):
        other = b if rows is far else b.T[:, :2]
        expected = plain(rows.contiguous(), other.contiguous())[0]
        assert torch.equal(pairwise_products(rows, other, impl=impl).double(), expected)
        assert torch.equal(pairwise_products(other, rows, impl=impl).double(), expected.T)
        assert torch.equal(pairwise_products(rows, impl=impl).double(), plain(rows.contiguous())[0])
    batches = pairwise_products(far[:, None], b[:2, None], impl=impl)
    assert torch.equal(batches.double(), plain(near[:, None], b[:2, None])[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_add_to_out(impl, dtype):
    acc = accumulate_dtype(dtype)
    stream = [randint(2, 40, 17, dtype=dtype, seed=i) for i in range(4)]
    pages = torch.full((3, 80, 26), 7, dtype=acc)
    for out, b in ((pages[1, ::2, ::2], 13), (pages[0, :40, :13].T.contiguous().T, 13)):
        start = out.clone()
        for x in stream:
            with unchanged(x):
                assert pairwise_products(x, x[:, :b], out=out, impl=impl) is out
        assert torch.equal(out, start + sum(plain(x, x[:, :b])[0] for x in stream).to(acc))
    assert (pages[1, 1::2] == 7).all() and (pages[1, :, 1::2] == 7).all()
    assert (pages[[0, 2]] == 7).all()
    square, weight = torch.ones(40, 40, dtype=acc), randint(17, dtype=dtype, seed=9)
    for x in stream:
        pairwise_products(x, weight=weight, out=square, impl=impl)
    assert torch.equal(square, 1 + sum(plain(x, None, weight)[0] for x in stream).to(acc))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_non_finite_stay_with_their_pairs(impl, dtype):
    a, b = randint(2, 70, 19, dtype=dtype), randint(2, 41, 19, dtype=dtype, seed=1)
    a[0, 3, 2], a[1, 65, 18], b[0, 7, 0], b[1, 40, 5], b[1, 40, 6] = NAN, INF, -INF, INF, -INF
    products = check(impl, a, b, exact=True)
    touched = torch.zeros(70, 41, dtype=torch.bool)
    touched[[3, 65]] = touched[:, [7, 40]] = True
    assert products[~touched].isfinite().all() and not products[touched].isfinite().any()
    check(impl, a, weight=randint(19, dtype=dtype, seed=2), exact=True)
    check(impl, b, b, exact=True)


def test_products_are_one_function_of_their_input(impl):
    a, b, weight = randn(3, 201, 97), randn(3, 150, 97, seed=1), randn(97, seed=2)
    first = pairwise_products(a, b, weight=weight, impl=impl), pairwise_products(a, impl=impl)
    for threads in (1, 2, 2):
        with num_threads(threads):
            assert identical(pairwise_products(a, b, weight=weight, impl=impl), first[0])
            assert identical(pairwise_products(a, impl=impl), first[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("two_sided", [True, False])
def test_products_gradients_equal_dense_autograd(impl, dtype, two_sided):
    shapes = [(3, 40, 33), (3, 17, 33), (33,)] if two_sided else [(3, 40, 33), (33,)]
    leaves = [randn(*s, dtype=dtype, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    ds = randn(40, 17 if two_sided else 40, dtype=accumulate_dtype(dtype), seed=9)

    def gradients(dtype):
        copies = [t.detach().to(dtype).requires_grad_() for t in leaves]
        a, b, weight = copies if two_sided else (copies[0], copies[0], copies[1])
        products = torch.einsum("bid,bjd->ij", a * weight, b)
        return torch.autograd.grad(products, copies, ds.to(dtype))

    with unchanged(*leaves, ds):
        b = leaves[1] if two_sided else None
        products = pairwise_products(leaves[0], b, weight=leaves[-1], impl=impl)
        actual = torch.autograd.grad(products, leaves, ds)
    oracle, eager = gradients(torch.float64), gradients(ds.dtype)
    for one, exact, in_eager in zip(actual, oracle, eager, strict=True):
        assert one.dtype == dtype
        assert_accurate(one, exact, in_eager)


def test_products_compile():
    def function(a, b, weight):
        return pairwise_products(a, b, weight=weight).square().sum() + pairwise_products(a).sum()

    leaves = [
        randn(*s, seed=i).requires_grad_() for i, s in enumerate([(2, 5, 6), (2, 4, 6), (6,)])
    ]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(*leaves), leaves)
    for one, other in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_products_take_meta_tensors():
    a = torch.empty(2, 5, 6, device="meta", dtype=torch.bfloat16)
    products = pairwise_products(a, a[:, :3])
    assert products.is_meta and products.shape == (5, 3) and products.dtype == torch.float32


A, OUT, GRAD = torch.ones(4, 3), torch.zeros(4, 4), torch.ones(4, 3, requires_grad=True)


@pytest.mark.parametrize(
    "a, options, error, message",
    [
        (A[0], {}, ValueError, r"a must be \[n, D\] or \[B, n, D\], got \[3\]"),
        (A, {"b": A[:, :2]}, ValueError, r"b must be \[m, D\] with .* \[4, 3\], got \[4, 2\]"),
        (A, {"b": A[None]}, ValueError, r"b must be \[m, D\] .*, got \[1, 4, 3\]"),
        (A[None], {"b": A[None, None][0].expand(2, 4, 3)}, ValueError, r"b must be \[B, m, D\]"),
        (A, {"weight": A[:, 0]}, ValueError, r"weight must have shape \[3\], got \[4\]"),
        (A, {"b": A.half()}, TypeError, r"b must have the dtype of a \(torch.float32\), got"),
        (A, {"weight": A[0].double()}, TypeError, "weight must have the dtype of a"),
        (A.long(), {}, TypeError, r"a must be float32, .*, got torch.int64; .*a\.float\(\)"),
        (A.tolist(), {}, TypeError, "a must be a torch.Tensor, got list"),
        (A, {"b": A.to("meta")}, ValueError, r"b must be on the device of a \(cpu\), got meta"),
        (A, {"out": OUT[:3]}, ValueError, r"out must have shape \[4, 4\], got \[3, 4\]"),
        (A, {"out": OUT.double()}, TypeError, "out must be torch.float32 .*, got torch.float64"),
        (A.half(), {"out": OUT.half()}, TypeError, "out must be torch.float32 for torch.float16"),
        (A, {"out": OUT.to("meta")}, ValueError, "out must be on cpu, got meta; move it"),
        (A, {"out": OUT.clone().requires_grad_()}, ValueError, "out must not require grad"),
        (GRAD, {"out": OUT}, ValueError, r"with out, nothing is recorded .* torch\.no_grad\(\)"),
        (A, {"b": GRAD, "out": OUT}, ValueError, "with out, nothing is recorded"),
        (A, {"weight": GRAD[0], "out": OUT}, ValueError, "with out, nothing is recorded"),
        (A, {"impl": "fast"}, ValueError, "impl must be one of .*, got 'fast'"),
    ],
)
def test_products_errors(a, options, error, message):
    with pytest.raises(error, match=message):
        pairwise_products(a, **options)
