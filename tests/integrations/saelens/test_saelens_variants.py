# SPDX-License-Identifier: Apache-2.0
"""What each variant is written as, and that it comes back as it was."""

import json

import oracle
import pytest
import torch
from saelens_cases import D_OUT, THRESHOLD, VARIANTS, WIDTHS, D, F, K, make, peer_config
from safetensors.torch import load_file

from mikernels.integrations.saelens import export_sae, load_sae
from mikernels.integrations.saelens.form import ARCHITECTURES
from mikernels.nn import ARCHITECTURES as OURS
from mikernels.nn import (
    SAE,
    BatchTopKSAE,
    Crosscoder,
    CrossLayerTranscoder,
    JumpReLUSAE,
    LISTAMatryoshkaSAE,
    MatryoshkaSAE,
    Transcoder,
)

TENSORS = {
    "topk": {"b_enc"},
    "standard": {"b_enc"},
    "jumprelu": {"b_enc", "threshold"},
    "gated": {"b_gate", "r_mag", "b_mag"},
    "jumprelu_transcoder": {"b_enc", "threshold"},
    "jumprelu_skip_transcoder": {"b_enc", "threshold", "W_skip"},
    "transcoder": {"b_enc"},
    "skip_transcoder": {"b_enc", "W_skip"},
}
COUNTED = ("tokens_since_fired", "frequency")


def test_every_variant_is_written_or_known_to_be_none_of_theirs():
    without = {"lista_matryoshka", "crosscoder", "cross_layer_transcoder"}
    assert set(ARCHITECTURES) == set(OURS) - without
    assert {kind.architecture for kind, _, _ in VARIANTS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_format(tmp_path, name):
    sae, architecture = make(name), VARIANTS[name][2]
    folder = export_sae(
        sae,
        tmp_path / "a" / "b",
        model_name="gpt2-small",
        hook_name="blocks.6.hook_resid_post",
        metadata={"context_size": 128},
    )
    config = json.loads((folder / "cfg.json").read_text())
    version = config["metadata"].pop("mikernels_version")
    assert version.count(".") >= 1
    settings = config["metadata"].pop("mikernels_sae")
    assert settings.pop("architecture") == sae.architecture
    assert settings == json.loads(json.dumps(sae.config.to_dict()))
    expected = peer_config(
        architecture,
        metadata={
            "sae_lens_version": "6.54.12",
            "sae_lens_training_version": None,
            "model_name": "gpt2-small",
            "hook_name": "blocks.6.hook_resid_post",
            "context_size": 128,
        },
    )
    if sae.needs_target:
        expected["d_out"] = sae.config.d_out
    assert config == expected
    weights = load_file(folder / "sae_weights.safetensors")
    assert set(weights) == {"W_enc", "W_dec", "b_dec"} | TENSORS[architecture]
    gate = "b_gate" if name == "gated" else "b_enc"
    assert torch.equal(weights["W_enc"], sae.w_enc.detach().T)
    assert torch.equal(weights["W_dec"], sae.w_dec.detach())
    assert torch.equal(weights[gate], sae.b_enc.detach())
    if isinstance(sae, BatchTopKSAE) and "threshold" in weights:
        assert torch.equal(weights["threshold"], torch.full((F,), THRESHOLD))
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_is_identical(tmp_path, name, dtype):
    sae = make(name, dtype)
    state = torch.random.get_rng_state()
    loaded = load_sae(export_sae(sae, tmp_path))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(loaded) is type(sae)
    assert loaded.config == sae.config
    found = loaded.state_dict()
    for key, t in sae.state_dict().items():
        assert key in COUNTED or oracle.identical(found[key], t), key


@pytest.mark.parametrize("name", VARIANTS)
def test_the_second_export_is_the_first(tmp_path, name):
    first = export_sae(make(name), tmp_path / "first")
    second = export_sae(load_sae(first), tmp_path / "second")
    configs = [json.loads((folder / "cfg.json").read_text()) for folder in (first, second)]
    assert configs[0] == configs[1]
    weights = [(folder / "sae_weights.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] == weights[1]


def test_levels_come_back(tmp_path):
    sae = make("matryoshka")
    loaded = load_sae(export_sae(sae, tmp_path))
    assert isinstance(loaded, MatryoshkaSAE) and loaded.config.widths == WIDTHS
    codes = sae.encode(oracle.randn(50, D))
    for one, other in zip(sae.decode_levels(codes), loaded.decode_levels(codes), strict=True):
        assert torch.equal(one, other)


def test_levels_by_frequency_are_not_kept_and_it_is_said(tmp_path):
    sae = MatryoshkaSAE(D, F, K, widths=WIDTHS, by_frequency=True)
    sae.threshold.fill_(0.5)
    export_sae(sae, tmp_path)
    with pytest.warns(UserWarning, match="holds no frequencies of features"):
        assert load_sae(tmp_path).config.by_frequency


def test_k_of_further_training_may_be_another(tmp_path):
    for name in ("batch_topk", "matryoshka", "transcoder", "transcoder, ReLU"):
        folder = export_sae(make(name), tmp_path / name)
        loaded = load_sae(folder, k=3)
        assert type(loaded) is VARIANTS[name][0] and loaded.config.k == 3
        for k in (0, F + 1, True, "3"):
            with pytest.raises(ValueError, match=f"k must be above 0 and at most {F} .*, got"):
                load_sae(folder, k=k)
    with pytest.raises(ValueError, match="k must be at most the first level's width, 10, got 11"):
        load_sae(tmp_path / "matryoshka", k=11)
    for name in ("topk", "jumprelu", "gated", "relu"):
        folder = export_sae(make(name), tmp_path / name)
        kind = VARIANTS[name][0].__name__
        with pytest.raises(
            ValueError, match=f"load_sae: k must be None for the {kind} of .* got 3"
        ):
            load_sae(folder, k=3)


def test_a_transcoder_without_a_threshold_is_relu_with_k_f_alone(tmp_path):
    relu = export_sae(make("transcoder, ReLU"), tmp_path / "relu")
    assert json.loads((relu / "cfg.json").read_text())["architecture"] == "transcoder"
    for name in ("batch_topk", "matryoshka", "transcoder", "skip_transcoder"):
        sae = make(name)
        sae.threshold.zero_()
        with pytest.raises(ValueError, match="threshold must be above 0, got 0.0; train the SAE"):
            export_sae(sae, tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_export_refuses_thresholds_that_are_none(tmp_path, value):
    sae = make("jumprelu")
    with torch.no_grad():
        sae.threshold[7] = value
    with pytest.raises(
        ValueError, match=r"threshold must be at least 0 and finite, got .*\(1 such"
    ):
        export_sae(sae, tmp_path / "never")
    batch = make("batch_topk")
    batch.threshold.fill_(-1)
    with pytest.raises(ValueError, match="threshold must be above 0, got -1"):
        export_sae(batch, tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    "make_other",
    [
        lambda: LISTAMatryoshkaSAE(D, F, K, widths=WIDTHS),
        lambda: Crosscoder(D, F, K, n_layers=2),
        lambda: CrossLayerTranscoder(D, F, K, n_layers=2),
        lambda: torch.nn.Linear(3, 3),
        lambda: None,
    ],
)
def test_what_saelens_has_not_is_refused(tmp_path, make_other):
    other = make_other()
    names = "TopKSAE, BatchTopKSAE, MatryoshkaSAE, JumpReLUSAE, GatedSAE, ReLUSAE, Transcoder, Skip"
    with pytest.raises(
        TypeError,
        match=f"export_sae: sae must be one of {names}.*, got {type(other).__name__}; SAELens has",
    ):
        export_sae(other, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_variant_of_ones_own_is_written_as_what_it_stems_from(tmp_path):
    class Mine(JumpReLUSAE):
        pass

    sae = Mine(D, F, 6)
    loaded: SAE = load_sae(export_sae(sae, tmp_path))
    assert type(loaded) is JumpReLUSAE


def test_their_metadata_does_not_stand_in_for_ours(tmp_path):
    """Metadata of an earlier export, handed on, says nothing about this one."""
    first = export_sae(make("gated"), tmp_path / "first")
    former = json.loads((first / "cfg.json").read_text())["metadata"]
    second = export_sae(make("transcoder"), tmp_path / "second", metadata=former)
    loaded = load_sae(second)
    assert type(loaded) is Transcoder and loaded.config.d_out == D_OUT
