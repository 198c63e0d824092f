# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import triton.language as tl
from encode_cases import (
    ADVERSARIAL,
    INF,
    NAN,
    NON_FINITE,
    F,
    N,
    check,
    scaled,
    uniform,
    with_scores,
)
from oracle import far_apart, identical, randn, unchanged

from mikernels import _triton, topk_encode
from mikernels.kernels.sae import (
    encode,
    encode_plain,
    encode_screen,
    encode_settle,
    encode_winners,
)

INTERPRETED = _triton.interpreting()


@pytest.fixture(autouse=True)
def large_programs(monkeypatch):
    """The interpreter pays by the program, not by the element."""
    if INTERPRETED:
        monkeypatch.setitem(encode.PACK, "ROWS", 128)
        monkeypatch.setitem(encode.SETTLE, "SLOTS", 64)
        monkeypatch.setitem(encode.EXACT, "SLOTS", 256)
        monkeypatch.setattr(encode, "EXACT_PROGRAMS", 6)
        monkeypatch.setattr(encode, "COPIERS", 2)
        for module in (encode, encode_screen):
            monkeypatch.setattr(module, "SURVEYORS", tl.constexpr(4))


@pytest.fixture
def certain(monkeypatch):
    """Collects, for every token, whether the screen decided its selection."""
    seen: list[int] = []

    def spy(x, *arguments):
        settle(x, *arguments)
        seen.extend((arguments[3].states[: len(x)] == encode_settle.CERTAIN.value).int().tolist())

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
        (3, 96, 700, 9),
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
    case["x"] = case["x"][:4]
    check("triton", exact=True, **on(device, case))
    assert certain == [1] * 4


def test_candidates_are_ranked_by_their_scores(device, certain):
    """Near ties around the k-th place, few enough that the candidates hold them all."""
    scores = 0.1 * uniform(N, F)
    scores[:, ::25] = 1 + 1e-5 * uniform(N, F)[:, ::25]
    case = with_scores(scores)
    case["x"] = case["x"][:4]
    check("triton", exact=True, **on(device, case))
    assert certain == [1] * 4


@pytest.mark.parametrize("spread", [0, 20])
def test_rounded_bounds_hold(device, spread):
    """Every bound is at least the exact score, and above it by what the proof allows; of weights
    beyond the range that the survey has found, it is not finite."""
    n, d, f = 8, 70, 256
    x, w, bias = randn(n, d), randn(f, d, seed=1), 30 * randn(f, seed=2)
    scale, shift = randn(f, seed=3).exp(), randn(d, seed=4)
    x = shift.sign() + (x - shift) * 2.0 ** torch.linspace(-spread, spread, n)[:, None]
    w = w * 2.0 ** (spread * randn(f, seed=5).clamp(-1.5, 0.5))[:, None]
    w[7:9] = 2.0**40 * randn(2, d, seed=6)
    # what is lost of one row points along another of which nothing is
    shift, scale[30:32], bias[30:32] = shift.sign(), 1, 0
    w[31] = 16 * randn(d, seed=7)
    x[1] = shift + (w[31] - w[31].half()).sign()
    w[30] = 16 * ((x[0] - shift) - (x[0] - shift).half()).sign()
    bias[9:40] *= 1e-4
    x, w, bias, scale, shift = (t.to(device) for t in (x, w, bias, scale, shift))
    sizes = encode.plan(n, f, encode.packed_width(d), 8, 1, encode.SCRATCH)
    b, weights = encode.Buffers(x.device, d, f, 8, 1, sizes), encode.Weights(w, bias, shift, scale)
    # rows 0, 4, 8, ... are surveyed where all programs of the survey run, 7 never is
    encode.survey(weights, b)
    b.survey[0] = b.survey[0].clamp(max=float_bits(w[:7].abs().max() * scale.max()))
    encode.pack_tokens(x, weights, b)
    packed = b.x, encode.pack_weights(weights, 0, f, None, b)
    assert all((t.abs() >= 2.0**-14)[t != 0].all() for t in (b.x[:, :d], packed[1][:, :d]))
    unit = 2.0 ** b.exponents.double()[:, None]
    bounds = packed[0].double() @ packed[1].double().T
    centred = (x - shift).double()
    exact = (centred @ w.double().T + bias.double()) * scale.double() * unit
    assert not bounds[:, 7:9].isfinite().any()
    slack = (bounds - exact)[:, 9:]
    # what SLACK stands for is not in the product
    assert (slack > -(2.0**-11)).all()
    size = centred.norm(dim=1)[:, None] * (w.double() * scale.double()[:, None]).norm(dim=1)
    allowed = 2e-3 * size + 2.0**-10 * (bias * scale).double().abs()
    assert (slack < (allowed * unit)[:, 9:] + 2.0**-3).all()


def float_bits(x: torch.Tensor) -> int:
    return int(x.float().view(torch.int32))


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


def test_encode_in_panels_and_chunks(device, monkeypatch, certain):
    """Scratch that holds 4 tokens and 160 features at a time: merges happen, and change nothing."""
    plan = encode.Plan(tokens=4, rows=3, features=160, again=3, programs=2)
    monkeypatch.setattr(encode, "plan", lambda *sizes: plan)
    monkeypatch.setattr(encode_plain, "plan", lambda *sizes: (4, 3, 160))
    case = on(device, {**scaled(), "b_enc": randn(501, seed=2)})
    case["x"] = case["x"][:5]
    check("triton", exact=True, **case)
    assert certain == [1] * 5
    half = {name: t.half() for name, t in case.items() if name != "k"}
    codes = check("triton", **half, k=case["k"])
    h = torch.addmm(half["b_enc"], half["x"], half["w_enc"].T)
    assert torch.equal(codes.indices, h.cpu().topk(codes.k).indices.sort(-1).values.to(device))


def test_every_feature_of_every_token_again(device, monkeypatch, certain):
    """All tie, in more segments than a list holds, panel by panel; there is room for one token in
    the second screen, and none is split over programs."""
    plan = encode.Plan(tokens=2, rows=2, features=128, again=1, programs=2)
    monkeypatch.setattr(encode, "plan", lambda *sizes: plan)
    monkeypatch.setitem(encode.EXACT, "SEGMENT", 64)
    x, w = randn(3, 20).to(device), randn(1, 20, seed=1).expand(201, 20).to(device)
    check("triton", x, w, k=5, exact=True)
    assert certain == [0] * 3


def padded(tokens: int) -> dict:
    """Few tokens among padding, more equal features than are kept, and one that is not finite."""
    x, w = randn(tokens, 24), randn(400, 24, seed=1)
    w[100:250] = w[100]
    w[399, 7] = INF
    b_enc, b_dec = randn(400, seed=2), randn(24, seed=3)
    b_enc[100:250] = 1
    x[3] = b_dec + 3 * w[100]
    x[5:] = b_dec
    x[6, 3] = x[tokens - 1, 5] = NAN
    x[4, 2] = INF
    return {"x": x, "w_enc": w, "b_enc": b_enc, "b_dec": b_dec, "k": 7}


@pytest.mark.parametrize("change", [{"b_enc": None}, {"scale": torch.full((400,), 0.5)}])
def test_padding_is_settled_once(device, certain, change):
    n = 10 if INTERPRETED else 1024
    check("triton", exact=True, **on(device, padded(n) | change))
    # all of the last feature's scores are not finite, so no token's bounds settle that; one row of
    # zeros is computed, and those of NaN are known
    assert certain[6] == certain[-1] == 1 and certain[3:6] == [0, 0, 0]


def test_features_switched_off_are_no_candidates(device, certain):
    """A bias of -inf is a bound of -inf, so tokens are certain with few features beside k."""
    x, w, b_enc = randn(3, 20), randn(300, 20, seed=1), torch.full((300,), -INF)
    b_enc[::8] = 0
    x, w, b_enc = (t.to(device) for t in (x, w, b_enc))
    check("triton", x, w, b_enc, k=9, exact=True)
    assert certain == [1] * 3


def test_large_k_needs_no_screen(device, monkeypatch):
    monkeypatch.setattr(encode, "MOST_WINNERS", 16)
    monkeypatch.setattr(encode_plain, "MOST_WINNERS", 8)
    case = scaled(b_enc=randn(501, seed=2), scale=1 + randn(501).abs())
    case["x"] = case["x"][:9]
    check("triton", exact=True, **on(device, case))
    half = {"x": case["x"].half(), "w_enc": case["w_enc"].half(), "k": 9}
    check("triton", **on(device, half))


@pytest.mark.parametrize(
    "n, f, d, k", [(1, 5, 3, 5), (8192, 131072, 2304, 64), (8192, 1 << 20, 4096, 128)]
)
def test_scratch_is_bounded(monkeypatch, n, f, d, k):
    monkeypatch.setattr(encode, "EXACT_PROGRAMS", 528)
    c = encode.candidates(k, d, f)
    for limit in (256 << 20, 64 << 20, 16 << 20):
        sizes = encode.plan(n, f, encode.packed_width(d), c, k, limit)
        b = encode.Buffers(torch.device("meta"), d, f, c, k, sizes)
        held = [*vars(b).values(), *vars(b.winners).values()]
        used = sum(t.nbytes for t in held if isinstance(t, torch.Tensor))
        assert used <= 1.05 * limit
        assert 1 <= sizes.tokens <= n and 1 <= sizes.features <= f and sizes.programs >= 1


def test_panels_begin_at_words_of_bits():
    for f, c in ((5000, 500), (4999, 2048), (40001, 1500), (70000, 64)):
        panels = encode.panels_of(f, c, encode_winners.panel_width(c, min(f, 32768)))
        assert [end for _, end in panels[:-1]] == [first for first, _ in panels[1:]]
        assert panels[0][0] == 0 and panels[-1][1] == f
        assert all(first % 32 == 0 for first, _ in panels)


def test_scratch_shrinks_before_it_fails(device, monkeypatch):
    asked = []
    buffers = encode.Buffers

    def crowded(*sizes, room=3):
        asked.append(sizes)
        if len(asked) < room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return buffers(*sizes)

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
