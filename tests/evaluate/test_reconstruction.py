# SPDX-License-Identifier: Apache-2.0
"""The reconstruction judge against sums over dense activations in float64."""

import math

import pytest
import torch

from mikernels.evaluate import (
    as_judged,
    measure_reconstruction,
    measure_spliced,
    variance_unexplained,
)
from mikernels.nn import BatchTopKSAE, TopKSAE, Transcoder
from mikernels.values import Batch, SparseCodes

D, F, N = 6, 20, 700


class Dense(torch.nn.Module):
    """An SAE as other libraries have it."""

    def __init__(self, sae):
        super().__init__()
        self.inner = sae
        self.seen = []

    def encode(self, x):
        self.seen.append((len(x), self.training))
        return self.inner.encode(x).to_dense()

    def decode(self, acts):
        return acts @ self.inner.w_dec + self.inner.b_dec


def made(kind=TopKSAE, k=3):
    sae = kind(D, F, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        sae.b_enc[4] = -1e3  # never fires
        sae.b_dec.copy_(torch.arange(D) / 4)
    return sae


def rows(n=N):
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 1


def expected(sae, batch):
    """By the equations, over whole matrices."""
    codes = sae.encode(batch.input)
    dense, t = codes.to_dense(), batch.output
    y = dense @ sae.w_dec + sae.b_dec
    w = torch.ones(len(t), dtype=torch.float64) if batch.weights is None else batch.weights
    share = w / w.sum()
    error = (y - t).square().sum(-1)
    lengths, made_ = t.norm(dim=-1), y.norm(dim=-1)
    active = (dense != 0).double()
    return {
        "fvu": (w @ error) / (w @ (t - share @ t).square().sum(-1)),
        "mse": share @ error,
        "cosine": share @ torch.cosine_similarity(y, t, eps=0),
        "norm_ratio": share @ (made_ / lengths),
        "l0": share @ active.sum(-1),
        "density": share @ active,
    }


@pytest.mark.parametrize("kind", [TopKSAE, BatchTopKSAE])
@pytest.mark.parametrize("form", ["rows", "target", "weights", "both"])
def test_numbers_are_those_of_the_equations(kind, form):
    sae, x = made(kind), rows()
    generator = torch.Generator().manual_seed(3)
    target = (
        (x * 2 + torch.randn(N, D, generator=generator)) if form in ("target", "both") else None
    )
    weights = torch.rand(N, generator=generator).double() if form in ("weights", "both") else None
    batch = Batch(x, target, weights)
    with torch.no_grad():
        found, right = measure_reconstruction(sae, batch, 64), expected(sae, batch)
    for name, value in right.items():
        got = torch.as_tensor(getattr(found, name), dtype=torch.float64)
        torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-14)
    assert found.tokens == N and found.n_features == F
    assert found.weight == pytest.approx(N if weights is None else float(weights.sum()))
    dead = (right["density"] == 0).nonzero().flatten().tolist()
    assert 4 in dead and found.dead == len(dead) and found.dead_fraction == len(dead) / F
    assert found.fvu > 0.01  # there is an error to measure


def test_batches_give_the_sums_of_all_rows():
    sae, x = made(), rows()
    whole = measure_reconstruction(sae, x)
    parts = measure_reconstruction(sae, (Batch(p) for p in x.split([1, 0, 300, N - 301])))
    for name in ("fvu", "mse", "cosine", "norm_ratio", "l0"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-13), name
    assert torch.equal(parts.density, whole.density)
    assert parts.l0_quantiles == whole.l0_quantiles


def test_a_mean_far_from_zero_costs_no_digits():
    sae, x = made(), rows()
    right = measure_reconstruction(sae, x).fvu
    with torch.no_grad():
        sae.b_dec.add_(2.0**20)
    # in steps that a float64 holds exactly
    moved = ((x * 2**20).round() / 2**20) + 2.0**20
    assert measure_reconstruction(sae, moved, 50).fvu == pytest.approx(right, rel=1e-5)


def test_quantiles_of_l0_and_histogram_of_densities():
    class Counts:
        """Feature f is active on the tokens whose number x[0] is below 1000 / 10^f."""

        def encode(self, x):
            n, features = len(x), torch.arange(4)
            active = x[:, :1] < 1000 / 10.0**features
            return SparseCodes(active.float(), features.expand(n, 4).contiguous(), 4 + 1)

        def decode(self, codes):
            return torch.zeros(len(codes), 2)

    x = torch.stack([torch.arange(1000.0), torch.randn(1000)], -1)
    found = measure_reconstruction(Counts(), [Batch(x)])
    assert found.density.tolist() == [1.0, 0.1, 0.01, 0.001, 0]
    assert found.l0_quantiles == {0.05: 1, 0.25: 1, 0.5: 1, 0.75: 1, 0.95: 2}
    assert (found.l0, found.dead, found.norm_ratio, found.cosine) == (1.111, 1, 0.0, 0.0)
    bins = {low: n for low, high, n in found.density_histogram if high == low + 0.5}
    assert bins == {-3.0: 1, -2.5: 0, -2.0: 1, -1.5: 0, -1.0: 1, -0.5: 1}
    assert found.fvu == pytest.approx(float(x.square().sum() / (x - x.mean(0)).square().sum()))


def test_weights_of_zero_are_rows_that_are_not_there():
    sae, x = made(), rows()
    kept = torch.arange(N) % 3 > 0
    found = measure_reconstruction(sae, Batch(x, weights=kept.double()), 100)
    right = measure_reconstruction(sae, x[kept])
    assert found.tokens == right.tokens == int(kept.sum())
    assert found.fvu == pytest.approx(right.fvu, rel=1e-13)
    torch.testing.assert_close(found.density, right.density, rtol=1e-14, atol=0)
    assert found.l0_quantiles == right.l0_quantiles


def test_a_dense_sae_is_judged_as_the_sparse_one():
    sae, x = made(), rows(1500)
    foreign = Dense(sae)
    foreign.train()
    found, right = measure_reconstruction(foreign, x), measure_reconstruction(sae, x)
    for name in ("fvu", "mse", "cosine", "norm_ratio", "l0"):
        assert getattr(found, name) == pytest.approx(getattr(right, name), rel=1e-12), name
    assert torch.equal(found.density, right.density)
    # in parts, in eval mode, and left in training mode
    assert [n for n, _ in foreign.seen] == [512, 512, 476]
    assert not any(mode for _, mode in foreign.seen) and foreign.training


def test_codes_of_a_dense_sae_are_its_activations():
    judged, x = as_judged(Dense(made())), rows(40)
    codes = judged.encode(x)
    assert codes.is_ragged and torch.equal(codes.to_dense(), made().encode(x).to_dense())
    assert as_judged(judged) is judged and as_judged(sae := made()) is sae


def test_to_dict_is_json_able():
    import json

    found = json.loads(json.dumps(measure_reconstruction(made(), rows()).to_dict()))
    assert found["l0_quantiles"]["0.5"] == 3 and "density" not in found


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, D), "x must have at least one row"),
        ([], "x must have at least one row"),
        (Batch(torch.randn(5, D), weights=torch.zeros(5)), "at least one row"),
        (torch.ones(5, D), "rows of x must differ"),
        (torch.randn(5, D + 1), f"sae must be of width {D + 1} like x, got one of width {D}"),
        (torch.randn(5, 2, D), r"x must be floating \[n, d\]"),
        (torch.ones(5, D, dtype=torch.int64), "x must be floating"),
        (torch.tensor([[math.nan] * D, [1.0] * D]), "x must be finite"),
        (Batch(torch.randn(5, D), torch.randn(5, 2)), r"must be \[5, 2\] like what they are"),
        (Batch(torch.randn(5, D), weights=-torch.ones(5)), r"weights must be \[5\], finite"),
        (Batch(torch.randn(5, D), weights=torch.ones(4)), r"weights must be \[5\], finite"),
    ],
)
def test_bad_rows_are_refused(x, message):
    with pytest.raises(ValueError, match=f"^measure_reconstruction: .*{message}"):
        measure_reconstruction(made(), x)


def test_objects_that_are_no_sae_are_refused():
    with pytest.raises(TypeError, match="must have encode and decode, got Linear without encode"):
        measure_reconstruction(torch.nn.Linear(2, 2), rows())

    class Wrong:
        def encode(self, x):
            return x[:1]

        def decode(self, acts):
            return acts

    with pytest.raises(TypeError, match=r"encode of Wrong must return activations \[700, F\]"):
        as_judged(Wrong()).encode(rows())


def test_variance_unexplained_is_the_fvu():
    sae, x = made(), rows()
    assert variance_unexplained(sae, x, 64) == measure_reconstruction(sae, x, 64).fvu
    with pytest.raises(ValueError, match="variance_unexplained: x must be .* two rows"):
        variance_unexplained(sae, x[:1])
    with pytest.raises(ValueError, match="variance_unexplained: rows of x must differ"):
        variance_unexplained(sae, x[:1].expand(5, -1))


@pytest.mark.peers
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_an_sae_of_saelens_is_judged_as_it_stands(normalize):
    sae_lens = pytest.importorskip("sae_lens")
    config = sae_lens.StandardSAEConfig(d_in=D, d_sae=F, normalize_activations=normalize)
    sae, x = sae_lens.StandardSAE(config), rows().float()
    found = measure_reconstruction(sae, x)
    with torch.no_grad():
        # decode undoes the norms that the last encode saw
        right = (sae(x) - x).double().square().sum() / (x - x.mean(0)).double().square().sum()
    assert found.fvu == pytest.approx(float(right), rel=1e-5)
    assert found.l0 == pytest.approx(float((sae.encode(x) != 0).sum(-1).float().mean()), rel=1e-6)


def test_a_transcoder_is_never_compared_with_its_own_input():
    torch.manual_seed(0)
    x, y = torch.randn(2, 40, 8).unbind()
    sae = Transcoder(8, 16, 3)
    assert measure_reconstruction(sae, Batch(x, y)).tokens == 40
    with pytest.raises(ValueError, match="the target that it has learned"):
        measure_reconstruction(sae, x)
    with pytest.raises(ValueError, match="the target that it has learned"):
        measure_spliced(torch.nn.Identity(), 0, [torch.zeros(4, dtype=torch.int64)], sae)
