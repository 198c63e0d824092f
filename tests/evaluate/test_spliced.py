# SPDX-License-Identifier: Apache-2.0
"""Spliced cross-entropy on tiny random decoders, against hooks by hand."""

import json
import math

import numpy as np
import pytest
import torch
from decoder_cases import KINDS, hooks_of, tiny

from mikernels.evaluate import Interval, measure_spliced, random_like
from mikernels.nn import BatchTopKSAE, TopKSAE
from mikernels.values import SparseCodes
from mikernels.values.intervals import bootstrap

D, LAYER, SKIP = 24, 1, 1
LOOSE = {"outlier_norm": None, "resamples": 50}


class Identity:
    """A perfect SAE: the activations are its features, but for those that are 0 by hand."""

    def encode(self, x):
        indices = torch.arange(x.shape[1]).expand(x.shape).contiguous()
        return SparseCodes(x, indices, x.shape[1])

    def decode(self, codes):
        return codes.values


class Times(Identity):
    def __init__(self, factor):
        self.factor = factor

    def decode(self, codes):
        return codes.values * self.factor


def windows(n=5, t=9):
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(2, 50, (t,), generator=generator) for _ in range(n)]


def likely(model, n=5, t=9):
    """Windows that the model itself writes: whatever is done to it harms their loss."""
    tokens = torch.stack(windows(n, 2))
    for _ in range(t - 2):
        with torch.no_grad():
            following = model(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1)
        tokens = torch.cat([tokens, following[:, None]], 1)
    return list(tokens)


def by_hand(model, tokens, change):
    """Mean next-token loss of windows `[w, t]` from position SKIP on, and the layer's outputs."""
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    seen = []

    def hook(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        seen.append(x)
        y = torch.cat([x[:, :SKIP], change(x[:, SKIP:])], 1)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    handle = blocks[LAYER].register_forward_hook(hook)
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    handle.remove()
    logp = logits.log_softmax(-1)[:, SKIP:-1]
    picked = logp.gather(-1, tokens[:, SKIP + 1 :, None])
    return -picked.mean().item(), seen[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_sae_gives_the_clean_loss_exactly(kind):
    model = tiny(kind)
    found = measure_spliced(model, LAYER, likely(model), Identity(), **LOOSE)
    assert found.losses["sae"] == found.losses["clean"]
    assert found.recovered == found.recovered_zero == Interval(1.0, 1.0, 1.0)
    assert found.increase == Interval(0.0, 0.0, 0.0)
    assert found.reconstruction.fvu == 0
    assert (found.windows, found.predictions, found.positions) == (5, 35, 40)


@pytest.mark.parametrize("kind", KINDS)
def test_every_run_is_the_hook_by_hand(kind):
    model = tiny(kind)
    tokens = torch.stack(likely(model))
    found = measure_spliced(model, LAYER, list(tokens), Times(0.5), windows_per_forward=2, **LOOSE)
    clean, x = by_hand(model, tokens, lambda x: x)
    mean = x[:, SKIP:].mean((0, 1))
    right = {
        "clean": clean,
        "sae": by_hand(model, tokens, lambda x: 0.5 * x)[0],
        "mean": by_hand(model, tokens, lambda x: mean.expand_as(x))[0],
        "zero": by_hand(model, tokens, torch.zeros_like)[0],
    }
    for name, value in right.items():
        assert found.losses[name] == pytest.approx(value, rel=1e-12), name
    assert len({round(v, 6) for v in found.losses.values()}) == 5
    for name, ablated in (("recovered", "mean"), ("recovered_zero", "zero")):
        loss = right[ablated]
        harm = loss - right["clean"]
        assert harm > 0.01
        value = (loss - right["sae"]) / harm
        assert getattr(found, name).value == pytest.approx(value, rel=1e-9), name
    assert found.increase.value == pytest.approx(right["sae"] - clean, rel=1e-9)
    assert found.by_window.mean(0) == pytest.approx(list(found.losses.values()))


@pytest.mark.parametrize("output", [list, tuple])
def test_what_a_layer_returns_beside_the_stream_stays(output):
    model = tiny("llama")
    block = model.model.layers[LAYER]
    plain = measure_spliced(model, LAYER, windows(), Times(0.5), **LOOSE)
    forward, follow = block.forward, model.model.layers[LAYER + 1].forward
    block.forward = lambda *a, **k: output([forward(*a, **k), "beside"])

    def unpack(x, *a, **k):
        assert type(x) is output and x[1] == "beside"
        return follow(x[0], *a, **k)

    model.model.layers[LAYER + 1].forward = unpack
    found = measure_spliced(model, LAYER, windows(), Times(0.5), **LOOSE)
    assert found.losses == plain.losses


def test_positions_that_training_drops_stay():
    model, tokens = tiny("llama"), torch.stack(windows())
    tokens[0, 3] = tokens[2, 5] = 7
    n_special = int((tokens[:, SKIP:] == 7).sum())
    found = measure_spliced(model, LAYER, list(tokens), Times(0.5), special_ids=[7], **LOOSE)
    assert found.positions == 40 - n_special

    special = (tokens[:, SKIP:] == 7)[..., None]
    right, x = by_hand(model, tokens, lambda x: torch.where(special, x, 0.5 * x))
    assert found.losses["sae"] == pytest.approx(right, rel=1e-12)
    norms = x.norm(dim=-1)
    limit = 1.05
    few = measure_spliced(model, LAYER, list(tokens), Times(0.5), outlier_norm=limit, resamples=9)
    kept = norms <= limit * norms.float().median(-1, keepdim=True).values
    assert 0 < few.positions == int(kept[:, SKIP:].sum()) < 40
    right, _ = by_hand(model, tokens, lambda x: torch.where(kept[:, SKIP:, None], 0.5 * x, x))
    assert few.losses["sae"] == pytest.approx(right, rel=1e-12)


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_as_before(fail):
    model = tiny("gpt2").train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    before = {name: p.clone() for name, p in model.state_dict().items()}

    class Fails(Identity):
        def decode(self, codes):
            assert not model.training
            if fail:
                raise KeyError("no such thing")
            return codes.values

    if fail:
        with pytest.raises(KeyError, match="no such thing"):
            measure_spliced(model, LAYER, windows(), Fails(), **LOOSE)
    else:
        measure_spliced(model, LAYER, windows(), Fails(), **LOOSE)
    assert hooks_of(model) == 0
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_nothing_is_recovered_where_ablation_does_no_harm():
    model = tiny("llama")
    with torch.no_grad():  # nothing reads the stream
        model.lm_head.weight.zero_()
    found = measure_spliced(model, LAYER, windows(), Times(0.5), **LOOSE)
    assert list(found.losses.values()) == pytest.approx([math.log(50)] * 5)
    assert math.isnan(found.recovered.value) and not found.told_apart
    assert found.to_dict()["recovered"] == {"value": None, "low": None, "high": None}


def test_windows_of_several_lengths_and_the_progress():
    model, seen = tiny("llama"), []
    given = [*windows(3), *windows(2, 6)]
    found = measure_spliced(
        model, LAYER, given, Times(0.9), windows_per_forward=2, progress=seen.append, **LOOSE
    )
    assert sum(seen) == 5 * (27 + 12) and found.predictions == 3 * 7 + 2 * 4
    alone = [measure_spliced(model, LAYER, [w], Identity(), **LOOSE).losses["clean"] for w in given]
    assert found.by_window[:, 0] == pytest.approx(alone, rel=1e-12)
    weights = np.array([7, 7, 7, 4, 4])
    assert found.losses["clean"] == pytest.approx(float(weights @ alone) / weights.sum(), rel=1e-12)


def test_one_seed_gives_one_result():
    model, sae = tiny("llama", torch.float32), TopKSAE(D, 60, 4)
    first, second = (measure_spliced(model, LAYER, windows(), sae, **LOOSE) for _ in range(2))
    assert first.to_dict() == second.to_dict()
    other = measure_spliced(model, LAYER, windows(), sae, seed=1, **LOOSE)
    assert other.losses["random"] != first.losses["random"]
    assert other.losses["sae"] == first.losses["sae"]
    text = json.dumps(first.to_dict(), allow_nan=False)
    assert json.loads(text)["random_reconstruction"]["l0"] == 4


@pytest.mark.parametrize("kind", [TopKSAE, BatchTopKSAE])
def test_the_random_sae_is_like_the_trained_one(kind):
    x = torch.randn(500, D) * 3 + 5
    sae = kind(D, 200, 6, dtype=torch.float32)
    with torch.no_grad():
        sae.w_enc.mul_(7)
    twin = random_like(sae, x, x.mean(0), seed=3)
    assert type(twin) is kind and twin.config == sae.config
    assert torch.equal(twin.b_dec, x.mean(0)) and not torch.equal(twin.w_dec, sae.w_dec)
    assert float(twin.encode(x).l0().float().mean()) == pytest.approx(6, abs=0.05)
    assert torch.equal(random_like(sae, x, x.mean(0), seed=3).w_dec, twin.w_dec)
    # and of another library's, by what it does
    foreign = random_like(Identity(), x, x.mean(0))
    assert type(foreign) is TopKSAE and (foreign.config.n_features, foreign.k) == (D, D)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"windows": []}, ValueError, "at least one window of tokens, got none"),
        ({"windows": [torch.tensor([3, 4])]}, ValueError, r"t at least 3 .* got torch.int64 \[2\]"),
        ({"windows": [torch.randn(5)]}, ValueError, "must each hold token ids"),
        ({"layer": 3}, IndexError, r"layer must be in 0\.\.2"),
        ({"layer": "lm_head"}, ValueError, "width"),
        ({"sae": TopKSAE(8, 16, 2)}, ValueError, "sae must be of width 24 like layer 1"),
        ({"special_ids": range(50)}, ValueError, "windows must hold a position to replace"),
        ({"skip_first": -1}, ValueError, "skip_first must be at least 0"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    model = tiny("llama", torch.float32)
    given = {"layer": LAYER, "windows": windows(), "sae": TopKSAE(D, 30, 2), **change}
    with pytest.raises(error, match=f"^measure_spliced: .*{message}"):
        measure_spliced(model, **given)
    assert hooks_of(model) == 0


def test_a_model_without_logits_is_refused():
    with pytest.raises(ValueError, match="must return logits for every token, got BaseModelOutput"):
        measure_spliced(tiny("llama").model, LAYER, windows(), Identity())


def test_an_sae_that_returns_nan_is_refused():
    with pytest.raises(ValueError, match="must be finite"):
        measure_spliced(tiny("llama"), LAYER, windows(), Times(math.nan), **LOOSE)


def test_the_interval_of_a_mean_is_the_normal_one():
    units = np.random.default_rng(0).normal(size=(400, 1)) + 2
    found = bootstrap(lambda s: s[..., 0].mean(-1), units, 4000)
    half = 1.96 * units.std() / 20
    assert found.value == pytest.approx(units.mean())
    assert found.low == pytest.approx(found.value - half, abs=half / 10)
    assert found.high == pytest.approx(found.value + half, abs=half / 10)
    assert found == bootstrap(lambda s: s[..., 0].mean(-1), units, 4000)


def test_intervals_that_touch_are_not_told_apart():
    low, high = Interval(0.1, 0.0, 0.2), Interval(0.4, 0.3, 0.5)
    assert low.told_apart(high) and high.told_apart(low)
    assert not low.told_apart(Interval(0.3, 0.2, 0.4))
    one = bootstrap(lambda s: s[..., 0].mean(-1), np.ones((1, 1)))
    assert math.isnan(one.low) and not one.told_apart(high)
    assert one.to_dict() == {"value": 1.0, "low": None, "high": None}
