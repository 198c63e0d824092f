# SPDX-License-Identifier: Apache-2.0
"""What the tests compare with: fp64 oracles, the error-ratio rule, the selection rule.

An implementation is accurate when its error against fp64 is at most twice that of eager torch in
the same dtype, plus one rounding: `err <= 2 err_eager + eps(dtype) scale`, scale = max |oracle|.
Nothing is tuned by hand. A selection is right when it *is* the oracle's; an implementation whose
scores carry eager's rounding may differ, but only among scores within that rounding of the k-th.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal data. In fp64 on a grid of 2^-8: sums of triple products are exact, so oracles are."""
    # on the CPU whatever the default device: the numbers are the same everywhere
    generator = torch.Generator("cpu").manual_seed(seed)
    data = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return (data * 2**8).round() / 2**8 if dtype == torch.float64 else data.to(dtype)


def randint(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Integers in -2..2: exact in every dtype and every order of summation, with many ties."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator, device="cpu").to(dtype)


def random_indices(n: int, k: int, n_features: int, *, seed: int = 0) -> torch.Tensor:
    """[n, k] distinct features of each row."""
    generator = torch.Generator("cpu").manual_seed(seed)
    scores = torch.rand(n, n_features, generator=generator, device="cpu")
    return scores.argsort(-1)[:, :k].contiguous()


def far_apart(rows: torch.Tensor) -> torch.Tensor:
    """The same [2, d], its rows 2^31 + 8 elements apart in memory of which little is touched."""
    far, d = 2**31 + 8, rows.shape[1]
    if rows.device.type == "cpu":  # torch.empty would touch every page, to poison it
        name = str(rows.dtype).removeprefix("torch.")
        base = torch.from_numpy(np.empty(far + d, name))
    else:
        base = torch.empty(far + d, dtype=rows.dtype, device=rows.device)
    return base.as_strided((2, d), (far, 1)).copy_(rows)


def far_and_near(device: str, axes: int, axis: int) -> list[torch.Tensor]:
    """[1, .., 3, .., 20] (or, of the last axis, [.., 20, 3]), of entries 2^30 + 4 elements apart.

    The stride is below 2^31, and twice the stride is not.
    """
    near = randn(3, 20, dtype=torch.float16).to(device)
    far = far_apart(near[:2]).as_strided((3, 20), (2**30 + 4, 1)).copy_(near)
    if axis == axes:
        return [t.T[(None,) * (axes - 1)] for t in (far, near)]
    return [t[(None,) * axis + (slice(None),) + (None,) * (axes - 1 - axis)] for t in (far, near)]


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, except that one NaN is as good as another."""
    if a.dtype != b.dtype or a.shape != b.shape or not a.numel():
        return a.dtype == b.dtype and a.shape == b.shape
    # a single element may have any stride, and a view of bytes needs 1
    a, b = (t.detach().contiguous().as_strided((t.numel(),), (1,)) for t in (a, b))
    if torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
        return True
    if not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = (t.masked_fill(t.isnan(), 0).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


@contextmanager
def unchanged(*tensors: torch.Tensor | None) -> Iterator[None]:
    """Fails when a tensor is mutated in the block."""
    given = [t for t in tensors if t is not None]
    before = [t.detach().clone() for t in given]
    yield
    for t, copy in zip(given, before, strict=True):
        assert identical(t, copy), f"an input of shape {list(t.shape)} was mutated"


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_accurate(
    actual: torch.Tensor,
    oracle: torch.Tensor,
    eager: torch.Tensor,
    *,
    scale: float | None = None,
) -> None:
    """The error-ratio rule; NaN and inf are where the oracle (in actual's dtype) has them.

    `scale` is what one rounding is relative to, if the result is a difference of larger numbers.
    """
    assert actual.shape == oracle.shape, f"shape {list(actual.shape)} != {list(oracle.shape)}"
    rounded = oracle.to(actual.dtype)
    finite = rounded.isfinite()
    torch.testing.assert_close(actual[~finite], rounded[~finite], rtol=0, atol=0, equal_nan=True)
    if not finite.any():
        return
    error, eager_error = (
        (t.detach().double()[finite] - oracle.double()[finite]).abs().max().item()
        for t in (actual, eager)
    )
    if scale is None:
        scale = oracle.double()[finite].abs().max().item()
    limit = 2 * eager_error + torch.finfo(actual.dtype).eps * scale
    assert error <= limit, f"error {error:.3e} > {limit:.3e} (eager torch {eager_error:.3e})"


def best(scores: torch.Tensor, k: int) -> torch.Tensor:
    """[N, k] indices by rank: NaN first, then score descending, then index ascending."""
    s = scores.detach().double().numpy()
    nan = np.isnan(s)
    index = np.broadcast_to(np.arange(s.shape[-1]), s.shape)
    order = np.lexsort((index, -np.where(nan, 0, s), ~nan), axis=-1)
    return torch.from_numpy(order[..., :k].copy())


def assert_selected(
    indices: torch.Tensor, scores: torch.Tensor, slack: torch.Tensor | None = None
) -> None:
    """`indices` [N, k] ascending are the k best of `scores` [N, F].

    With `slack` [N, 1], features may stand in for each other whose finite scores are within it of
    the k-th best; NaN, inf and everything beyond the slack is still as the oracle has it.
    """
    # the definition is numpy's
    indices, scores = indices.cpu(), scores.cpu()
    rank = best(scores, indices.shape[-1])
    expected = rank.sort(-1).values
    if slack is None:
        assert torch.equal(indices, expected)
        return
    assert (indices.diff(dim=-1) > 0).all(), "indices are not distinct and ascending"
    kth = scores.gather(-1, rank[:, -1:])
    chosen, wanted = (
        torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, i, True)
        for i in (indices, expected)
    )
    slack = slack.cpu()
    excusable = ((scores - kth).abs() <= slack) & (slack > 0)
    assert not ((chosen != wanted) & ~excusable).any()


def encode_scores(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None = None,
    *,
    b_dec: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pre-activations and ranking scores [N, F]: fp64 sums rounded to fp32 (unless fp64)."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    centred = x.to(acc) if b_dec is None else x.to(acc) - b_dec.to(acc)
    h = centred.double() @ w_enc.double().T
    h = (h if b_enc is None else h + b_enc.double()).to(acc)
    return h, h if scale is None else h * scale.to(acc)


def eager_scores(
    x: torch.Tensor,
    w_enc: torch.Tensor,
    b_enc: torch.Tensor | None = None,
    *,
    b_dec: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in eager torch, every step in the dtype of x."""
    h = (x if b_dec is None else x - b_dec) @ w_enc.T
    h = h if b_enc is None else h + b_enc
    return h, h if scale is None else h * scale


def rounding_slack(scores: torch.Tensor, eager: torch.Tensor) -> torch.Tensor:
    """[N, 1]: how far scores may move when each carries eager's error (two scores are compared)."""
    finite = scores.isfinite() & eager.isfinite()
    error = torch.where(finite, eager.double() - scores.double(), 0).abs().amax(-1, keepdim=True)
    scale = torch.where(finite, scores.double(), 0).abs().amax(-1, keepdim=True)
    return 2 * (error + torch.finfo(eager.dtype).eps * scale)
