# SPDX-License-Identifier: Apache-2.0
"""What files that are not ours become, and which are refused."""

import pytest
import torch
from saelens_cases import (
    BECOMES,
    THRESHOLD,
    VARIANTS,
    WIDTHS,
    D,
    F,
    K,
    claims,
    make,
    peer_config,
    peer_weights,
    thresholds,
    write_peer,
)

from mikernels.integrations.saelens import export_sae, load_sae
from mikernels.nn import BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE, ReLUSAE, TopKSAE


def write_jumprelu(folder, metadata=None, threshold=THRESHOLD):
    weights = peer_weights("jumprelu")
    given = torch.as_tensor(threshold, dtype=torch.float32)
    weights["threshold"] = given.expand(F).contiguous()
    changes = {} if metadata is None else {"metadata": metadata}
    return write_peer(folder, peer_config("jumprelu", **changes), weights)


@pytest.mark.parametrize("architecture", BECOMES)
def test_without_metadata_a_file_becomes_what_computes_the_same(tmp_path, architecture):
    k = K if architecture.startswith("jumprelu_") else None
    sae = load_sae(write_peer(tmp_path, peer_config(architecture)), k=k)
    assert type(sae) is BECOMES[architecture]
    if "transcoder" in architecture:
        assert sae.config.k == (k or F)
        assert float(sae.threshold) == (THRESHOLD if k else 0)
    assert not sae.config.normalize_decoder


def test_a_jumprelu_file_becomes_a_batch_topk_sae_with_k(tmp_path):
    write_jumprelu(tmp_path)
    plain = load_sae(tmp_path)
    assert type(plain) is JumpReLUSAE and plain.config.sparsity == "step"
    assert torch.equal(plain.threshold, torch.full((F,), THRESHOLD))
    batch = load_sae(tmp_path, k=4.5)
    assert type(batch) is BatchTopKSAE and batch.config.k == 4.5
    assert float(batch.threshold) == THRESHOLD
    write_jumprelu(tmp_path, threshold=thresholds())
    with pytest.raises(
        ValueError, match=r"threshold of .* one number for all features of a BatchTopKSAE, got 0.0"
    ):
        load_sae(tmp_path, k=K)


def test_saelens_says_what_it_trained(tmp_path):
    write_jumprelu(tmp_path, claims("batchtopk", k=5, topk_threshold_lr=0.5))
    sae = load_sae(tmp_path)
    assert type(sae) is BatchTopKSAE and sae.config.k == 5
    assert load_sae(tmp_path, k=3.5).config.k == 3.5
    nested = claims("matryoshka_batchtopk", k=7.5, matryoshka_widths=list(WIDTHS))
    write_jumprelu(tmp_path, nested)
    sae = load_sae(tmp_path)
    assert type(sae) is MatryoshkaSAE and sae.config.k == 7.5 and sae.config.widths == WIDTHS
    write_jumprelu(tmp_path, claims("jumprelu", target_l0=3))
    assert type(load_sae(tmp_path)) is JumpReLUSAE
    write_jumprelu(tmp_path, claims("batchtopk") | {"training_architecture_details": None})
    assert type(load_sae(tmp_path)) is JumpReLUSAE


@pytest.mark.parametrize(
    ("trained", "details", "said"),
    [
        ("batchtopk", {}, "k: input should be a valid number, got None"),
        ("batchtopk", {"k": "5"}, "k: input should be a valid number, got '5'"),
        ("batchtopk", {"k": F + 1}, f"k must be above 0, at most {F}, got {F + 1}"),
        ("matryoshka_batchtopk", {"k": 5}, "widths: input should be a valid .*, got None"),
        (
            "matryoshka_batchtopk",
            {"k": 5, "matryoshka_widths": [40, 10, F]},
            r"widths must ascend .* got \[40, 10, 160\]",
        ),
        (
            "matryoshka_batchtopk",
            {"k": 15, "matryoshka_widths": list(WIDTHS)},
            "k must be at most the first level's width, 10, got 15",
        ),
    ],
)
def test_what_cannot_have_been_trained_is_named(tmp_path, trained, details, said):
    write_jumprelu(tmp_path, claims(trained, **details))
    with pytest.raises(
        ValueError,
        match=f"cfg.json must hold metadata.training_architecture_details.*{said}.*; pass k to",
    ):
        load_sae(tmp_path)
    assert type(load_sae(tmp_path, k=5)) is BatchTopKSAE


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
def test_thresholds_that_were_folded_since_are_kept(tmp_path, name):
    """SAELens' fold_W_dec_norm gives a BatchTopK SAE a threshold for every feature."""
    from safetensors.torch import load_file, save_file

    path = export_sae(make(name), tmp_path) / "sae_weights.safetensors"
    weights = load_file(path)
    weights["threshold"] *= torch.linspace(0.5, 2, F)
    save_file(weights, path)
    sae = load_sae(tmp_path)
    assert type(sae) is JumpReLUSAE
    assert torch.equal(sae.threshold, weights["threshold"])


def test_a_transcoder_has_one_threshold_and_a_k(tmp_path):
    config, weights = peer_config("jumprelu_transcoder"), peer_weights("jumprelu_transcoder")
    write_peer(tmp_path, config, weights)
    with pytest.raises(ValueError, match=r"load_sae: k must be given for the Transcoder of .*None"):
        load_sae(tmp_path)
    weights["threshold"] = thresholds()
    write_peer(tmp_path, config, weights)
    with pytest.raises(
        ValueError, match=r"one number for all features of a Transcoder, got .*; load it with sae_l"
    ):
        load_sae(tmp_path, k=K)
    weights["threshold"].zero_()  # as SAELens starts them: ReLU
    assert load_sae(write_peer(tmp_path, config, weights)).config.k == F


@pytest.mark.parametrize("name", ["batch_topk", "transcoder"])
def test_one_threshold_is_not_negative(tmp_path, name):
    architecture = VARIANTS[name][2]
    weights = peer_weights(architecture)
    weights["threshold"] = torch.full((F,), -0.25)
    write_peer(tmp_path, peer_config(architecture), weights)
    with pytest.raises(
        ValueError, match=r"threshold in .*safetensors must be at least 0, got -0.2"
    ):
        load_sae(tmp_path, k=K)


def test_decoder_norms_are_kept_where_they_are_unit(tmp_path):
    """The setting holds where the rows still have norm 1."""
    from safetensors.torch import load_file, save_file

    path = export_sae(make("relu"), tmp_path) / "sae_weights.safetensors"
    assert load_sae(tmp_path).config.normalize_decoder
    weights = load_file(path)
    weights["W_dec"][5] *= 1.1
    save_file(weights, path)
    assert not load_sae(tmp_path).config.normalize_decoder
    free = ReLUSAE(D, F, normalize_decoder=False)
    assert not load_sae(export_sae(free, tmp_path)).config.normalize_decoder


def old_config(activation: str = "topk", **changes) -> dict:
    """As versions before 6 wrote it: TopK is an activation function."""
    config = peer_config(
        "standard",
        activation_fn_str=activation,
        activation_fn_kwargs={"k": K} if activation == "topk" else {},
        dtype="torch.float32",
        normalize_activations=False,
        finetuning_scaling_factor=False,
        model_name="gpt2-small",
        hook_name="blocks.6.hook_resid_post",
    )
    return {key: value for key, value in config.items() if key != "metadata"} | changes


def test_saelens_load_reads_version_5(tmp_path):
    sae = load_sae(write_peer(tmp_path, old_config()))
    assert type(sae) is TopKSAE and sae.config.k == K
    assert torch.equal(sae.w_enc, peer_weights()["W_enc"].T)
    sae = load_sae(write_peer(tmp_path, old_config("relu", sae_lens_version="5.10.7")))
    assert type(sae) is ReLUSAE


def test_saelens_load_reads_the_first_versions(tmp_path):
    """No architecture, and a scaling factor of ones."""
    config = old_config("relu")
    del config["architecture"], config["activation_fn_str"]
    weights = peer_weights("standard") | {"scaling_factor": torch.ones(F)}
    sae = load_sae(write_peer(tmp_path, config, weights))
    assert type(sae) is ReLUSAE
    assert torch.equal(sae.w_dec, weights["W_dec"])
    weights["scaling_factor"][3] = 1.5
    write_peer(tmp_path, config, weights)
    with pytest.raises(
        ValueError, match="scaling_factor in .* must be 1 for every feature, got 1.0"
    ):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"architecture": "batchtopk"},
            r"must be one of .*, got 'batchtopk'; save an SAE in train",
        ),
        (
            {"architecture": "matryoshka_batchtopk"},
            r"must be one of .*, got 'matryoshka_batchtopk'",
        ),
        ({"architecture": "temporal"}, r"must be one of .*, got 'temporal'"),
        ({"architecture": "matching_pursuit"}, r"must be one of .*, got 'matching_pursuit'"),
        ({"architecture": "abstopk"}, r"must be one of .*, got 'abstopk'"),
        ({"architecture": None}, r"must be one of .*, got None"),
        ({"architecture": ["topk"]}, r"must be one of .*, got \['topk'\]"),
        ({"normalize_activations": "layer_norm"}, r"must be 'none', got 'layer_norm'; fold"),
        ({"finetuning_scaling_factor": True}, r"must be false, got true"),
        ({"activation_fn": "tanh-relu"}, r"activation_fn in .* must be 'relu' .*, got 'tanh-relu'"),
        ({"activation_fn_str": "topk"}, r"activation_fn in .* must be 'relu' .*, got 'topk'"),
        ({"k": 0}, r"k in .* must be a positive integer, got 0"),
        ({"k": 32.5}, r"k in .* must be a positive integer, got 32.5"),
        ({"k": F + 1}, rf"k in .* must be in 1..{F} \(d_sae\), got {F + 1}"),
        ({"d_in": None}, r"d_in in .* must be a positive integer, got None"),
        ({"dtype": "int8"}, r"dtype in .* must be one of .*, got 'int8'"),
        ({"d_sae": F + 1}, r"sae_weights.safetensors must hold .* by cfg.json, got"),
        (
            {"architecture": "gated", "rescale_acts_by_decoder_norm": True},
            "must be without rescale_acts_by_decoder_norm, got it with 'gated'",
        ),
        (
            {"architecture": "transcoder", "d_out": 3},
            "must be with apply_b_dec_to_input false, got none such with 'transcoder'",
        ),
        (
            {"architecture": "transcoder", "apply_b_dec_to_input": False},
            "d_out in .* must be a positive integer, got None",
        ),
    ],
)
def test_saelens_load_rejects(tmp_path, changes, said):
    write_peer(tmp_path, peer_config() | changes, peer_weights())
    with pytest.raises(ValueError, match=said) as caught:
        load_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"apply_b_dec_to_input": "false"},
        {"rescale_acts_by_decoder_norm": 1},
        {"d_in": True},
        {"d_sae": 10**18},
    ],
)
def test_saelens_load_rejects_mistyped_fields(tmp_path, changes):
    write_peer(tmp_path, peer_config(**changes))
    with pytest.raises(ValueError, match="load_sae: "):
        load_sae(tmp_path)


@pytest.mark.parametrize("settings", [[3], None, {"k": "6"}])
def test_saelens_load_rejects_mistyped_settings_of_version_5(tmp_path, settings):
    write_peer(tmp_path, old_config(activation_fn_kwargs=settings))
    with pytest.raises(ValueError, match="load_sae: k in .* must be a positive integer, got"):
        load_sae(tmp_path)


def test_metadata_may_be_anything(tmp_path):
    for metadata in (None, [1], "x", {}):
        sae = load_sae(write_peer(tmp_path, peer_config(metadata=metadata)))
        assert type(sae) is TopKSAE
    assert sae.config.d == D
