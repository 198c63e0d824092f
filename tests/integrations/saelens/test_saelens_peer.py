# SPDX-License-Identifier: Apache-2.0
"""The real sae-lens reads what we write, and we read what it writes, for every architecture."""

import copy
from types import ModuleType

import oracle
import pytest
import torch
import variants
from saelens_cases import (
    BECOMES,
    D_OUT,
    VARIANTS,
    WIDTHS,
    D,
    F,
    K,
    assert_same_function,
    make,
    peer_config,
    peer_weights,
    write_peer,
)

from mikernels.integrations.saelens import export_sae, load_sae
from mikernels.nn import (
    SAE,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    SkipTranscoder,
    TopKSAE,
    Transcoder,
)

pytestmark = pytest.mark.peers
X = oracle.randn(500, D, seed=11)
CLASSES = {
    "topk": "TopKSAE",
    "standard": "StandardSAE",
    "jumprelu": "JumpReLUSAE",
    "gated": "GatedSAE",
    "transcoder": "Transcoder",
    "skip_transcoder": "SkipTranscoder",
    "jumprelu_transcoder": "JumpReLUTranscoder",
    "jumprelu_skip_transcoder": "JumpReLUSkipTranscoder",
}


@pytest.fixture(scope="module")
def sae_lens() -> ModuleType:
    return pytest.importorskip("sae_lens", exc_type=ImportError)


def assert_same(ours: SAE, theirs, x: torch.Tensor = X) -> None:
    """Theirs in fp64 is what is wanted; theirs as it is has the rounding that is allowed."""
    with torch.no_grad():
        eager = theirs.encode(x), theirs(x)
        exact = copy.deepcopy(theirs).to(dtype=torch.float64)
        wanted = exact.encode(x.double()), exact(x.double())
    assert torch.equal(eager[0] != 0, wanted[0] != 0)
    assert_same_function(ours, wanted, eager, x)


@pytest.mark.parametrize("name", VARIANTS)
def test_saelens_reads_our_export(tmp_path, sae_lens, name):
    ours = make(name)
    export_sae(ours, tmp_path, model_name="gpt2-small", hook_name="blocks.6.hook_resid_post")
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert type(theirs) is getattr(sae_lens, CLASSES[VARIANTS[name][2]])
    assert theirs.cfg.metadata.model_name == "gpt2-small"
    assert theirs.cfg.metadata.hook_name == "blocks.6.hook_resid_post"
    assert theirs.cfg.metadata.sae_lens_training_version is None
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "name",
    ["topk", "batch_topk", "matryoshka", "jumprelu", "gated", "relu", "transcoder"]
    + ["skip_transcoder"],
)
def test_saelens_reads_what_a_trainer_made(tmp_path, sae_lens, name):
    ours = variants.make(name)
    variants.train(ours, steps=10, step="autograd")
    theirs = sae_lens.SAE.load_from_disk(export_sae(ours.eval(), tmp_path))
    assert_same(ours, theirs, variants.activations(200, seed=5))
    assert_same(load_sae(tmp_path), theirs, variants.activations(200, seed=5))


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_saelens_reads_every_dtype(tmp_path, sae_lens, name, dtype):
    ours = make(name, dtype)
    theirs = sae_lens.SAE.load_from_disk(export_sae(ours, tmp_path))
    for parameter, mine in (("W_enc", ours.w_enc.T), ("W_dec", ours.w_dec), ("b_dec", ours.b_dec)):
        assert oracle.identical(getattr(theirs, parameter).detach(), mine.detach()), parameter
    if hasattr(theirs, "threshold"):
        mine = ours.threshold.detach().to(dtype).expand(F)
        assert oracle.identical(theirs.threshold.detach(), mine.contiguous())


@pytest.mark.parametrize("name", VARIANTS)
def test_what_saelens_saves_again_comes_back(tmp_path, sae_lens, name):
    """Metadata goes through SAELens, and with it the variant and its settings."""
    ours = make(name)
    sae_lens.SAE.load_from_disk(export_sae(ours, tmp_path / "a")).save_model(tmp_path / "b")
    again = load_sae(tmp_path / "b")
    assert type(again) is type(ours) and again.config == ours.config
    assert torch.equal(again.encode(X).to_dense(), ours.encode(X).to_dense())


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka", "jumprelu", "gated", "relu"])
def test_what_saelens_folds_again_is_read(tmp_path, sae_lens, name):
    ours = make(name)
    with torch.no_grad():
        ours.w_dec.mul_(torch.linspace(0.5, 2, F)[:, None])
    theirs = sae_lens.SAE.load_from_disk(export_sae(ours, tmp_path / "a"), fold_W_dec_norm=True)
    theirs.save_model(tmp_path / "b")
    again = load_sae(tmp_path / "b")
    assert type(again) is (JumpReLUSAE if isinstance(ours, BatchTopKSAE) else type(ours))
    assert_same(again, theirs)


@pytest.mark.parametrize(
    ("architecture", "centre"),
    [(a, centre) for a in BECOMES for centre in ([False] if "transcoder" in a else [False, True])],
)
def test_saelens_writes_what_we_read(tmp_path, sae_lens, architecture, centre):
    transcodes = "transcoder" in architecture
    kind = getattr(sae_lens, CLASSES[architecture])
    more = {"k": K, "rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
    more |= {"d_out": D_OUT} if transcodes else {}
    form = getattr(sae_lens, f"{CLASSES[architecture]}Config")
    theirs = kind(form(d_in=D, d_sae=F, apply_b_dec_to_input=centre, **more))
    theirs.load_state_dict(peer_weights(architecture))
    theirs.save_model(tmp_path)
    ours = load_sae(tmp_path, k=K if architecture.startswith("jumprelu_") else None)
    assert type(ours) is BECOMES[architecture]
    assert_same(ours, theirs)


def trained(sae_lens: ModuleType, kind: str, steps: int = 0, lr: float = 1e-2, **settings):
    """One of SAELens' training SAEs: random weights, and some steps."""
    from sae_lens.saes.sae import TrainStepInput

    form = getattr(sae_lens, f"{kind}TrainingSAEConfig")
    theirs = getattr(sae_lens, f"{kind}TrainingSAE")(form(d_in=D, d_sae=F, **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.add_((noise.abs() if name == "threshold" else noise) * 0.2)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=lr)
    for step in range(steps):
        coefficients = {name: c.value for name, c in theirs.get_coefficients().items()}
        given = TrainStepInput(X, coefficients, torch.zeros(F, dtype=torch.bool), step, False)
        optimizer.zero_grad()
        theirs.training_forward_pass(given).loss.backward()
        optimizer.step()
    return theirs


TRAINING = {
    "TopK": (dict(k=K), TopKSAE),
    "BatchTopK": (dict(k=4.5), BatchTopKSAE),
    "MatryoshkaBatchTopK": (dict(k=4.5, matryoshka_widths=list(WIDTHS)), MatryoshkaSAE),
    "JumpReLU": (dict(jumprelu_init_threshold=0.1), JumpReLUSAE),
    "Gated": ({}, GatedSAE),
    "Standard": ({}, ReLUSAE),
}


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("kind", TRAINING)
def test_saelens_training_sae_is_read(tmp_path, sae_lens, kind, centre, steps):
    settings, becomes = TRAINING[kind]
    theirs = trained(sae_lens, kind, steps, apply_b_dec_to_input=centre, **settings)
    theirs.save_inference_model(tmp_path)
    ours = load_sae(tmp_path)
    assert type(ours) is becomes
    assert_same(ours, sae_lens.SAE.load_from_disk(tmp_path))
    if isinstance(ours, BatchTopKSAE):
        assert ours.config.k == 4.5
        assert (float(ours.threshold) > 0) == bool(steps)
    if isinstance(ours, MatryoshkaSAE):
        assert ours.config.widths == WIDTHS


@pytest.mark.parametrize("kind", ["TopK", "JumpReLU", "Gated", "Standard"])
def test_saelens_checkpoint_of_a_training_sae_is_read(tmp_path, sae_lens, kind):
    theirs = trained(sae_lens, kind, 3, **TRAINING[kind][0])
    theirs.save_model(tmp_path)
    ours = load_sae(tmp_path)
    assert type(ours) is TRAINING[kind][1]
    assert_same(ours, sae_lens.SAE.load_from_disk(tmp_path))


def test_saelens_training_leaves_negative_thresholds(tmp_path, sae_lens):
    """They are clamped before a step and not after it, and count as 0 in use."""
    settings = dict(jumprelu_init_threshold=0.0, l0_coefficient=0.0, jumprelu_bandwidth=2.0)
    theirs = trained(sae_lens, "JumpReLU", 1, lr=0.5, **settings)
    assert (theirs.threshold < 0).any()
    theirs.save_inference_model(tmp_path)
    ours = load_sae(tmp_path)
    assert isinstance(ours, JumpReLUSAE) and (ours.threshold >= 0).all()
    assert_same(ours, sae_lens.SAE.load_from_disk(tmp_path))


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_saelens_version_5_means_the_same_there(tmp_path, sae_lens, activation):
    config = peer_config("standard", dtype="torch.float32", normalize_activations=False)
    config |= {"activation_fn_str": activation, "activation_fn_kwargs": {"k": K}}
    config |= {"finetuning_scaling_factor": False, "model_name": "gpt2-small", "hook_name": "a"}
    del config["metadata"]
    write_peer(tmp_path, config)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert type(theirs).__name__ == ("TopKSAE" if activation == "topk" else "StandardSAE")
    assert_same(load_sae(tmp_path), theirs)


def test_saelens_first_versions_mean_the_same_there(tmp_path, sae_lens):
    config = peer_config("standard", dtype="torch.float32", hook_point="a")
    del config["metadata"], config["architecture"]
    weights = peer_weights("standard") | {"scaling_factor": torch.ones(F)}
    write_peer(tmp_path, config, weights)
    assert_same(load_sae(tmp_path), sae_lens.SAE.load_from_disk(tmp_path))


@pytest.mark.parametrize("kind", ["BatchTopK", "MatryoshkaBatchTopK"])
def test_saelens_batchtopk_in_training_is_rejected(tmp_path, sae_lens, kind):
    theirs = trained(sae_lens, kind, **TRAINING[kind][0])
    theirs.save_model(tmp_path)
    with pytest.raises(ValueError, match="architecture in .* must be one of .*batchtopk'; save an"):
        load_sae(tmp_path)


@pytest.mark.parametrize("kind", ["AbsTopK", "MatchingPursuit", "Temporal"])
def test_what_we_have_not_is_refused(tmp_path, sae_lens, kind):
    temporal = {"n_heads": 1, "bottleneck_factor": 2, "kval_topk": K}
    more = {"AbsTopK": {"k": K}, "MatchingPursuit": {}, "Temporal": temporal}[kind]
    form = getattr(sae_lens, f"{kind}SAEConfig")
    theirs = getattr(sae_lens, f"{kind}SAE")(form(d_in=D, d_sae=F, **more))
    theirs.save_model(tmp_path)
    with pytest.raises(ValueError, match=r"cfg.json must be one of \['topk', .*; save an SAE"):
        load_sae(tmp_path)


def test_transcoders_give_their_output(tmp_path, sae_lens):
    """The skip connection is part of a reconstruction, and not of decoding codes."""
    for kind in (Transcoder, SkipTranscoder):
        name = {Transcoder: "transcoder", SkipTranscoder: "skip_transcoder"}[kind]
        ours = make(name)
        theirs = sae_lens.SAE.load_from_disk(export_sae(ours, tmp_path / name))
        with torch.no_grad():
            codes = ours.encode(X)
            wanted = theirs.decode(codes.to_dense())
            eager = theirs.to(dtype=torch.float64).decode(codes.to_dense().double())
        oracle.assert_accurate(ours.decode(codes).detach(), eager, wanted)
