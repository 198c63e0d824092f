# SPDX-License-Identifier: Apache-2.0
"""Co-activation against dense matrices of all pairs."""

import numpy as np
import pytest
import torch
from decoder_cases import IDS, ROWS, hooks_of, padded, parts, tiny
from lens_cases import lens

from mikernels import SparseCodes
from mikernels.circuits import coactivation, neuron_activations
from mikernels.circuits.features import coactive as room

N, F = 150, 90


def activations(seed=0):
    """Sparse, of both signs, with features that are never active and pairs that cancel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, F, generator=generator, dtype=torch.float64)
    x *= torch.rand(N, F, generator=generator) < 0.15
    x[:, 10:13] = 0
    x[:, 20] = 2 * x[:, 5]
    x[:, 30:32] = 0
    x[0, 30:32], x[1, 30], x[1, 31] = 1, 1, -1
    return x


def matrices(x):
    """`[F, F]` of each measure, and of counts."""
    g, active = x.T @ x, (x != 0).double()
    c, n = active.T @ active, c_of(active)
    m = x.mean(0)
    s = (g.diagonal() / N - m**2).sqrt()
    return c, {
        "cosine": g / (g.diagonal()[:, None] * g.diagonal()).sqrt(),
        "correlation": (g / N - m[:, None] * m) / (s[:, None] * s),
        "product": g,
        "jaccard": c / (n[:, None] + n - c),
        "pmi": (N * c / (n[:, None] * n)).log(),
    }


def c_of(active):
    return active.sum(0)


@pytest.mark.parametrize("form", ["padded", "ragged", "batches"])
def test_strongest_pairs_are_those_of_the_whole_matrix(form, monkeypatch):
    x = activations()
    codes = SparseCodes.from_dense(x)
    if form == "ragged":
        tokens, features = x.nonzero(as_tuple=True)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (x != 0).sum(1).cumsum(0)])
        codes = SparseCodes.ragged(x[tokens, features], features, offsets, F)
        # several blocks of g
        monkeypatch.setattr(room, "BLOCK", 700)
    if form == "batches":
        codes = (SparseCodes.from_dense(part[:, None]) for part in x.split(60))
        codes = list(codes)
    c, measures = matrices(x)
    rows, cols = torch.triu_indices(F, F, 1)
    for by, matrix in measures.items():
        for least in (1, 3):
            found = coactivation(codes, k=40, by=by, least=least)
            allowed = c[rows, cols] >= least
            i, j = rows[allowed].numpy(), cols[allowed].numpy()
            scores = matrix[i, j].numpy()
            order = np.lexsort((j, i, -scores.round(10)))[:40]
            got = np.array([p.score for p in found.pairs])
            np.testing.assert_allclose(got, scores[order], rtol=1e-9, atol=1e-12)
            for p in found.pairs:
                assert p.first < p.second and p.together == c[p.first, p.second] >= least
                assert p.score == pytest.approx(float(matrix[p.first, p.second]), abs=1e-12)
            if by == "cosine":
                assert (5, 20) in {p[:2] for p in found.pairs}
        everything = coactivation(codes, k=10_000, by=by, least=1)
        assert len(everything.pairs) == int((c[rows, cols] > 0).sum())
    assert found.features.tolist() == [f for f in range(F) if f not in (10, 11, 12)]
    assert found.counts.tolist() == (x != 0).sum(0)[found.features].tolist()
    torch.testing.assert_close(found.means, x.mean(0)[found.features])
    assert f"87 of 90 features are active on {N} tokens" in str(found)


def test_groups_are_connected_components():
    x = torch.zeros(40, 8, dtype=torch.float64)
    x[:10, [1, 2]] = 1
    x[8:18, [2, 5]] = 1
    x[20:30, [0, 7]] = 1
    x[35, 3] = 1
    found = coactivation(SparseCodes.from_dense(x), k=100)
    assert found.groups == ((1, 2, 5), (0, 7))
    assert coactivation(SparseCodes.from_dense(x[35:36])).groups == ()
    nothing = coactivation(SparseCodes.from_dense(x[36:]))
    assert nothing.pairs == () and "0 of 8 features are active on 4 tokens" in str(nothing)
    with pytest.raises(ValueError, match="components: features must be .* got none"):
        nothing.components()
    x[:4, 4:6], x[1:3, 4] = 1, -1
    cancelled = coactivation(SparseCodes.from_dense(x[:, 4:6]), by="product")
    assert cancelled.pairs == ((0, 1, 0.0, 4),)


@pytest.mark.parametrize("dense", [False, True])
def test_components_are_the_eigenvectors_of_the_covariance(dense):
    x = activations(1)
    found = coactivation(x if dense else SparseCodes.from_dense(x))
    for features in (None, (40, 5, 20, 33)):
        own = found.features.tolist() if features is None else list(features)
        centred = x[:, own] - x[:, own].mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / N)
        components = found.components(4, features)
        assert components.features.tolist() == own
        torch.testing.assert_close(components.variances, values.flip(0)[:4])
        assert components.total == pytest.approx(float(values.sum()))
        torch.testing.assert_close(components.explained, (values.flip(0) / values.sum())[:4])
        same = (components.directions @ vectors.flip(1)[:, :4]).abs()
        torch.testing.assert_close(same, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)
        for number, row in enumerate(components.directions):
            best = int(row.abs().argmax())
            assert row[best] > 0
            assert components.group(number, 2)[0] == (own[best], pytest.approx(float(row[best])))
    again = found.components(4).directions
    assert torch.equal(again, found.components(4).directions)
    for bad in ((), (10,), (5, 5)):
        with pytest.raises(ValueError, match="components: features must be different ones"):
            found.components(2, bad)
    with pytest.raises(ValueError, match="components: r must be at least 1"):
        found.components(0)


def test_dense_activations_by_pairwise_topk():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, 30, generator=generator, dtype=torch.float64) + 0.5
    x[:, 7] = 0
    x[:, 9] = 4 - 3 * x[:, 3]
    _, measures = matrices(x)
    rows, cols = torch.triu_indices(30, 30, 1)
    for by in ("cosine", "correlation", "product"):
        found = coactivation(x, by=by, k=25)
        scores = measures[by][rows, cols].nan_to_num(-9).sort(descending=True).values[:25]
        torch.testing.assert_close(torch.tensor([p.score for p in found.pairs]), scores.float())
        assert found.pairs[0].together == N
    for by in ("jaccard", "pmi"):
        with pytest.raises(ValueError, match="for dense activations, got"):
            coactivation(x, by=by)


def test_neurons_are_what_the_last_product_reads():
    for kind in ("llama", "gpt2", "opt"):
        model = tiny(kind, **({"ffn_dim": 40, "word_embed_proj_dim": 24} if kind == "opt" else {}))
        before = hooks_of(model)
        found = neuron_activations(model, IDS, 1, batch_size=1)
        if kind == "opt":
            last = model.model.decoder.layers[1].fc2
        else:
            mlp = parts(model, 1)[2]
            last = mlp.c_proj if kind == "gpt2" else mlp.down_proj
        seen = []
        hook = last.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(IDS)
        hook.remove()
        width = 96 if kind == "gpt2" else 40
        torch.testing.assert_close(found, seen[0].reshape(10, width).detach())
        assert hooks_of(model) == before
    whole = neuron_activations(tiny("llama"), padded("mixed"), 1)
    each = [neuron_activations(tiny("llama"), torch.tensor([row]), 1) for row in ROWS]
    torch.testing.assert_close(whole, torch.cat(each))
    hooked = lens("llama")
    _, cache = hooked.run_with_cache(IDS)
    torch.testing.assert_close(
        neuron_activations(hooked, IDS, 1), cache["blocks.1.mlp.hook_post"].flatten(0, 1).detach()
    )
    experts = tiny("mixtral", num_key_value_heads=2, _experts_implementation="eager")
    with pytest.raises(ValueError, match="does not end in a product of one matrix"):
        neuron_activations(experts, IDS, 1)
    for layer in (3, -1, True):
        with pytest.raises(ValueError, match=r"neuron_activations: layer must be in 0\.\.2"):
            neuron_activations(tiny("llama"), IDS, layer)


def test_what_cannot_be_counted_is_refused():
    x = activations()
    codes = SparseCodes.from_dense(x)
    for bad, error, message in (
        ("codes", TypeError, "codes must be SparseCodes"),
        (x.int(), TypeError, "got torch.int32"),
        (x[0], TypeError, r"got torch.float64 \[90\]"),
        ([codes, x], ValueError, "of one kind"),
        ([codes, SparseCodes.from_dense(x[:, :50])], ValueError, r"got widths \[50, 90\]"),
        ([], ValueError, "of one kind"),
        (x / 0, ValueError, "codes must be finite"),
    ):
        with pytest.raises(error, match=f"coactivation: .*{message}"):
            coactivation(bad)
    for options in ({"k": 0}, {"least": 0}, {"by": "lift"}):
        with pytest.raises(ValueError, match=f"coactivation: {next(iter(options))} must be"):
            coactivation(codes, **options)
