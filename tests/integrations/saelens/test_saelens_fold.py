# SPDX-License-Identifier: Apache-2.0
"""Files of every architecture compute what SAELens' equations say, whatever has to be folded."""

import oracle
import pytest
import torch
from saelens_cases import (
    BECOMES,
    THRESHOLD,
    D,
    F,
    K,
    assert_same_function,
    peer_config,
    peer_function,
    peer_weights,
    write_peer,
)

from mikernels.integrations.saelens import export_sae, load_sae

CASES = [
    (architecture, centre, rescale)
    for architecture in BECOMES
    for centre in ([False] if "transcoder" in architecture else [False, True])
    for rescale in ([False, True] if architecture == "topk" else [False])
]


def case(architecture: str, centre: bool, rescale: bool) -> dict:
    changes = {"rescale_acts_by_decoder_norm": True} if rescale else {}
    return peer_config(architecture, apply_b_dec_to_input=centre, **changes)


def k_of(architecture: str) -> float | None:
    return K if architecture.startswith("jumprelu_") else None


@pytest.mark.parametrize(("architecture", "centre", "rescale"), CASES)
def test_saelens_load_folds(tmp_path, architecture, centre, rescale):
    config, weights = case(architecture, centre, rescale), peer_weights(architecture)
    sae = load_sae(write_peer(tmp_path, config, weights), k=k_of(architecture))
    assert type(sae) is BECOMES[architecture]
    x = oracle.randn(300, D, seed=9)
    wanted = peer_function(config, weights, x, torch.float64)
    eager = peer_function(config, weights, x, torch.float32)
    assert_same_function(sae, wanted, eager, x)
    assert sae.config.normalize_decoder == rescale
    # and what was folded stays so
    again = load_sae(export_sae(sae, tmp_path / "again"))
    assert type(again) is type(sae) and again.config == sae.config
    assert_same_function(again, wanted, eager, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("architecture", "centre", "rescale"), CASES)
def test_half_precision_is_folded_into_float32(tmp_path, architecture, centre, rescale, dtype):
    config = case(architecture, centre, rescale) | {"dtype": str(dtype).removeprefix("torch.")}
    weights = {name: t.to(dtype) for name, t in peer_weights(architecture).items()}
    sae = load_sae(write_peer(tmp_path, config, weights), k=k_of(architecture))
    folds = rescale or (not centre and "transcoder" not in architecture)
    assert sae.w_enc.dtype == sae.w_dec.dtype == (torch.float32 if folds else dtype)
    if folds:
        x = oracle.randn(100, D, seed=9)
        exact = {name: t.float() for name, t in weights.items()}
        wanted = peer_function(config, exact, x, torch.float64)
        eager = peer_function(config, exact, x, torch.float32)
        assert_same_function(sae, wanted, eager, x)


def test_saelens_load_folds_norms_exactly(tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in peer_weights().items()}
    config = peer_config(dtype="bfloat16", rescale_acts_by_decoder_norm=True)
    sae = load_sae(write_peer(tmp_path, config, weights))
    norms = weights["W_dec"].double().norm(dim=1)
    torch.testing.assert_close(sae.w_enc.double(), weights["W_enc"].double().T * norms[:, None])


def test_saelens_load_keeps_a_zero_decoder_row(tmp_path):
    weights = peer_weights()
    weights["W_dec"][3] = 0
    write_peer(tmp_path, peer_config(rescale_acts_by_decoder_norm=True), weights)
    sae = load_sae(tmp_path)
    assert (sae.w_dec[3] == 0).all()
    assert sae.config.normalize_decoder
    assert sae(oracle.randn(20, D)).reconstruction.isfinite().all()


def test_weights_are_rounded_to_what_the_configuration_says(tmp_path):
    weights = peer_weights("jumprelu")
    sae = load_sae(write_peer(tmp_path, peer_config("jumprelu", dtype="float16"), weights))
    assert oracle.identical(sae.w_dec.detach(), weights["W_dec"].half())
    assert oracle.identical(sae.threshold.detach(), weights["threshold"])


def test_negative_thresholds_are_0_there_too(tmp_path):
    config, weights = peer_config("jumprelu"), peer_weights("jumprelu")
    weights["threshold"][:50] = -0.3
    sae = load_sae(write_peer(tmp_path, config, weights))
    assert (sae.threshold[:50] == 0).all()
    x = oracle.randn(300, D, seed=9)
    wanted = peer_function(config, weights, x, torch.float64)
    assert_same_function(sae, wanted, peer_function(config, weights, x, torch.float32), x)


@pytest.mark.parametrize("threshold", [0.0, THRESHOLD])
def test_one_threshold_for_all_needs_no_k(tmp_path, threshold):
    config, weights = peer_config("jumprelu"), peer_weights("jumprelu")
    weights["threshold"] = torch.full((F,), threshold)
    write_peer(tmp_path, config, weights)
    x = oracle.randn(300, D, seed=9)
    wanted = peer_function(config, weights, x, torch.float64)
    eager = peer_function(config, weights, x, torch.float32)
    for k in (None, K):
        assert_same_function(load_sae(tmp_path, k=k), wanted, eager, x)
