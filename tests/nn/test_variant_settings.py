# SPDX-License-Identifier: Apache-2.0
"""What each variant is by its own equation, and what it refuses."""

import math

import pytest
import torch
from oracle import randn
from variants import BATCH, D, F, activations, batch_of, make, source_of, train

from mikernels.activations import TensorSource
from mikernels.nn import (
    Crosscoder,
    CrossLayerTranscoder,
    GatedSAE,
    JumpReLUSAE,
    LISTAMatryoshkaSAE,
    MatryoshkaSAE,
    ReLUSAE,
    SkipTranscoder,
    Transcoder,
)
from mikernels.training import TrainConfig, Trainer
from mikernels.values.batch import Batch

WIDE = dict(d=D, n_features=F)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (MatryoshkaSAE, {"k": 4, "widths": (8, 24)}, r"widths must ascend .* to n_features = 96"),
        (MatryoshkaSAE, {"k": 4, "widths": (24, 8, F)}, r"widths must ascend .*got \[24, 8, 96\]"),
        (MatryoshkaSAE, {"k": 4, "widths": ()}, r"widths must ascend .*got \[\]"),
        (MatryoshkaSAE, {"k": 4, "widths": (0, F)}, r"widths must ascend .*got \[0, 96\]"),
        (MatryoshkaSAE, {"k": 9, "widths": (8, F)}, "k must be at most the first level's width, 8"),
        (MatryoshkaSAE, {"k": 4, "widths": (8, F), "level_weights": (1,)}, "must be 2 numbers"),
        (MatryoshkaSAE, {"k": 4, "frequency_rate": 0}, "frequency_rate must be above 0"),
        (LISTAMatryoshkaSAE, {"k": 4, "iterations": 0}, "iterations must be at least 1, got 0"),
        (LISTAMatryoshkaSAE, {"k": 4, "eta": math.nan}, "eta must be above 0, got nan"),
        (JumpReLUSAE, {}, "target_l0 must be a number with sparsity='quadratic', got None"),
        (JumpReLUSAE, {"target_l0": 97}, "target_l0 must be above 0, at most 96, got 97"),
        (JumpReLUSAE, {"target_l0": 4, "bandwidth": 0}, "bandwidth must be above 0, got 0"),
        (JumpReLUSAE, {"target_l0": 4, "sparsity": "l1"}, "sparsity must be one of .*got 'l1'"),
        (GatedSAE, {"l1_coefficient": -1.0}, "l1_coefficient must be at least 0, got -1.0"),
        (GatedSAE, {"frozen_decoder": 1}, "frozen_decoder must be True or False, got 1"),
        (ReLUSAE, {"l0_scale": "a"}, "l0_scale must be a number, got 'a'"),
        (Transcoder, {"k": 4, "d_out": 0}, "d_out must be at least 1, got 0"),
        (SkipTranscoder, {"k": 4, "d_out": 1.5}, "d_out must be an int, got 1.5"),
        (Crosscoder, {"k": 4}, "n_layers must be given"),
        (Crosscoder, {"k": 4, "n_layers": 3}, "d must be 3 .* layers of one width, got 16"),
        (CrossLayerTranscoder, {"k": 4, "n_layers": 4, "d_out": 10}, "d_out must be 4 .* got 10"),
        (
            CrossLayerTranscoder,
            {"k": 4, "n_layers": 4, "normalize_decoder": True},
            "normalize_decoder must be False",
        ),
    ],
)
def test_bad_settings_are_refused(kind, settings, message) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{kind.__name__}: .*{message}"):
        kind(**WIDE, **settings)


@pytest.mark.parametrize("name", ["transcoder", "skip_transcoder", "cross_layer_transcoder"])
def test_without_a_target_a_transcoder_is_refused_before_work(name) -> None:
    sae = make(name, d_out=D)
    before = {key: t.clone() for key, t in sae.state_dict().items()}
    config = TrainConfig(total_tokens=2 * BATCH, batch_size=BATCH)
    trainer = Trainer(sae, TensorSource(activations(), BATCH), config, quiet=True)
    with pytest.raises(ValueError, match=r"batch 1 must be a Batch with a target \[batch, "):
        trainer.run()
    assert all(torch.equal(t, sae.state_dict()[key]) for key, t in before.items())
    with pytest.raises(ValueError, match="x must be a Batch with a target"):
        sae(activations(10))


def test_targets_of_another_width_are_refused() -> None:
    sae = make("transcoder")
    source = source_of(sae)
    wrong = Transcoder(D, F, 4, d_out=7)
    config = TrainConfig(total_tokens=2 * BATCH, batch_size=BATCH)
    with pytest.raises(ValueError, match="source.d_out must be the SAE's d_out = 7, got 20"):
        Trainer(wrong, source, config, quiet=True)

    class Silent:
        d, next_batch, state_dict = D, source.next_batch, source.state_dict

    with pytest.raises(ValueError, match=r"target of batch 1 must be \[batch, 7\].*got \[64, 20\]"):
        Trainer(wrong, Silent(), config, quiet=True).run()


@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_a_threshold_that_is_negative_or_nan_is_refused(value) -> None:
    sae = make("jumprelu")
    with torch.no_grad():
        sae.threshold[5] = value
    for call in (sae.encode, sae.select, sae.slots):
        with pytest.raises(ValueError, match="threshold must be at least 0, got .* for feature 5"):
            call(activations(4))
    if value == value:
        sae.project_()
        sae.encode(activations(4))


def test_thresholds_stay_at_least_0_in_training() -> None:
    sae = make("jumprelu, step", initial_l0=F / 2)
    with torch.no_grad():
        sae.threshold.fill_(1e-3)
    train(sae, lr=0.1)
    assert (sae.threshold >= 0).all() and (sae.threshold == 0).any()


def test_jumprelu_is_its_equation() -> None:
    sae = make("jumprelu")
    with torch.no_grad():
        sae.threshold.copy_(randn(F, seed=3).abs())
    x = activations(40)
    h = (x - sae.b_dec) @ sae.w_enc.T + sae.b_enc
    torch.testing.assert_close(sae.encode(x).to_dense(), h.where(h > sae.threshold, 0))
    torch.testing.assert_close(sae.select(x).to_dense(), h.where(h > sae.threshold, 0))


@pytest.mark.parametrize("name", ["jumprelu", "relu", "gated"])
def test_training_starts_with_the_initial_l0(name) -> None:
    sae = make(name, initial_l0=5)
    batch = batch_of(sae, 200)
    sae.prepare_(batch, True)
    assert float(sae.select(batch.input).l0().double().mean()) == pytest.approx(5, abs=0.05)
    assert make(name).select(batch.input).l0().double().mean() > F / 4


def test_quadratic_jumprelu_reaches_its_target() -> None:
    sae = make("jumprelu", target_l0=6.0, bandwidth=1.0, aux_coefficient=0.0)
    _, history = train(sae, steps=400, lr=1e-2)
    assert history.column("l0")[-1] == pytest.approx(6, abs=1)


def test_gated_is_its_equation() -> None:
    sae = make("gated")
    with torch.no_grad():
        for seed, p in enumerate((sae.b_enc, sae.r_mag, sae.b_mag)):
            p.copy_(0.3 * randn(F, seed=seed))
    x = activations(40)
    s = (x - sae.b_dec) @ sae.w_enc.T
    expected = (s * sae.r_mag.exp() + sae.b_mag).relu() * (s + sae.b_enc > 0)
    torch.testing.assert_close(sae.encode(x).to_dense(), expected)


def test_matryoshka_levels_are_prefixes() -> None:
    sae = make("matryoshka")
    codes = sae.select(activations(30))
    dense = codes.to_dense()
    for width, y in zip(sae.config.widths, sae.decode_levels(codes), strict=True):
        expected = dense[:, :width] @ sae.w_dec[:width] + sae.b_dec
        torch.testing.assert_close(y, expected)


def test_levels_by_frequency_hold_the_most_frequent_first() -> None:
    sae = make("matryoshka, detached, by frequency")
    train(sae, steps=3)
    order = sae.frequency.argsort(descending=True)
    levels = sae.level_of()[order]
    assert (levels.diff() >= 0).all() and (levels == 0).sum() == sae.config.widths[0]


def test_lista_without_a_step_is_matryoshka_and_refines_with_one() -> None:
    sae = make("lista_matryoshka", eta=0.5)
    x = activations(30)
    first = MatryoshkaSAE.slots(sae, x)
    start = x - sae.b_dec
    again = start + 0.5 * (start - first.to_dense() @ sae.w_dec)
    h = again @ sae.w_enc.T + sae.b_enc
    best = h.relu().flatten().topk(int(4 * 30))
    expected = torch.zeros(30 * F).scatter(0, best.indices, best.values).view(30, F)
    torch.testing.assert_close(sae.select(x).to_dense(), expected)


def test_skip_transcoder_starts_as_its_linear_part_alone() -> None:
    sae = make("skip_transcoder")
    batch = batch_of(sae)
    with torch.no_grad():
        sae.w_skip.copy_(randn(*sae.w_skip.shape))
    torch.testing.assert_close(sae(batch).reconstruction, batch.input @ sae.w_skip.T + sae.b_dec)
    torch.testing.assert_close(sae.reconstruct(batch.input), batch.input @ sae.w_skip.T + sae.b_dec)


def test_crosscoder_layers_count_alike_whatever_their_norm() -> None:
    sae = make("crosscoder")
    batch = batch_of(sae)
    uneven = batch.input * torch.tensor([1.0, 64.0, 0.25, 8.0]).repeat_interleave(D // 4)
    sae.prepare_(Batch(uneven), True)
    norms = sae.in_units(Batch(uneven)).input.reshape(BATCH, 4, -1).norm(dim=-1).mean(0)
    ideal = math.sqrt(D // 4)
    assert (norms > ideal / 2).all() and (norms < ideal * 2).all()
    y = sae(Batch(uneven)).reconstruction
    codes = sae.select(sae.in_units(Batch(uneven)).input)
    torch.testing.assert_close(sae.decode(codes), y)
    assert sae.layer_norms().shape == (F, 4)
    torch.testing.assert_close(sae.layer_norms().square().sum(-1), torch.ones(F))


def test_cross_layer_decoders_write_forward_only_and_lie_without_a_hole() -> None:
    sae = make("cross_layer_transcoder")
    count, out = 4, 3
    assert sae.w_dec.numel() == F * out * count * (count + 1) // 2
    with torch.no_grad():
        sae.w_dec.copy_(randn(sae.w_dec.numel()))
    codes = sae.encode(activations(10))
    y = sae.decode(codes).detach()
    dense = codes.to_dense().reshape(10, count, F)
    for layer in range(count):
        expected = torch.zeros(10, out)
        for source in range(layer + 1):
            first = (layer - source) * out
            expected += dense[:, source] @ sae.decoder(source)[:, first : first + out]
        torch.testing.assert_close(y[:, layer * out : (layer + 1) * out], expected)
    views = [sae.decoder(layer) for layer in range(count)]
    assert all(
        v.untyped_storage().data_ptr() == views[0].untyped_storage().data_ptr() for v in views
    )
    train(sae)
    assert sae.layer_fvu(batch_of(sae)).shape == (count,)
