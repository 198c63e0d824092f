# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from edge_cases import allowed, compare, plain_scores
from oracle import DTYPES, far_apart, identical, num_threads, randint, randn, unchanged

from mikernels import edge_scores, edge_scores_heads
from mikernels._dispatch import accumulate_dtype

NAN, INF = float("nan"), float("inf")


def plain(dz, w_o, grad, prefix=None, weights=None, dtype=torch.float64):
    rows = torch.einsum("bphe,hed->bphd", dz.to(dtype), w_o.to(dtype))
    return plain_scores(rows, grad, prefix, weights, dtype)


def check(impl, dz, w_o, grad, prefix=None, weights=None, exact=False):
    with unchanged(dz, w_o, grad, prefix if torch.is_tensor(prefix) else None, weights):
        scores = edge_scores_heads(dz, w_o, grad, prefix=prefix, weights=weights, impl=impl)
    assert scores.dtype == accumulate_dtype(dz.dtype)
    compare(scores, plain, dz, w_o, grad, prefix, weights, exact=exact)
    return scores


def operands(batch, positions, heads, rank, readers, d, dtype=torch.float32, make=randn):
    """dz, w_o and grad."""
    shapes = (batch, positions, heads, rank), (heads, rank, d), (batch, positions, readers, d)
    return [make(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",  # B, P, H, e, R, d
    [
        (1, 1, 1, 1, 1, 1),
        (2, 3, 5, 7, 9, 11),
        (3, 1, 67, 3, 33, 17),
        (1, 70, 13, 16, 40, 64),
        (2, 5, 12, 33, 98, 130),
    ],
)
def test_edge_heads_accuracy(impl, dtype, shape):
    tensors = operands(*shape, dtype)
    batch, _, heads, _, readers, _ = shape
    before = torch.arange(readers) * (heads + 3) // readers
    check(impl, *tensors)
    check(impl, *tensors, prefix=heads // 2)
    check(impl, *tensors, before, randn(3, batch, dtype=accumulate_dtype(dtype), seed=5))


@pytest.mark.parametrize("zero", range(6))
def test_edge_heads_empty(impl, zero):
    shape = [2, 3, 4, 5, 6, 7]
    shape[zero] = 0
    tensors = operands(*shape, make=randint)
    weights = randint(3, shape[0])
    for prefix in (None, 2, torch.full((shape[4],), 2)):
        for given in (None, weights, weights[:0]):
            check(impl, *tensors, prefix, given, exact=True)


@pytest.mark.parametrize("prefix", [0, 4, 9, 12, [0, 3, 9], [12, -1, 4]])
def test_edge_heads_prefix(impl, prefix):
    tensors = operands(2, 3, 9, 4, 3, 8, make=randint)
    before = prefix if isinstance(prefix, int) else torch.tensor(prefix)
    for weights in (None, randint(2, 2), torch.ones(3, 2, dtype=torch.int64)):
        scores = check(impl, *tensors, before, weights, exact=True)
        assert not scores[..., ~allowed(9, before).expand(9, 3)].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_heads_equal_the_scores_of_their_outputs(impl, dtype):
    dz, w_o, grad = operands(3, 4, 10, 8, 7, 20, dtype, make=randint)
    rows = torch.einsum("bphe,hed->bphd", dz, w_o)  # integers: exact in every dtype
    prefix, weights = torch.arange(7) + 3, randint(2, 3)
    for options in ({}, {"prefix": 4}, {"prefix": prefix, "weights": weights}):
        expected = edge_scores(rows, grad, **options, impl=impl)
        assert torch.equal(edge_scores_heads(dz, w_o, grad, **options, impl=impl), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_heads_layouts(impl, dtype):
    wide, w_o = randint(4, 6, 40, 36, dtype=dtype), randint(10, 9, 16, dtype=dtype, seed=1)
    grad = wide[2:, 3:, 1:21:4, :16]
    inputs = {
        "a slice of a larger buffer": wide[:2, :3, 3:13, 5:14],
        "strided": wide[::2, ::2, ::4, ::4],
        "[B, P, H e]": wide.reshape(4, 6, 1440)[1:3, 1:4, :90].reshape(2, 3, 10, 9),
        "[B, H, P, e]": wide[:2, 3:6, :10, :9].transpose(1, 2).contiguous().transpose(1, 2),
        "all reversed": wide[:2, :3, :10, :9].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "expanded examples": wide[:1, :3, :10, :9].expand(2, 3, 10, 9),
        "expanded heads": wide[:2, :3, :1, :9].expand(2, 3, 10, 9),
        "expanded width": wide[:2, :3, :10, :1].expand(2, 3, 10, 9),
    }
    for dz in inputs.values():
        for w in (w_o, w_o.mT.contiguous().mT, w_o[:1].expand(10, 9, 16), wide[0, 0, :9, :16]):
            w = w if w.dim() == 3 else w.expand(10, 9, 16)
            check(impl, dz, w, grad, torch.tensor([0, 3, 10, 5, 20]), exact=True)
            check(impl, dz, w, grad.mT.contiguous().mT, None, randint(2, 2), exact=True)


def test_edge_heads_of_rows_far_apart(impl):
    far = far_apart(randint(2, 9))
    for dz in (far[None, None], far[:, None, None], far[None, :, None], far.T[None, None]):
        near = dz.contiguous()
        w_o, grad = randint(*near.shape[2:], 5), randint(*near.shape[:2], 3, 5, seed=1)
        expected = plain(near, w_o, grad)
        assert torch.equal(edge_scores_heads(dz, w_o, grad, impl=impl).double(), expected)
    dz, grad = randint(1, 2, 1, 2, seed=2), randint(1, 2, 3, 9, seed=3)
    scores = edge_scores_heads(dz, far[None], grad, impl=impl)
    assert torch.equal(scores.double(), plain(dz, far[None].contiguous(), grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_edge_heads_add_to_out(impl, dtype, weighted):
    acc = accumulate_dtype(dtype)
    weights = randint(2, 3) if weighted else None
    pages = torch.full((2, 13, 40) if weighted else (13, 40), 7, dtype=acc)
    out, total = pages[..., ::2, ::4], 7
    w_o = randint(7, 4, 9, dtype=dtype, seed=20)
    for seed in range(3):
        dz, grad = (randint(3, 2, *s, dtype=dtype, seed=seed + s[1]) for s in ((7, 4), (10, 9)))
        given = {"prefix": 5, "weights": weights, "out": out}
        assert edge_scores_heads(dz, w_o, grad, **given, impl=impl) is out
        total = total + plain(dz, w_o, grad, 5, weights).to(acc)
    assert torch.equal(out, total)
    assert (pages[..., 1::2, :] == 7).all() and (out[..., 5:, :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_heads_non_finite_stay_with_their_pairs(impl, dtype):
    dz, w_o, grad = operands(3, 2, 40, 4, 35, 9, dtype, make=randint)
    dz[1, 0, 20, 1], w_o[30, 2, 3], grad[0, 1, 33, 2] = NAN, NAN, NAN
    scores = check(impl, dz, w_o, grad, torch.arange(35) + 1, exact=True)
    expected = torch.zeros(40, 35, dtype=torch.bool)
    expected[20, 20:] = expected[30, 30:] = expected[:34, 33] = True
    assert torch.equal(scores.isnan(), expected)
    dz[0, 0, 5, 0], w_o[6, 0, 0] = INF, -INF
    check(impl, dz, w_o, grad, 9, exact=True)


def test_edge_heads_are_one_function_of_their_input(impl):
    tensors, weights = operands(3, 7, 24, 16, 110, 65), randn(4, 3, seed=7)
    first = [edge_scores_heads(*tensors, weights=w, impl=impl) for w in (None, weights)]
    for threads in (1, 2, 2):
        with num_threads(threads):
            for w, expected in zip((None, weights), first, strict=True):
                assert identical(edge_scores_heads(*tensors, weights=w, impl=impl), expected)


def test_edge_heads_are_no_part_of_a_graph(impl):
    leaves = [t.requires_grad_() for t in operands(1, 2, 3, 2, 4, 5)]
    assert not edge_scores_heads(*leaves, impl=impl).requires_grad


Z, W, G, OUT = torch.ones(2, 3, 5, 4), torch.ones(5, 4, 6), torch.ones(2, 3, 7, 6), torch.ones(5, 7)


@pytest.mark.parametrize(
    "dz, w_o, grad, options, error, message",
    [
        (Z[0], W, G, {}, ValueError, r"expected dz \[B, P, H, d_head\] and .*, got \[3, 5, 4\]"),
        (Z, W[0], G, {}, ValueError, r"and w_o \[H, d_head, d\], got \[2, 3, 5, 4\] and \[4, 6\]"),
        (Z, W[:4], G, {}, ValueError, r"w_o \[H, d_head, d\], got .* and \[4, 4, 6\]"),
        (Z, W[:, :3], G, {}, ValueError, r"w_o \[H, d_head, d\], got .* and \[5, 3, 6\]"),
        (Z, W[..., :5], G, {}, ValueError, "grad must have the d of .*, 5, got 6"),
        (Z, W, G[:1], {}, ValueError, r"of one B and P, got .* and \[1, 3, 7, 6\]"),
        (Z, W, G[0], {}, ValueError, r"grad \[B, P, R, d\] .* and \[3, 7, 6\]"),
        (Z, W.half(), G, {}, TypeError, r"w_o must have the dtype of dz \(torch.float32\), got"),
        (Z.int(), W, G, {}, TypeError, "dz must be float32, .*, got torch.int32"),
        (Z, W, G.to("meta"), {}, ValueError, r"grad must be on the device of dz \(cpu\), got meta"),
        (Z, W, G, {"prefix": torch.tensor([1])}, ValueError, r"prefix must have shape \[7\], got"),
        (Z, W, G, {"prefix": torch.ones(7)}, TypeError, "prefix must be .* int64 .* torch.float32"),
        (
            Z,
            W,
            G,
            {"weights": torch.ones(3, 3)},
            ValueError,
            r"weights must be \[Q, B\] with B = 2",
        ),
        (Z, W, G, {"out": OUT.T}, ValueError, r"out must have shape \[5, 7\], got \[7, 5\]"),
        (Z, W, G, {"out": OUT.half()}, TypeError, "out must be torch.float32 for torch.float32"),
        (Z, W, G, {"out": OUT.clone().requires_grad_()}, ValueError, "out must not require grad"),
        (Z, W, G, {"impl": "fast"}, ValueError, "impl must be one of .*, got 'fast'"),
    ],
)
def test_edge_heads_errors(dz, w_o, grad, options, error, message):
    with pytest.raises(error, match=message):
        edge_scores_heads(dz, w_o, grad, **options)
