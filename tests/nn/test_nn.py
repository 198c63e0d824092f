# SPDX-License-Identifier: Apache-2.0
"""nn: the geometric median, TopKSAE's losses and gradients against dense autograd in fp64."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_accurate, randn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mikernels
from mikernels.nn import TopKSAE, geometric_median

D, F, K, N = 24, 160, 5, 48


def make_sae(**settings) -> TopKSAE:
    settings = {"dead_after": 100, "k_aux": 7, **settings}
    sae = TopKSAE(D, F, K, generator=torch.Generator().manual_seed(3), **settings)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * randn(F, seed=4))
        sae.b_dec.copy_(0.1 * randn(D, seed=5))
    return sae


def kill(sae: TopKSAE, dead: torch.Tensor) -> None:
    """Declare features dead, and let their encoders look elsewhere so that they really are."""
    sae.tokens_since_fired[dead] = sae.config.dead_after
    with torch.no_grad():
        sae.b_enc[dead] -= 1


def dense_loss(x, w_enc, b_enc, w_dec, b_dec, dead, config, k=K):
    """Everything with tokens x F matrices, from the definition; returns (loss, mse, aux, fvu)."""
    h = (x - b_dec) @ w_enc.T + b_enc
    keep = torch.zeros_like(h).scatter(-1, h.topk(k).indices, 1.0)
    error = x - ((h * keep).relu() @ w_dec + b_dec)
    mse = error.square().sum(-1).mean()
    fvu = error.square().sum() / (x - x.mean(0)).square().sum()
    r = error.detach()
    alive = torch.ones(h.shape[-1], dtype=torch.bool)
    alive[dead] = False
    best = h.masked_fill(alive, -torch.inf).topk(min(config.k_aux, len(dead))).indices
    chosen = torch.zeros_like(h).scatter(-1, best, 1.0)
    left = ((h * chosen).relu() @ w_dec - r).square().sum() / (r - r.mean(0)).square().sum()
    unexplained = (x - x.mean(0)).square().sum(-1).mean()
    main, aux = (mse, left * unexplained) if config.loss == "mse" else (fvu, left)
    return main + config.aux_coefficient * aux, mse, aux, fvu


def test_geometric_median_of_a_line_is_the_median() -> None:
    x = randn(31, 1, seed=1) * torch.tensor([[1.0, 2.0, -3.0]]) + 5
    expected = x.median(0).values
    # the sum of distances has a kink at the median, where Weiszfeld converges slowly
    torch.testing.assert_close(geometric_median(x).float(), expected, rtol=1e-3, atol=1e-3)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 10_000))
def test_geometric_median_has_the_least_sum_of_distances(n, d, seed) -> None:
    x = randn(n, d, seed=seed).double()
    if seed % 2:
        x[: n // 2] = x[0].clone()
    median = geometric_median(x)

    def cost(m):
        return torch.linalg.vector_norm(x - m, dim=-1).mean()

    directions = torch.nn.functional.normalize(randn(20, d, seed=seed + 1).double(), dim=-1)
    here = cost(median)
    for step in (1e-2, 1.0):
        assert all(here <= cost(median + step * v) + 1e-5 for v in directions)
    assert all(here <= cost(point) + 1e-5 for point in x)


def test_geometric_median_leaves_a_data_point_and_stays_on_one() -> None:
    # the mean is the data point 0, which is not the median of the rest: plain Weiszfeld is stuck
    stuck = torch.tensor([[0.0], [1.0], [1.0], [1.0], [-3.0]])
    torch.testing.assert_close(geometric_median(stuck).float(), torch.ones(1), rtol=0, atol=1e-4)
    majority = torch.cat([torch.full((6, D), 2.0), 100 * randn(5, D)])
    torch.testing.assert_close(
        geometric_median(majority).float(), torch.full((D,), 2.0), rtol=0, atol=1e-2
    )
    same = torch.full((4, D), 0.1, dtype=torch.float64)
    torch.testing.assert_close(geometric_median(same), same[0])


def test_geometric_median_refuses_squares_that_overflow() -> None:
    x = 1e200 * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="x must have squares that are finite; scale it down"):
        geometric_median(x)


def test_geometric_median_is_not_moved_by_an_outlier_and_keeps_fp64() -> None:
    x = randn(64, D, dtype=torch.float64)
    clean = geometric_median(x)
    x[0] *= 1e6
    assert torch.linalg.vector_norm(geometric_median(x) - clean) < 0.2
    # an offset that fp32 could not carry
    torch.testing.assert_close(
        geometric_median(x[1:] + 1e9) - 1e9, geometric_median(x[1:]), rtol=0, atol=1e-4
    )


def test_geometric_median_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match=r"must be \[n, d\] with at least one row, got \[0, 3\]"):
        geometric_median(torch.empty(0, 3))
    with pytest.raises(ValueError, match="must be finite"):
        geometric_median(torch.tensor([[1.0], [torch.nan]]))


def test_sae_starts_with_unit_decoder_rows_and_the_encoder_as_their_copy() -> None:
    sae = TopKSAE(D, F, K, generator=torch.Generator().manual_seed(0))
    again = TopKSAE(D, F, K, generator=torch.Generator().manual_seed(0))
    norms = torch.linalg.vector_norm(sae.w_dec, dim=-1)
    torch.testing.assert_close(norms, torch.ones(F))
    assert torch.equal(sae.w_enc, sae.w_dec) and sae.w_enc is not sae.w_dec
    assert torch.equal(sae.w_dec, again.w_dec)
    assert not sae.b_enc.any() and not sae.b_dec.any()
    assert sae.config.k_aux == D // 2
    assert TopKSAE(**json.loads(json.dumps(sae.config.to_dict()))).config == sae.config
    sae.init_b_dec_(randn(3, 10, D) + 7)
    assert (sae.b_dec - 7).abs().max() < 1


@pytest.mark.parametrize("loss", ["mse", "fvu"])
@pytest.mark.parametrize("n_dead", [3, 30])
def test_losses_and_gradients_are_those_of_the_dense_form(loss, n_dead) -> None:
    sae = make_sae(loss=loss)
    dead = torch.arange(n_dead) * 5
    kill(sae, dead)
    x = randn(N, D, seed=6) + 0.5
    out = sae(x)
    out.loss.backward()
    parameters = (sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec)
    dense = {}
    for dtype in (torch.float32, torch.float64):
        leaves = [p.detach().to(dtype).requires_grad_() for p in parameters]
        losses = dense_loss(x.to(dtype), *leaves, dead, sae.config)
        losses[0].backward()
        dense[dtype] = [*losses, *(leaf.grad for leaf in leaves)]
    ours = [out.loss, out.mse, out.aux_loss, out.fvu, *(p.grad for p in parameters)]
    for actual, oracle, eager in zip(ours, dense[torch.float64], dense[torch.float32], strict=True):
        assert_accurate(actual.detach(), oracle.detach(), eager.detach())


def test_aux_gradient_reaches_the_dead_encoders_only() -> None:
    sae = make_sae()
    dead = torch.tensor([2, 50, 100])
    kill(sae, dead)
    with torch.no_grad():
        # never among the k best, so that all they get comes from AuxK
        sae.w_enc[dead] *= 0.01
    out = sae(randn(N, D, seed=6))
    assert not torch.isin(out.codes.indices[out.codes.values > 0], dead).any()
    (out.aux_loss * sae.config.aux_coefficient).backward()
    alive = torch.ones(F, dtype=torch.bool).index_fill(0, dead, False)
    assert sae.w_enc.grad[alive].abs().max() == 0 and sae.w_dec.grad[alive].abs().max() == 0
    with torch.no_grad():
        sae.b_enc[dead] += 2
    sae.zero_grad()
    sae(randn(N, D, seed=6)).aux_loss.backward()
    assert (sae.w_enc.grad[dead].abs().amax(-1) > 0).all()
    assert (sae.b_enc.grad[dead] != 0).all() and sae.b_dec.grad.abs().max() > 0


def test_aux_is_off_in_eval_mode_without_dead_features_and_at_coefficient_0() -> None:
    x = randn(N, D)
    sae = make_sae()
    assert sae(x).aux_loss == 0
    kill(sae, torch.tensor([1, 2]))
    assert sae(x).aux_loss > 0
    assert sae.eval()(x).aux_loss == 0
    off = make_sae(aux_coefficient=0.0)
    kill(off, torch.tensor([1, 2]))
    assert off(x).aux_loss == 0
    # one token has no variance to explain
    kill(sae := make_sae(), torch.tensor([1, 2]))
    assert sae(x[:1]).aux_loss == 0


@pytest.mark.skipif(not mikernels.supported_levels(), reason="the reference forms tokens x F")
def test_no_tokens_by_features_matrix_is_made() -> None:
    sae = TopKSAE(8, 2048, 4, dead_after=10, k_aux=4)
    sae.tokens_since_fired[:64] = 10
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            largest = max([largest, *sizes])
            return out

    x = randn(128, 8)
    with Watch():
        sae(x).loss.backward()
    assert largest <= 2048 * 8 < 128 * 2048


def test_k_is_a_run_time_value_and_leading_dimensions_are_free() -> None:
    sae = make_sae()
    x = randn(3, 7, D)
    out = sae(x)
    flat = sae(x.reshape(-1, D))
    assert out.codes.values.shape == (3, 7, K) and out.reconstruction.shape == x.shape
    assert torch.equal(out.reconstruction.reshape(-1, D), flat.reconstruction)
    assert out.loss == flat.loss
    assert sae(x, k=2).codes.k == 2 and sae.encode(x[0, 0], k=F).values.shape == (F,)
    with pytest.raises(ValueError, match=rf"k must be in 1..{F}"):
        sae(x, k=F + 1)


def test_parallel_gradient_removal_and_normalisation() -> None:
    sae = make_sae()
    sae(randn(N, D)).loss.backward()
    before = sae.w_dec.grad.clone()
    sae.remove_parallel_gradient_()
    w, g = sae.w_dec.detach().double(), before.double()
    oracle = g - (g * w).sum(-1, keepdim=True) * w
    eager = before - (before * sae.w_dec.detach()).sum(-1, keepdim=True) * sae.w_dec.detach()
    assert_accurate(sae.w_dec.grad, oracle, eager)
    with torch.no_grad():
        sae.w_dec.mul_(3 * torch.rand(F, 1) + 0.1)
        sae.w_dec[0] = 0
    sae.normalize_decoder_()
    norms = torch.linalg.vector_norm(sae.w_dec, dim=-1)
    torch.testing.assert_close(norms[1:], torch.ones(F - 1))
    assert norms[0] == 0


def test_dead_features_are_counted_in_tokens_from_active_slots() -> None:
    sae = make_sae(dead_after=10)
    values = torch.tensor([[[1.0, 0.0], [2.0, 3.0]], [[1.0, 1.0], [0.0, 4.0]]])
    indices = torch.tensor([[[1, 2], [1, 3]], [[1, 4], [2, 5]]])
    codes = mikernels.SparseCodes(values, indices, F)
    for _ in range(3):
        sae.track_fired_(codes)
    fired = torch.zeros(F, dtype=torch.bool)
    fired[[1, 3, 4, 5]] = True
    assert (sae.tokens_since_fired[fired] == 0).all()
    assert (sae.tokens_since_fired[~fired] == 12).all()  # feature 2 was selected, at value 0
    assert torch.equal(sae.dead(), ~fired)


def test_low_precision_weights_take_float32_activations() -> None:
    sae = make_sae(dtype=torch.bfloat16)
    kill(sae, torch.tensor([0, 9]))
    x = randn(N, D)
    out = sae(x)
    assert out.reconstruction.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    out.loss.backward()
    assert sae.w_enc.grad.dtype == torch.bfloat16 and sae.w_enc.grad[9].any()
    norms = torch.linalg.vector_norm(sae.w_dec.float(), dim=-1)
    torch.testing.assert_close(norms, torch.ones(F), rtol=0, atol=2**-8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d": 0}, "d must be at least 1, got 0"),
        ({"k": 200}, "k must be in 1..160 .n_features., got 200"),
        ({"k": 2.0}, "k must be an int, got 2.0"),
        ({"k_aux": 0}, "k_aux must be at least 1"),
        ({"aux_coefficient": -1.0}, "aux_coefficient must be finite and at least 0"),
        ({"dead_after": True}, "dead_after must be an int"),
        ({"loss": "l1"}, "loss must be one of"),
        ({"dtype": torch.int64}, "dtype must be one of"),
    ],
)
def test_bad_settings_are_refused(settings, message) -> None:
    with pytest.raises((TypeError, ValueError), match=f"TopKSAE: {message}"):
        TopKSAE(**{"d": D, "n_features": F, "k": K, **settings})


def test_bad_activations_are_refused() -> None:
    sae = make_sae()
    with pytest.raises(TypeError, match="x must be a floating tensor, got torch.int64"):
        sae(torch.zeros(2, D, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"x must be \[..., {D}\], got \[2, 5\]"):
        sae.init_b_dec_(torch.zeros(2, 5))
