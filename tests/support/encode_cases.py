# SPDX-License-Identifier: Apache-2.0
"""What encode is tested on, above all where 16-bit scores select wrongly, and how it is judged."""

from __future__ import annotations

import functools

import torch
from oracle import (
    assert_accurate,
    assert_selected,
    eager_scores,
    encode_scores,
    randn,
    rounding_slack,
    unchanged,
)

from mikernels import topk_encode

N, D, F, K = 33, 96, 501, 9
WIDE = 500
NAN, INF = float("nan"), float("inf")


def check(impl, x, w_enc, b_enc=None, *, k, b_dec=None, scale=None, relu=True, exact=False):
    """Codes against the oracle: the set (cpp: exactly), then the values of the features chosen."""
    arguments = {"b_dec": b_dec, "scale": scale}
    with unchanged(x, w_enc, b_enc, b_dec, scale):
        codes = topk_encode(x, w_enc, b_enc, k=k, relu=relu, impl=impl, **arguments)
    assert codes.values.dtype == x.dtype
    assert codes.values.shape == codes.indices.shape == (*x.shape[:-1], k)
    assert codes.n_features == w_enc.shape[0]
    x = x.reshape(-1, x.shape[-1])
    values, indices = codes.values.reshape(-1, k), codes.indices.reshape(-1, k)
    h, scores = encode_scores(x, w_enc, b_enc, **arguments)
    eager_h, eager = eager_scores(x, w_enc, b_enc, **arguments)
    exact = exact or impl == "cpp"
    assert_selected(indices, scores, None if exact else rounding_slack(scores, eager))
    h, eager_h = h.gather(-1, indices), eager_h.gather(-1, indices)
    if relu:
        h, eager_h = h.relu(), eager_h.relu()
    if exact:
        torch.testing.assert_close(values, h.to(x.dtype), rtol=0, atol=0, equal_nan=True)
    else:
        assert_accurate(values, h.double(), eager_h)
    return codes


def with_scores(scores: torch.Tensor) -> dict:
    """x and w_enc whose scores are the given [N, F]; the weights are otherwise noise."""
    x, noise = randn(N, D).double(), randn(F, D, seed=1).double()
    solve = torch.linalg.pinv(x)  # [d, N]
    w = (solve @ scores).T + noise @ (torch.eye(D).double() - solve @ x)
    return {"x": x.float(), "w_enc": w.float(), "k": K}


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def near_ties(relative: float) -> dict:
    """Every token scores every feature 1 .. 1 + relative."""
    return with_scores(1 + relative * uniform(N, F))


def ties_by_rounding() -> dict:
    """A large bias leaves a handful of fp32 scores; which one hangs on the last digits."""
    return {**with_scores(0.3 * uniform(N, F)), "b_enc": torch.full((F,), 1e6)}


def neighbouring_floats() -> dict:
    """16 bits hold one dimension to fp32 precision: the screen's own roundings are left."""
    w = 1 + torch.randperm(4001, generator=torch.Generator().manual_seed(0))[:, None] * 2.0**-23
    return {"x": randn(N, 1), "w_enc": w, "k": K}


def near_ties_at(x: float, w: float) -> dict:
    """Near ties at magnitudes where the screen's own arithmetic could overflow or underflow."""
    case = near_ties(1e-5)
    return {**case, "x": case["x"] * x, "w_enc": case["w_enc"] * w}


def spread_magnitudes() -> dict:
    """Norms from far below to far above what 16 bits are used for, on both sides."""
    case = near_ties(1e-4)
    case["x"] *= 2.0 ** torch.linspace(-60, 60, N).round()[:, None]
    # the nearest competitors of a feature have every magnitude, made up for by its rank
    powers = 2.0 ** (torch.arange(F) % 100 - 50)
    return {**case, "w_enc": case["w_enc"] * powers[:, None], "scale": 1 / powers}


def scaled(x: float = 1.0, w: float = 1.0, **more) -> dict:
    return {"x": randn(N, D) * x, "w_enc": randn(F, D, seed=1) * w, "k": K, **more}


def duplicates() -> dict:
    """Ties at the k-th place: one in three features is a copy of an earlier one."""
    case = scaled()
    case["w_enc"][2::3] = case["w_enc"][::3]
    case["b_enc"] = randn(F, seed=2)
    case["b_enc"][2::3] = case["b_enc"][::3]
    return case


def outlier_dimensions() -> dict:
    """Massive activations: a few dimensions of x 10^3 times the rest, with small weights."""
    case = scaled()
    case["x"][:, [3, 40, 77]] *= 1e3
    case["w_enc"][:, [3, 40]] *= 1e-3
    return case


def uneven_features() -> dict:
    case = scaled()
    case["w_enc"][[5, 250]] *= 1e4
    case["w_enc"][[6, 251]] *= 1e-4
    return case


def uneven_tokens() -> dict:
    case = scaled()
    case["x"] *= 10.0 ** torch.linspace(-30, 30, N)[:, None]
    return case


def ascending() -> dict:
    """Every feature beats all earlier ones: whatever the bound, nothing can be skipped."""
    x = randn(N, D).abs()
    return {"x": x, "w_enc": (1 + torch.arange(4000.0)[:, None] / 4000).expand(-1, D), "k": K}


def ascending_with_non_finite() -> dict:
    """NaN and inf features that stay in full lists while better and better ones arrive."""
    case = ascending()
    w = case["w_enc"].clone()
    w[[5, 700, 3000], 2] = NAN
    w[[6, 701, 3001], 3] = INF
    w[[7, 702]] = -INF
    b_enc = torch.zeros(len(w))
    b_enc[[8, 703]], b_enc[[9, 704]] = NAN, -INF
    case["x"][::2] *= 1e25  # beyond what 16 bits are used for: nothing is known of these tokens
    return {**case, "w_enc": w, "b_enc": b_enc}


def cancelling() -> dict:
    """Scores 10^5 times smaller than the terms that they are the sum of."""
    x, w = randn(N, D // 2), randn(F, D // 2, seed=1)
    x = torch.cat([x, -x], 1)
    return {"x": x, "w_enc": torch.cat([w, w + 1e-5 * randn(F, D // 2, seed=2)], 1), "k": K}


def zero_rows() -> dict:
    case = scaled()
    case["x"][::4] = 0
    case["w_enc"][::7] = 0
    return case


def large_biases() -> dict:
    """A bias that swamps the product in fp32: which features win is decided by one rounding."""
    return scaled(b_enc=1e6 + torch.arange(F) % 7, b_dec=100 * randn(D, seed=3))


def spread_scale() -> dict:
    return scaled(scale=10.0 ** torch.linspace(-8, 8, F) * randn(F, seed=3).sign())


ADVERSARIAL = {
    **{f"near ties {r:g}": lambda r=r: near_ties(r) for r in (1e-2, 1e-4, 1e-5, 1e-6, 1e-7)},
    **{
        f"near ties, x 2^{i}, w 2^{j}": lambda i=i, j=j: near_ties_at(2.0**i, 2.0**j)
        for i, j in ((34, 38), (-44, 38), (34, -42), (-44, -42), (40, 60), (-60, 70), (-70, -60))
    },
    "spread magnitudes": spread_magnitudes,
    "ties by rounding": ties_by_rounding,
    "neighbouring floats": neighbouring_floats,
    "duplicate features": duplicates,
    "all features equal": lambda: {**scaled(), "w_enc": randn(1, D, seed=1).expand(F, D)},
    "outlier dimensions": outlier_dimensions,
    "uneven features": uneven_features,
    "uneven tokens": uneven_tokens,
    "ascending": ascending,
    "ascending with non-finite": ascending_with_non_finite,
    "cancelling": cancelling,
    "zero rows": zero_rows,
    "all zero": lambda: scaled(x=0.0),
    "huge x": lambda: scaled(x=1e30),
    "huge w": lambda: scaled(w=1e30),
    "huge x, tiny w": lambda: scaled(x=1e30, w=1e-30),
    "overflow": lambda: scaled(x=1e30, w=1e30, fp32_sums_overflow=True),
    "denormal x": lambda: scaled(x=1e-40),
    "denormal w": lambda: scaled(w=1e-40),
    "denormal scores": lambda: scaled(x=1e-20, w=1e-20),
    "underflow": lambda: scaled(x=1e-40, w=1e-40),
    "large biases": large_biases,
    "spread scale": spread_scale,
    "denormal ranks": lambda: {**near_ties(1.0), "scale": torch.full((F,), 3e-44)},
    "huge ranks": lambda: {**near_ties(1e-5), "scale": torch.full((F,), 2e38)},
    "overflowing ranks": lambda: {**near_ties(1.0), "scale": torch.full((F,), 2e38)},
}


def _put(tensor: torch.Tensor, value: float, *places: tuple[int, ...]) -> None:
    for place in places:
        tensor[place] = value


# each writes into (x [9, 12], w_enc [301, 12], b_enc [301], b_dec [12])
NON_FINITE = {
    "nan in x": lambda x, w, b, c: _put(x, NAN, (2, 5), (8, 11)),
    "inf in x": lambda x, w, b, c: _put(x, INF, (2, 5), (8, 11)),
    "-inf in x": lambda x, w, b, c: _put(x, -INF, (0, 0)),
    "nan in a weight": lambda x, w, b, c: _put(w, NAN, (7, 3), (300, 0)),
    "inf in a weight": lambda x, w, b, c: _put(w, INF, (7, 3), (300, 0)),
    "-inf in a weight": lambda x, w, b, c: _put(w, -INF, (7, 3)),
    "more nan features than k": lambda x, w, b, c: _put(w[1::4], NAN, (slice(None), 2)),
    "nan in a bias": lambda x, w, b, c: _put(b, NAN, (7,), (300,)),
    "inf in a bias": lambda x, w, b, c: _put(b, INF, (7,), (300,)),
    "-inf in most biases": lambda x, w, b, c: _put(b, -INF, (slice(3, None),)),
    "nan in b_dec": lambda x, w, b, c: _put(c, NAN, (4,)),
    "inf in b_dec": lambda x, w, b, c: _put(c, INF, (4,)),
    "nan everywhere": lambda x, w, b, c: _put(x, NAN, (slice(None),)),
}


def many(**more) -> dict:
    """Tokens and features enough for the coarse screen, in 8 bits."""
    return {"x": randn(300, WIDE), "w_enc": randn(3001, WIDE, seed=1), "k": 4, **more}


def near_ties_among_the_best() -> dict:
    """The features that win are copies of each other but for the last digits."""
    case = many()
    best = case["w_enc"][:40].repeat(75, 1)
    case["w_enc"][1:] = torch.where(
        torch.arange(3000)[:, None] % 10 == 0,
        3 * best * (1 + 1e-6 * randn(3000, WIDE, seed=2)),
        best,
    )
    return case


def outlier_columns() -> dict:
    case = many()
    case["x"][:, [3, 40, 77]] *= 1e3
    case["w_enc"][:, [3, 40]] *= 1e-3
    case["w_enc"][:, 5] = 0
    case["x"][:, 6] = 0
    return case


def outlier_numbers() -> dict:
    """One number per row far larger than the rest, so that bytes hold little else."""
    case = many()
    for t in (case["x"], case["w_enc"]):
        t[torch.arange(len(t)), torch.arange(len(t)) % WIDE] *= 300
    return case


def non_finite_among_many() -> dict:
    case = many(b_enc=randn(3001, seed=2))
    x, w = case["x"], case["w_enc"]
    x[7], x[8, 3], x[9, 4], x[200, 0] = NAN, NAN, INF, -INF
    w[1500, 3], w[2000, 5], w[2500] = NAN, INF, 0
    case["b_enc"][[40, 2600]], case["b_enc"][2700] = INF, NAN
    return case


def uneven_rows() -> dict:
    case = many()
    case["x"] *= 2.0 ** (torch.arange(300) % 120 - 60)[:, None]
    case["w_enc"][::50] *= 2.0 ** (torch.arange(61) - 30)[:, None]
    case["x"][::9] = 0
    return case


def turning_to_the_worse() -> dict:
    """Half-way on every feature beats all earlier ones, so that 8 bits no longer pay."""
    case = many()
    case["x"][:] = case["x"][:1] + 0.01 * case["x"]
    case["w_enc"][1500:] = case["x"][:1] * torch.linspace(1, 2, 1501)[:, None]
    return case


COARSE = {
    "random": many,
    "biased and ranked": lambda: many(
        b_enc=randn(3001, seed=2), b_dec=randn(WIDE, seed=3), scale=randn(3001, seed=4)
    ),
    "near ties among the best": near_ties_among_the_best,
    "outlier columns": outlier_columns,
    "outlier numbers": outlier_numbers,
    "non-finite": non_finite_among_many,
    "uneven rows": uneven_rows,
    "turning to the worse": turning_to_the_worse,
}

# "x, w_enc" whose scores would take 512 MB: at random, and as `ascending`
LARGE = (
    "torch.randn(2048, 16), torch.randn(65536, 16)",
    "torch.rand(2048, 16), (1 + torch.arange(65536.) / 65536).repeat(16, 1).T.contiguous()",
)


@functools.cache
def several_panels(transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x and w_enc of some 10,000 features a panel, winners on both sides of every boundary. Not to
    be written to: drawing them takes longer than a test of them."""
    if transposed:
        x, w = several_panels(False)
        return x, w.T.contiguous().T
    x, w = randn(17, 768), randn(24594, 768, seed=1)
    w[20000:] *= 1.1
    w[5::4099] *= 2
    return x, w
