# SPDX-License-Identifier: Apache-2.0
"""SAELens' format: golden names and sizes, folding, bad files; and, as peers, the real sae-lens."""

import json
import os
from types import ModuleType

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

from mikernels.integrations import saelens
from mikernels.integrations.saelens import export_sae, load_sae
from mikernels.nn import TopKSAE
from mikernels.owning import owned

D, F, K = 24, 160, 6
NAMES = ("w_enc", "b_enc", "w_dec", "b_dec")


def make_sae(dtype: torch.dtype = torch.float32) -> TopKSAE:
    """Every parameter non-trivial, decoder rows of unit norm."""
    sae = TopKSAE(D, F, K, dtype=dtype, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.w_enc.add_(0.3 * oracle.randn(F, D, dtype=dtype, seed=2))
        sae.b_enc.copy_(0.2 * oracle.randn(F, dtype=dtype, seed=3))
        sae.b_dec.copy_(oracle.randn(D, dtype=dtype, seed=4))
    return sae


def peer_weights(seed: int = 5) -> dict[str, torch.Tensor]:
    """In SAELens' names and layout; decoder norms between 0.5 and 2."""
    norms = torch.linspace(0.5, 2, F)[:, None]
    rows = torch.nn.functional.normalize(oracle.randn(F, D, seed=seed), dim=1)
    return {
        "W_enc": (rows + 0.3 * oracle.randn(F, D, seed=seed + 1)).T.contiguous(),
        "b_enc": 0.2 * oracle.randn(F, seed=seed + 2),
        "W_dec": rows * norms,
        "b_dec": oracle.randn(D, seed=seed + 3),
    }


def peer_config(**changes) -> dict:
    return {
        "d_in": D,
        "d_sae": F,
        "k": K,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "rescale_acts_by_decoder_norm": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12"},
        "architecture": "topk",
    } | changes


def write_peer(folder, config: dict, weights: dict[str, torch.Tensor] | None = None):
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(weights or peer_weights(), folder / "sae_weights.safetensors")
    return folder


def peer_function(weights, x, *, rescale: bool, centre: bool, dtype: torch.dtype):
    """Codes [N, F] and reconstruction of SAELens' equations, in `dtype`."""
    w = {name: tensor.to(dtype) for name, tensor in weights.items()}
    x = x.to(dtype)
    h = (x - w["b_dec"] * centre) @ w["W_enc"] + w["b_enc"]
    scale = w["W_dec"].norm(dim=-1) if rescale else torch.ones(F, dtype=dtype)
    h = h * scale
    top = h.topk(K, dim=-1)
    codes = torch.zeros_like(h).scatter(-1, top.indices, top.values.relu())
    return codes, (codes / scale) @ w["W_dec"] + w["b_dec"]


def test_saelens_export_has_the_format(tmp_path):
    sae = make_sae()
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
    assert config == peer_config(
        metadata={
            "sae_lens_version": "6.54.12",
            "sae_lens_training_version": None,
            "model_name": "gpt2-small",
            "hook_name": "blocks.6.hook_resid_post",
            "context_size": 128,
        }
    )
    weights = load_file(folder / "sae_weights.safetensors")
    assert set(weights) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert torch.equal(weights["W_enc"], sae.w_enc.detach().T)
    assert torch.equal(weights["W_dec"], sae.w_dec.detach())
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_saelens_round_trip_is_identical(tmp_path, dtype):
    sae = make_sae(dtype)
    state = torch.random.get_rng_state()
    loaded = load_sae(export_sae(sae, tmp_path))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in NAMES:
        assert oracle.identical(getattr(loaded, name), getattr(sae, name)), name
    assert loaded.config.k == K
    assert loaded.config.normalize_decoder


def test_saelens_export_replaces_an_earlier_one(tmp_path):
    export_sae(TopKSAE(8, 32, 4), tmp_path)
    sae = make_sae()
    assert torch.equal(load_sae(export_sae(sae, tmp_path)).w_enc, sae.w_enc)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("centre", [False, True])
def test_saelens_load_folds(tmp_path, rescale, centre):
    config = peer_config(rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=centre)
    weights = peer_weights()
    sae = load_sae(write_peer(tmp_path, config, weights))
    x = oracle.randn(300, D, seed=9)
    kind = {"rescale": rescale, "centre": centre}
    wanted, y = peer_function(weights, x, **kind, dtype=torch.float64)
    eager, eager_y = peer_function(weights, x, **kind, dtype=torch.float32)
    codes = sae.encode(x)
    assert torch.equal(codes.to_dense() != 0, wanted != 0)
    oracle.assert_accurate(codes.to_dense(), wanted, eager)
    oracle.assert_accurate(sae.decode(codes), y, eager_y)
    assert sae.config.normalize_decoder == rescale


def test_saelens_load_folds_half_precision_into_float32(tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in peer_weights().items()}
    write_peer(tmp_path, peer_config(dtype="bfloat16"), weights)
    assert load_sae(tmp_path).w_enc.dtype == torch.bfloat16
    write_peer(tmp_path, peer_config(dtype="bfloat16", rescale_acts_by_decoder_norm=True), weights)
    sae = load_sae(tmp_path)
    norms = weights["W_dec"].double().norm(dim=1)
    assert sae.w_enc.dtype == torch.float32
    torch.testing.assert_close(sae.w_enc.double(), weights["W_enc"].double().T * norms[:, None])


def test_saelens_load_keeps_a_zero_decoder_row(tmp_path):
    weights = peer_weights()
    weights["W_dec"][3] = 0
    write_peer(tmp_path, peer_config(rescale_acts_by_decoder_norm=True), weights)
    sae = load_sae(tmp_path)
    assert (sae.w_dec[3] == 0).all()
    assert sae(oracle.randn(20, D)).reconstruction.isfinite().all()


def old_config() -> dict:
    """As versions before 6 wrote it: TopK is an activation function."""
    config = peer_config(
        architecture="standard",
        activation_fn_str="topk",
        activation_fn_kwargs={"k": K},
        dtype="torch.float32",
        normalize_activations=False,
        finetuning_scaling_factor=False,
        model_name="gpt2-small",
        hook_name="blocks.6.hook_resid_post",
    )
    return {key: config[key] for key in config.keys() - {"k", "metadata"}}


def test_saelens_load_reads_version_5(tmp_path):
    sae = load_sae(write_peer(tmp_path, old_config()))
    assert sae.config.k == K
    assert torch.equal(sae.w_enc, peer_weights()["W_enc"].T)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "gated"}, r"must be 'topk' or .*, got 'gated'"),
        ({"architecture": "batchtopk"}, r"must be 'topk' or .*, got 'batchtopk'"),
        ({"architecture": None}, r"must be 'topk' or .*, got None"),
        ({"normalize_activations": "layer_norm"}, r"must be 'none', got 'layer_norm'; fold"),
        ({"finetuning_scaling_factor": True}, r"must be false, got true"),
        ({"k": 0}, r"k in .* must be a positive integer, got 0"),
        ({"k": 32.5}, r"k in .* must be a positive integer, got 32.5"),
        ({"k": F + 1}, rf"k in .* must be in 1..{F} \(d_sae\), got {F + 1}"),
        ({"d_in": None}, r"d_in in .* must be a positive integer, got None"),
        ({"dtype": "int8"}, r"dtype in .* must be one of .*, got 'int8'"),
        ({"d_sae": F + 1}, r"sae_weights.safetensors must hold .* by cfg.json, got"),
    ],
)
def test_saelens_load_rejects(tmp_path, changes, said):
    write_peer(tmp_path, peer_config(**changes))
    with pytest.raises(ValueError, match=said) as caught:
        load_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_saelens_load_rejects_foreign_tensors(tmp_path):
    write_peer(tmp_path, peer_config(), {"weight": torch.zeros(F, D)})
    with pytest.raises(ValueError, match=r"sae_weights.safetensors must hold .* got \{'weight'"):
        load_sae(tmp_path)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "foreign"])
def test_saelens_load_names_the_damaged_file(tmp_path, name, damage):
    path = export_sae(make_sae(), tmp_path) / name
    data = path.read_bytes()
    damaged = {"truncated": data[: len(data) // 2], "empty": b"", "foreign": b"\x89PNG\r\n" * 40}
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    error = FileNotFoundError if damage == "missing" else ValueError
    with pytest.raises(error, match=name):
        load_sae(tmp_path)


def test_saelens_load_rejects_json_that_is_no_object(tmp_path):
    write_peer(tmp_path, peer_config())
    (tmp_path / "cfg.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"cfg.json must be a JSON object, got list"):
        load_sae(tmp_path)


def test_saelens_export_on_a_full_disk_keeps_the_earlier_one(tmp_path, run_python):
    export_sae(make_sae(), tmp_path)
    printed = run_python(
        f"""
        import resource
        from mikernels.integrations.saelens import export_sae
        from mikernels.nn import TopKSAE
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            export_sae(TopKSAE({D}, 1000, {K}), {str(tmp_path)!r})
        except OSError as error:
            print(error)
        """
    )
    assert f"an SAE must be written to {tmp_path}, got File too large" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]
    assert torch.equal(load_sae(tmp_path).w_enc, make_sae().w_enc)


def test_saelens_export_never_shows_a_mixture(tmp_path, monkeypatch):
    """Stopped before either of its renames, the folder says that it holds no SAE."""
    replace = saelens.os.replace
    for stop in range(2):
        folder = tmp_path / str(stop)
        export_sae(TopKSAE(8, 32, 4), folder)
        calls = []

        def replace_until(source, target, stop=stop, calls=calls):
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(target)
            replace(source, target)

        monkeypatch.setattr(saelens.os, "replace", replace_until)
        with pytest.raises(KeyboardInterrupt):
            export_sae(make_sae(), folder)
        monkeypatch.undo()
        with pytest.raises(FileNotFoundError, match=r"cfg.json"):
            load_sae(folder)
        assert not list(folder.glob(".*"))


def test_saelens_load_rejects_weights_that_are_no_numbers(tmp_path):
    weights = {key: t.long() for key, t in peer_weights().items()}
    write_peer(tmp_path, peer_config(), weights)
    with pytest.raises(ValueError, match="must be with W_dec of one of"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"\xff\xfe{}", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "a byte order mark"),
        (b"[" * 100_000, "nesting deeper"),
        (b'{"k": 1, "k": 2}', "'k' twice"),
        (b'{"k": NaN}', "NaN"),
        (b'{"architecture": "topk", "d_in": 1' + b"0" * 5000 + b"}", "beyond a double"),
    ],
)
def test_saelens_load_rejects_hostile_json(tmp_path, text, said):
    write_peer(tmp_path, peer_config())
    (tmp_path / "cfg.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"load_sae: {tmp_path / 'cfg.json'} must be JSON.*{said}"):
        load_sae(tmp_path)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_saelens_load_waits_for_no_fifo(tmp_path, name):
    (write_peer(tmp_path, peer_config()) / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=name):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"apply_b_dec_to_input": "false"},
        {"rescale_acts_by_decoder_norm": 1},
        {"d_in": True},
        {"d_sae": 10**18},
        {"architecture": "standard", "activation_fn": "topk", "activation_fn_kwargs": [3]},
    ],
)
def test_saelens_load_rejects_mistyped_fields(tmp_path, changes):
    write_peer(tmp_path, peer_config(**changes))
    with pytest.raises(ValueError, match="load_sae: "):
        load_sae(tmp_path)


@pytest.mark.parametrize("kind", ["peer", "weights alone", "notes", "link"])
def test_saelens_export_replaces_only_its_own(tmp_path, kind):
    folder = tmp_path / "a"
    if kind == "link":
        elsewhere = export_sae(make_sae(), tmp_path / "elsewhere")
        folder.mkdir()
        for path in elsewhere.iterdir():
            (folder / path.name).symlink_to(path)
    else:
        write_peer(folder, peer_config())
        if kind == "weights alone":
            (folder / "cfg.json").unlink()
        elif kind == "notes":
            (folder / "cfg.json").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match=f"folder must hold no other SAE, got {folder}"):
        export_sae(make_sae(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_saelens_export_goes_on_where_one_was_stopped(tmp_path):
    (export_sae(TopKSAE(8, 32, 4), tmp_path) / "cfg.json").unlink()
    export_sae(make_sae(), tmp_path)
    assert torch.equal(load_sae(tmp_path).w_enc, make_sae().w_enc)
    with owned(tmp_path, "another"), pytest.raises(BlockingIOError, match="beside another"):
        export_sae(make_sae(), tmp_path)


def test_saelens_export_rejects_bad_arguments(tmp_path):
    with pytest.raises(
        TypeError, match=r"export_sae: sae must be a TopKSAE or a BatchTopKSAE, got Linear"
    ):
        export_sae(torch.nn.Linear(3, 3), tmp_path)
    with pytest.raises(TypeError, match=r"export_sae: metadata must be JSON-able"):
        export_sae(make_sae(), tmp_path / "new", metadata={"x": torch.zeros(1)})
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def sae_lens() -> ModuleType:
    return pytest.importorskip("sae_lens")


def assert_same_function(ours: TopKSAE, theirs) -> None:
    """Equal selections; codes and reconstructions within theirs' own fp32 rounding of fp64."""
    x = oracle.randn(500, D, seed=11)
    with torch.no_grad():
        codes, y = theirs.encode(x), theirs(x)
        exact = theirs.to(dtype=torch.float64)
        wanted, wanted_y = exact.encode(x.double()), exact(x.double())
    mine = ours.encode(x)
    assert torch.equal(mine.to_dense() != 0, wanted != 0)
    assert torch.equal(codes != 0, wanted != 0)
    oracle.assert_accurate(mine.to_dense(), wanted, codes)
    oracle.assert_accurate(ours.decode(mine), wanted_y, y)


@pytest.mark.peers
def test_saelens_reads_our_export(tmp_path, sae_lens):
    ours = make_sae()
    export_sae(ours, tmp_path, model_name="gpt2-small", hook_name="blocks.6.hook_resid_post")
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert type(theirs) is sae_lens.TopKSAE
    assert theirs.cfg.metadata.model_name == "gpt2-small"
    assert theirs.cfg.metadata.hook_name == "blocks.6.hook_resid_post"
    assert theirs.cfg.metadata.sae_lens_training_version is None
    assert_same_function(ours, theirs)


@pytest.mark.peers
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_saelens_reads_every_dtype(tmp_path, sae_lens, dtype):
    ours = make_sae(dtype)
    theirs = sae_lens.SAE.load_from_disk(export_sae(ours, tmp_path))
    for name, mine in (("W_enc", ours.w_enc.T), ("W_dec", ours.w_dec), ("b_dec", ours.b_dec)):
        assert oracle.identical(getattr(theirs, name).detach(), mine.detach()), name


@pytest.mark.peers
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("centre", [False, True])
def test_saelens_writes_what_we_read(tmp_path, sae_lens, rescale, centre):
    config = sae_lens.TopKSAEConfig(
        d_in=D,
        d_sae=F,
        k=K,
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=centre,
    )
    theirs = sae_lens.TopKSAE(config)
    theirs.load_state_dict(peer_weights())
    theirs.save_model(tmp_path)
    assert_same_function(load_sae(tmp_path), theirs)


@pytest.mark.peers
@pytest.mark.parametrize("how", ["save_model", "save_inference_model"])
def test_saelens_training_sae_is_read(tmp_path, sae_lens, how):
    theirs = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=D, d_sae=F, k=K))
    theirs.load_state_dict(peer_weights())
    getattr(theirs, how)(tmp_path)
    ours = load_sae(tmp_path)
    assert ours.config.normalize_decoder
    assert_same_function(ours, sae_lens.SAE.load_from_disk(tmp_path))


@pytest.mark.peers
def test_saelens_version_5_means_the_same_there(tmp_path, sae_lens):
    write_peer(tmp_path, old_config())
    assert_same_function(load_sae(tmp_path), sae_lens.SAE.load_from_disk(tmp_path))


@pytest.mark.peers
@pytest.mark.parametrize(
    ("how", "name"), [("save_model", "batchtopk"), ("save_inference_model", "jumprelu")]
)
def test_saelens_batchtopk_is_rejected_by_name(tmp_path, sae_lens, how, name):
    config = sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K)
    getattr(sae_lens.BatchTopKTrainingSAE(config), how)(tmp_path)
    with pytest.raises(ValueError, match=rf"cfg.json must be 'topk' or .*, got '{name}'"):
        load_sae(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_load_refuses_weights_that_are_not_finite(tmp_path, name, value):
    weights = peer_weights()
    weights[name].view(-1)[3] = value
    write_peer(tmp_path, peer_config(), weights)
    with pytest.raises(ValueError, match=f"load_sae: {name} in .* got NaN or inf in 1 of"):
        load_sae(tmp_path)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_load_refuses_transposed_weights(tmp_path, name):
    weights = peer_weights()
    t = weights[name]
    weights[name] = t.T.contiguous() if t.dim() == 2 else t[None]
    write_peer(tmp_path, peer_config(), weights)
    with pytest.raises(ValueError, match=r"sae_weights.safetensors must hold .* by cfg.json, got"):
        load_sae(tmp_path)
