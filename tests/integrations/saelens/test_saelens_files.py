# SPDX-License-Identifier: Apache-2.0
"""SAELens' format on the disk: whole, ours, or named by its fault."""

import json
import os

import pytest
import torch
from saelens_cases import BECOMES, VARIANTS, D, F, K, make, peer_config, peer_weights, write_peer
from safetensors.torch import load_file, save_file

from mikernels.integrations.saelens import export, export_sae, load_sae
from mikernels.nn import TopKSAE
from mikernels.owning import owned


def test_saelens_export_replaces_an_earlier_one(tmp_path):
    export_sae(TopKSAE(8, 32, 4), tmp_path)
    for name in VARIANTS:
        sae = make(name)
        loaded = load_sae(export_sae(sae, tmp_path))
        assert type(loaded) is type(sae) and torch.equal(loaded.w_enc, sae.w_enc)


def test_saelens_load_rejects_foreign_tensors(tmp_path):
    write_peer(tmp_path, peer_config(), {"weight": torch.zeros(F, D)})
    with pytest.raises(ValueError, match=r"sae_weights.safetensors must hold .* got \{'weight'"):
        load_sae(tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "foreign"])
def test_saelens_load_names_the_damaged_file(tmp_path, variant, name, damage):
    path = export_sae(make(variant), tmp_path) / name
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
    export_sae(make("topk"), tmp_path)
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
    assert torch.equal(load_sae(tmp_path).w_enc, make("topk").w_enc)


def test_saelens_export_never_shows_a_mixture(tmp_path, monkeypatch):
    """Stopped before either of its renames, the folder says that it holds no SAE."""
    replace = export.os.replace
    for stop in range(2):
        folder = tmp_path / str(stop)
        export_sae(TopKSAE(8, 32, 4), folder)
        calls = []

        def replace_until(source, target, stop=stop, calls=calls):
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(target)
            replace(source, target)

        monkeypatch.setattr(export.os, "replace", replace_until)
        with pytest.raises(KeyboardInterrupt):
            export_sae(make("topk"), folder)
        monkeypatch.undo()
        with pytest.raises(FileNotFoundError, match=r"cfg.json"):
            load_sae(folder)
        assert not list(folder.glob(".*"))


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


@pytest.mark.parametrize("kind", ["peer", "weights alone", "notes", "link"])
def test_saelens_export_replaces_only_its_own(tmp_path, kind):
    folder = tmp_path / "a"
    if kind == "link":
        elsewhere = export_sae(make("topk"), tmp_path / "elsewhere")
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
        export_sae(make("topk"), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_saelens_export_goes_on_where_one_was_stopped(tmp_path):
    (export_sae(TopKSAE(8, 32, 4), tmp_path) / "cfg.json").unlink()
    export_sae(make("topk"), tmp_path)
    assert torch.equal(load_sae(tmp_path).w_enc, make("topk").w_enc)
    with owned(tmp_path, "another"), pytest.raises(BlockingIOError, match="beside another"):
        export_sae(make("topk"), tmp_path)


def test_saelens_export_rejects_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match=r"export_sae: metadata must be JSON-able"):
        export_sae(make("topk"), tmp_path / "new", metadata={"x": torch.zeros(1)})
    assert not (tmp_path / "new").exists()


TENSORS = [(a, name) for a in BECOMES for name in peer_weights(a)]


@pytest.mark.parametrize(("architecture", "name"), TENSORS)
def test_load_names_the_tensor_that_is_wrong(tmp_path, architecture, name):
    config, weights = peer_config(architecture), peer_weights(architecture)
    t = weights[name]
    wrong = r"sae_weights.safetensors must hold .* by cfg.json, got"
    without = {key: value for key, value in weights.items() if key != name}
    turned = t.T.contiguous() if t.dim() == 2 else t[None]
    for damaged in (without, weights | {name: turned}, weights | {"another": t.clone()}):
        write_peer(tmp_path, config, damaged)
        with pytest.raises(ValueError, match=wrong):
            load_sae(tmp_path, k=K)
    for value in (float("nan"), float("-inf")):
        damaged = weights | {name: t.clone()}
        damaged[name].view(-1)[3] = value
        write_peer(tmp_path, config, damaged)
        with pytest.raises(ValueError, match=f"load_sae: {name} in .* got NaN or inf in 1 of"):
            load_sae(tmp_path, k=K)
    write_peer(tmp_path, config, weights | {name: t.int()})
    with pytest.raises(ValueError, match=f"must be with {name} of one of"):
        load_sae(tmp_path, k=K)


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka", "jumprelu", "transcoder"])
def test_a_negative_threshold_of_ours_is_damage(tmp_path, name):
    path = export_sae(make(name), tmp_path) / "sae_weights.safetensors"
    weights = load_file(path)
    weights["threshold"].fill_(-0.25)
    save_file(weights, path)
    with pytest.raises(ValueError, match=f"threshold in {path} must be at least 0, got -0.25"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("topk", {"architecture": "relu"}, "architecture of 'topk', got 'relu'"),
        ("gated", {"architecture": "topk"}, "architecture of 'gated', got 'topk'"),
        (
            "jumprelu",
            {"architecture": "crosscoder"},
            "architecture of 'jumprelu', got 'crosscoder'",
        ),
        ("jumprelu", {"architecture": ["jumprelu"]}, "architecture of 'jumprelu', got"),
        ("jumprelu", {"architecture": None}, "architecture of 'jumprelu', got None"),
        ("jumprelu", {"target_l0": "6"}, "target_l0: input should be a valid number, got '6'"),
        ("jumprelu", {"target_l0": None}, "target_l0 must be a number with sparsity='quadratic'"),
        ("gated", {"colour": 1}, "colour: unexpected keyword argument, got 1"),
        ("batch_topk", {"k": True}, "k: input should be a valid number, got True"),
        ("matryoshka", {"widths": [F, 2]}, "widths must ascend"),
        ("transcoder", {"k": -1.0}, "k must be above 0"),
    ],
)
def test_load_names_the_setting_that_is_wrong(tmp_path, name, changes, said):
    path = export_sae(make(name), tmp_path) / "cfg.json"
    config = json.loads(path.read_text())
    config["metadata"]["mikernels_sae"].update(changes)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"load_sae: {path} must .*metadata.mikernels_sae.*{said}"):
        load_sae(tmp_path)


def test_load_rejects_settings_that_are_no_object(tmp_path):
    path = export_sae(make("topk"), tmp_path) / "cfg.json"
    config = json.loads(path.read_text())
    config["metadata"]["mikernels_sae"] = [1]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="metadata.mikernels_sae.architecture of 'topk', got None"):
        load_sae(tmp_path)
