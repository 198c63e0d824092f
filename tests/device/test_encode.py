# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from encode_cases import ADVERSARIAL, INF, NAN, NON_FINITE, check, scaled
from oracle import far_apart, identical, randn, unchanged

from mikernels import _triton, topk_encode
from mikernels.kernels.sae import (
    encode,
    encode_exact,
    encode_groups,
    encode_kept,
    encode_plain,
    encode_screen,
)

INTERPRETED = _triton.interpreting()


@pytest.fixture(autouse=True)
def large_programs(monkeypatch):
    """The interpreter pays by the program, not by the element."""
    if INTERPRETED:
        monkeypatch.setattr(encode, "PACK", encode_screen.PACK | {"ROWS": 128})
        monkeypatch.setattr(encode, "RESCORE", encode_screen.RESCORE | {"SLOTS": 64})
        monkeypatch.setattr(encode, "EXACT", encode_exact.EXACT | {"FEATURES": 256})


@pytest.fixture
def certain(monkeypatch):
    """Collects, for every token, whether the screen decided its selection."""
    seen: list[int] = []

    def spy(*arguments):
        settle(*arguments)
        tokens, buffers = arguments[0].shape[0], arguments[10]
        seen.extend(buffers.certain[:tokens].tolist())

    settle = encode.settle
    monkeypatch.setattr(encode, "settle", spy)
    return seen


def on(device, tensors: dict) -> dict:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}


@pytest.mark.parametrize(
    "n, d, f, k",
    [
        (0, 8, 20, 3),
        (1, 1, 1, 1),
        (1, 7, 501, 5),
        (5, 96, 700, 9),
        (3, 33, 64, 64),
        (2, 20, 99, 70),
    ],
)
def test_encode_is_exact(device, dtype, n, d, f, k):
    x, w = randn(n, d, dtype=dtype).to(device), randn(f, d, dtype=dtype, seed=1).to(device)
    b_enc, b_dec = (randn(size, dtype=dtype, seed=2).to(device) for size in (f, d))
    # scores of 16-bit inputs carry a rounding, unless they are ranked with a scale
    exact = dtype == torch.float32
    check("triton", x, w, k=k, exact=exact)
    check("triton", x, w, b_enc, k=k, b_dec=b_dec, exact=exact)
    check("triton", x, w, b_enc, k=k, b_dec=b_dec, scale=b_enc.abs(), relu=False, exact=True)


def test_the_screen_decides_ordinary_tokens(device, dtype, certain):
    """Else the exact pass would hide whatever is wrong with the screen, and all speed with it."""
    case = scaled(b_enc=randn(501, seed=2), b_dec=randn(96, seed=3), scale=1 + randn(501).abs())
    case = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    case["x"] = case["x"][:6]
    check("triton", exact=True, **on(device, case))
    assert certain == [1] * 6


def test_rounded_bounds_hold(device):
    """Every bound is at least the exact score, and above it by what the proof allows."""
    n, d, f = 4, 70, 256
    x, w, bias = randn(n, d), randn(f, d, seed=1), 30 * randn(f, seed=2)
    scale, shift = randn(f, seed=3).exp(), randn(d, seed=4)
    x, w, bias, scale, shift = (t.to(device) for t in (x, w, bias, scale, shift))
    width, extra = encode.packed_width(d), encode.EXTRA.value
    packed = [torch.empty(m, width, dtype=torch.bfloat16, device=device) for m in (n, f)]
    norms = [torch.empty(m, device=device) for m in (n, f)]
    encode.pack(x, shift, None, None, packed[0], packed[0][:, width - extra :], norms[0], True)
    encode.pack(w, None, scale, bias, packed[1], packed[1][:, width - extra :], norms[1], False)
    bounds = packed[0].double() @ packed[1].double().T
    centred = (x - shift).double()
    exact = (centred @ w.double().T + bias.double()) * scale.double()
    slack = bounds - exact
    size = centred.norm(dim=1)[:, None] * (w.double() * scale.double()[:, None]).norm(dim=1)
    assert (slack > 0).all()
    assert (slack < 0.02 * size + 2e-3 * (bias * scale).double().abs()).all()


QUICK = (
    "near ties 1e-05",
    "ties by rounding",
    "duplicate features",
    "uneven features",
    "ascending with non-finite",
    "zero rows",
    "huge x",
    "denormal w",
    "large biases",
    "spread scale",
)


@pytest.mark.parametrize("name", QUICK if INTERPRETED else ADVERSARIAL)
def test_encode_adversarial(device, name):
    case = ADVERSARIAL[name]()
    case.pop("fp32_sums_overflow", None)
    if INTERPRETED:
        case["x"] = case["x"][::11]
    check("triton", exact=True, **on(device, case))


@pytest.mark.parametrize("name", [*NON_FINITE][::3] if INTERPRETED else NON_FINITE)
def test_encode_non_finite(device, name):
    x, w, b_enc, b_dec = randn(9, 12), randn(301, 12, seed=1), randn(301, seed=2), randn(12, seed=3)
    NON_FINITE[name](x, w, b_enc, b_dec)
    x, w, b_enc, b_dec = (t.to(device) for t in (x, w, b_enc, b_dec))
    check("triton", x, w, b_enc, k=5, b_dec=b_dec, exact=True)


def test_encode_layouts(device):
    x, w = randn(5, 40).to(device), randn(40, 300, seed=1).to(device)
    check("triton", x, w.T, k=4, exact=True)
    check("triton", x[:, ::2], w.T[:, 1::2], k=4, exact=True)
    check("triton", x[:1].expand(3, 40), w.T[::3], k=4, exact=True)


@pytest.mark.parametrize("scaled", [False, True])
def test_encode_beyond_2_to_the_31_elements(device, scaled):
    x, w = randn(2, 20).half().to(device), randn(2, 20, seed=1).half().to(device)
    scale = torch.ones(2, dtype=torch.float16, device=device) if scaled else None
    near = topk_encode(x, w, k=1, scale=scale, impl="triton")
    far = topk_encode(far_apart(x), far_apart(w), k=1, scale=scale, impl="triton")
    assert identical(near.values, far.values) and torch.equal(near.indices, far.indices)


def test_uncertain_tokens_have_later_calls_keep_more(device, monkeypatch):
    """Of weights that are nearly one, the screen can leave out none; the codes stay the same."""
    monkeypatch.setattr(encode_kept, "_KEPT", {})
    x, w = randn(16, 64).to(device), (randn(1, 64, seed=1) + 1e-4 * randn(700, 64)).to(device)
    first = topk_encode(x, w, k=3, impl="triton")
    torch.cuda.synchronize() if device == "cuda" else None
    again = topk_encode(x, w, k=3, impl="triton")
    (kept,) = encode_kept._KEPT.values()
    assert kept.factor > 1
    assert identical(first.values, again.values) and torch.equal(first.indices, again.indices)
    for _ in range(encode_kept.QUIET + 1):
        kept._learn(0, 16)
    assert kept.factor < encode_kept.MORE**2


def test_encode_in_panels_and_chunks(device, monkeypatch, certain):
    """Scratch that holds 5 tokens and 64 features at a time: merges happen, and change nothing."""
    plan = encode.Plan(tokens=5, rows=2, features=64, exact_programs=2)
    monkeypatch.setattr(encode, "plan", lambda *sizes: plan)
    monkeypatch.setattr(encode_plain, "plan", lambda *sizes: (5, 2, 64))
    case = on(device, {**scaled(), "b_enc": randn(501, seed=2)})
    case["x"] = case["x"][:8]
    check("triton", exact=True, **case)
    assert certain == [1] * 8
    half = {name: t.half() for name, t in case.items() if name != "k"}
    codes = check("triton", **half, k=case["k"])
    h = torch.addmm(half["b_enc"], half["x"], half["w_enc"].T)
    assert torch.equal(codes.indices, h.cpu().topk(codes.k).indices.sort(-1).values.to(device))


@pytest.mark.parametrize("n, f, k, chunk", [(5, 700, 9, None), (3, 40, 9, None), (5, 333, 4, 2)])
def test_group_maxima_are_another_way_to_the_same(device, monkeypatch, certain, n, f, k, chunk):
    x, w, b_enc = randn(n, 70).to(device), randn(f, 70, seed=1).to(device), randn(f, seed=2)
    operands = x, w, b_enc.to(device), randn(70, seed=3).to(device), 1 + b_enc.abs().to(device)
    expected = encode.encode(*operands, k, True)
    del certain[:]
    if chunk is not None:
        monkeypatch.setattr(encode_groups, "tokens_at_once", lambda *sizes: chunk)
    found = encode_groups.encode_groups(*operands, k, True)
    assert certain == [1] * n
    assert identical(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_group_maxima_of_non_finite_scores(device):
    x, w = randn(6, 12).to(device), randn(301, 12, seed=1).to(device)
    w[[7, 100], 3], x[2, 5], w[9, 0] = NAN, INF, -INF
    expected = encode.encode(x, w, None, None, None, 5, True)
    found = encode_groups.encode_groups(x, w, None, None, None, 5, True)
    assert identical(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_large_k_needs_no_screen(device, monkeypatch):
    monkeypatch.setattr(encode, "TILE", 16)
    case = scaled(b_enc=randn(501, seed=2), scale=1 + randn(501).abs())
    check("triton", exact=True, **on(device, case))


@pytest.mark.parametrize(
    "n, f, d, c", [(1, 5, 3, 5), (8192, 131072, 2304, 144), (8192, 1 << 20, 4096, 168)]
)
def test_scratch_is_bounded(n, f, d, c):
    for limit in (256 << 20, 64 << 20, 16 << 20):
        sizes = encode.plan(n, f, encode.packed_width(d), c, limit)
        b = encode.Buffers(torch.device("meta"), d, f, c, sizes)
        held = [*vars(b).values(), *vars(b.winners).values()]
        used = sum(t.nbytes for t in held if isinstance(t, torch.Tensor))
        # beyond the limit, only the one row of scores of the exact pass
        assert used <= 1.05 * limit + 8 * f
        assert 1 <= sizes.tokens <= n and 1 <= sizes.features <= f


def test_scratch_shrinks_before_it_fails(device, monkeypatch):
    asked = []
    buffers = encode.Buffers

    def crowded(device, d, f, c, sizes, room=3):
        asked.append(sizes)
        if len(asked) < room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return buffers(device, d, f, c, sizes)

    monkeypatch.setattr(encode, "Buffers", crowded)
    x, w = randn(4, 20).to(device), randn(900, 20, seed=1).to(device)
    check("triton", x, w, k=3, exact=True)
    assert len(asked) == 3

    def full(*sizes):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(encode, "Buffers", full)
    with pytest.raises(RuntimeError, match="topk_encode: expected 4 MB of free memory on .*; free"):
        topk_encode(x, w, k=3, impl="triton")


def test_encode_gradients(device):
    """The backward of the codes, on the device's kernels, against autograd of the dense product."""
    shapes = ((4, 12), (60, 12), (60,), (12,))
    leaves = [randn(*s, seed=i).to(device).requires_grad_() for i, s in enumerate(shapes)]
    x, w, b_enc, b_dec = leaves
    with unchanged(*leaves):
        codes = topk_encode(x, w, b_enc, k=5, b_dec=b_dec, impl="triton")
        weights = randn(4, 5, seed=9).to(device)
        found = torch.autograd.grad((codes.values * weights).sum(), leaves)
    h = ((x - b_dec) @ w.T + b_enc).relu().gather(-1, codes.indices)
    for a, b in zip(found, torch.autograd.grad((h * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_encode_is_deterministic(device):
    x, w = randn(16, 64).to(device), randn(3000, 64, seed=1).to(device)
    first = topk_encode(x[:3] if INTERPRETED else x, w, k=7, impl="triton")
    for _ in range(1 if INTERPRETED else 20):
        again = topk_encode(x[:3] if INTERPRETED else x, w, k=7, impl="triton")
        assert identical(first.values, again.values) and torch.equal(first.indices, again.indices)
