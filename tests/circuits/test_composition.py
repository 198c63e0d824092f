# SPDX-License-Identifier: Apache-2.0
"""Composition scores of attention heads, against the product that is formed explicitly."""

import math

import numpy as np
import pytest
import torch
from oracle import DTYPES, randn, unchanged

from mikernels.circuits import composition_scores


def heads(n, d, r, dtype, seed, shared=1):
    """w_q, w_k, w_v as [n, d, r] and w_o as [n, r, d]; k and v of n / shared heads."""
    q = randn(n, d, r, dtype=dtype, seed=seed)
    k, v = (randn(n // shared, d, r, dtype=dtype, seed=seed + i) for i in (1, 2))
    return q, k, v, randn(n, r, d, dtype=dtype, seed=seed + 3)


def explicit(first, last, reads, rest, dtype=np.longdouble):
    """The scores, with the [d, d] matrices and their product; 80 bits judge fp64."""
    first, last, reads, rest = (
        t.repeat_interleave(max(a.shape[0], b.shape[0]) // t.shape[0], 0)
        .to(torch.float32 if t.dtype == torch.bfloat16 else t.dtype)
        .numpy()
        .astype(dtype)
        for a, b in ((first, last), (reads, rest))
        for t in (a, b)
    )
    left, right = first @ last, reads @ rest
    norms = [np.sqrt((t * t).sum((-2, -1))) for t in (left, right)]
    product = left[:, None] @ right
    return np.sqrt((product * product).sum((-2, -1))) / (norms[0][:, None] * norms[1])


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize(("d", "r"), [(16, 4), (5, 8)])
def test_composition_is_that_of_the_explicit_product(kind, dtype, shared, d, r):
    _, _, v, o = heads(4, d, r, dtype, 0, shared)
    q2, k2, v2, o2 = heads(6, d, r + 1, dtype, 10, shared)
    readers = (v2, o2) if kind == "V" else (q2, k2)
    with unchanged(v, o, *readers):
        found = composition_scores((v, o), readers, kind)
    as_matrices = {"Q": (q2, k2.mT), "K": (k2, q2.mT), "V": (v2, o2)}[kind]
    parts = v, o, *as_matrices
    oracle, eager = explicit(*parts), explicit(*parts, dtype=found.numpy().dtype)
    error, eager_error = (np.abs(x - oracle).max() for x in (found.numpy(), eager))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error <= 2 * eager_error + torch.finfo(found.dtype).eps * oracle.max()
    assert oracle.min() > 0.05 and oracle.max() < 1


def test_composition_keeps_layers_and_scores_zero_heads():
    _, _, v, o = heads(6, 8, 2, torch.float64, 0)
    q, k, _, _ = heads(4, 8, 3, torch.float64, 9)
    v[3] = 0
    flat = composition_scores((v, o), (q, k), "K")
    assert not flat[3].any() and flat[[0, 1, 2, 4, 5]].all()
    layered = composition_scores(
        (v.view(2, 3, 8, 2), o.view(2, 3, 2, 8)), (q.view(2, 2, 8, 3), k.view(2, 2, 8, 3)), "K"
    )
    assert torch.equal(layered, flat.view(2, 3, 2, 2))
    v[0, 0, 0] = math.nan
    assert composition_scores((v, o), (q, k), "K").isnan()[0].all()
    assert composition_scores((v[:0], o[:0]), (q, k), "Q").shape == (0, 4)


def test_composition_refuses():
    q, k, v, o = heads(4, 8, 2, torch.float32, 0)
    for writers, readers, kind, error, message in (
        ((v, o), (q, k), "O", ValueError, r"kind must be one of \['Q', 'K', 'V'\], got 'O'"),
        (v, (q, k), "K", TypeError, r"writers must be a pair \(w_v, w_o\), got Tensor"),
        ((v, o), (q, o), "K", ValueError, r"readers must be w_q \[..., heads, d, r\] and w_k"),
        ((v, o), (v, k), "V", ValueError, r"readers must be w_v .* w_o \[..., heads, r, d\]"),
        ((v[0], o), (q, k), "K", ValueError, r"w_v and w_o must be \[..., heads, rows, columns\]"),
        ((v[:3], o), (q, k), "K", ValueError, r"w_v must have \[4\] heads.*got \[3\]"),
        ((v, o), (q[:, :7], k[:, :7]), "Q", ValueError, r"the d of writers \(8\), got 7"),
        ((v.double(), o), (q, k), "K", TypeError, "w_o must have the dtype of w_v"),
        ((v, o), (q.double(), k.double()), "K", TypeError, "readers must have the dtype"),
    ):
        with pytest.raises(error, match=message):
            composition_scores(writers, readers, kind)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_composition_is_that_of_transformer_lens(kind):
    lens = pytest.importorskip("transformer_lens")
    config = lens.HookedTransformerConfig(
        n_layers=3, d_model=24, n_ctx=8, d_head=6, n_heads=4, d_vocab=10, act_fn="relu", seed=0
    )
    model = lens.HookedTransformer(config)
    theirs = model.all_composition_scores(kind)
    readers = (model.W_V, model.W_O) if kind == "V" else (model.W_Q, model.W_K)
    found = composition_scores((model.W_V, model.W_O), readers, kind)
    layers = torch.arange(3)
    later = layers[:, None, None, None] < layers[None, None, :, None]
    assert theirs[later.expand_as(theirs)].min() > 0.05
    torch.testing.assert_close(found * later, theirs.detach())
