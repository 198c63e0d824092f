# SPDX-License-Identifier: Apache-2.0
"""`mikernels report`: every kind of SAE opens, figures are the judges', and bad input is said."""

import json
import random
import sys

import pytest
import torch
from decoder_cases import saved_tokenizer, tiny
from made_features import read
from variants import VARIANTS, batch_of, make, train

from mikernels import cli
from mikernels.activations import ModelSource, TextFiles, write_shards
from mikernels.evaluate import measure_reconstruction, measure_spliced
from mikernels.integrations.saelens import export_sae
from mikernels.nn import TopKSAE
from mikernels.training import TrainConfig, Trainer, load_sae

N, WINDOW = 300, 20
KINDS = [name for name in VARIANTS if "," not in name]


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `mikernels report ...` in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["mikernels", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


def shards(folder, sae, **more):
    """Activations that the SAE takes, of tokens `w0`, `w1`, ..."""
    batch = batch_of(sae, N)
    rows = {
        "activations": batch.input,
        "token_ids": torch.arange(N) % 30,
        "windows": torch.arange(N) // WINDOW,
    }
    if batch.target is not None:
        rows["targets"] = batch.target
    metadata = {"pieces": {str(i): f" w{i}" for i in range(30)}} | more
    write_shards(folder, [rows], metadata=metadata)
    return batch


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_sae_opens(command, tmp_path, kind):
    train(make(kind), steps=1, out_dir=tmp_path / "run")
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    sae = load_sae(checkpoint).eval()
    batch = shards(tmp_path / "acts", sae)
    code, out, err = command(
        *(tmp_path / "run", "--activations", tmp_path / "acts", "--json", tmp_path / "found.json"),
        *("--skip", 20, "--tokens", 260, "--batch-size", 64),
    )
    assert code == 0, err
    found = json.loads((tmp_path / "found.json").read_text())
    kept = batch.map(lambda t: t[20:280])
    right = measure_reconstruction(sae, kept)
    assert found["reconstruction"]["fvu"] == pytest.approx(right.fvu, rel=1e-6)
    assert found["tokens"] == right.tokens == 260 and f"{right.fvu:.4f}" in out
    codes = sae.encode(kept.input).to_dense()
    shown = [
        feature
        for chunk in sorted((tmp_path / "run" / "report" / "data").glob("features-*"))
        for feature in read(tmp_path / "run" / "report", chunk.stem)["features"]
    ]
    assert [feature["count"] for feature in shown] == (codes != 0).sum(0).tolist()
    assert (tmp_path / "run" / "report" / "index.html").is_file()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a text, and an SAE trained on it."""
    folder = tmp_path_factory.mktemp("report")
    tiny("llama", torch.float32).save_pretrained(folder / "model")
    saved_tokenizer(folder / "model")
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=200)
    (folder / "text.txt").write_text(" ".join(letters))
    x = torch.randn(1000, 24, generator=torch.Generator().manual_seed(0))
    sae = TopKSAE(24, 60, 4, generator=torch.Generator().manual_seed(0))
    from mikernels.activations import TensorSource

    config = TrainConfig(total_tokens=1000, batch_size=100, lr=0.01, log_every=1)
    Trainer(sae, TensorSource(x, 100), config, out_dir=folder / "run", quiet=True).run()
    export_sae(load_sae(folder / "run" / "checkpoint-10"), folder / "lens")
    return folder


def options(place, *more):
    return (
        *("--model", place / "model", "--layer", 1, "--context", 16),
        *("--text", place / "text.txt", *more),
    )


def test_a_run_over_text_with_its_model(command, place, tmp_path):
    code, out, err = command(
        *(place / "run", *options(place, "--json", tmp_path / "f.json", "--seed", 5)),
        *("--neuronpedia", tmp_path / "pedia", "--title", "Mine & <yours>", "--examples", 3),
    )
    assert code == 0, err
    found = json.loads((tmp_path / "f.json").read_text())
    tokens = torch.tensor([ord(c) - 96 for c in (place / "text.txt").read_text().split()])
    windows = [w for w in tokens.split(16) if len(w) == 16]
    sae = load_sae(place / "run" / "checkpoint-10")
    right = measure_spliced(tiny("llama", torch.float32), 1, windows, sae, seed=5)
    assert found["spliced"]["losses"] == pytest.approx(right.losses, rel=1e-6)
    folder = place / "run" / "report"
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert f"{right.losses['sae']:.4f}" in page and f"{right.losses['sae']:.4f}" in out
    assert "Mine &amp; &lt;yours&gt;" in page and "<h3>Training</h3>" in page
    said = f"mikernels report {place / 'run'} --model {place / 'model'} --layer 1 --context 16"
    assert said in page
    (feature, *_) = read(folder, "features-00000")["features"]
    assert len(feature["promoted"]) == 8 and len(feature["similar"]) == 8
    assert (tmp_path / "pedia" / "model" / "1-res-60" / "release.jsonl").is_file()
    # again, without what is slow: the former report is replaced; checkpoints and SAELens beside it
    before = (folder / "index.html").read_bytes()
    for run, at in (("run", folder), ("run/checkpoint-10", "run/checkpoint-10-report"),
                    ("lens", "lens-report")):  # fmt: skip
        code, _, err = command(place / run, *options(place, "--no-spliced", "--features", "7,0-2"))
        assert code == 0, err
        numbers = [f["number"] for f in read(place / at, "features-00000")["features"]]
        assert numbers == [7, 0, 1, 2]
    assert (folder / "index.html").read_bytes() != before
    assert (place / "run" / "checkpoint-10" / "state.json").is_file()
    load_sae(place / "run" / "checkpoint-10")


def test_the_site_of_a_transcoder_is_what_its_run_says(command, place, tmp_path):
    from mikernels.models.load import load_model
    from mikernels.nn import Transcoder

    model, tokenizer = load_model(place / "model")
    source = ModelSource(
        model, tokenizer, "1.mlp_in", TextFiles([place / "text.txt"]), 32, target="1.mlp_out",
        context=16, buffer_rows=64,
    )  # fmt: skip
    config = TrainConfig(total_tokens=64, batch_size=32, lr=0.01)
    sae = Transcoder(24, 48, 4, d_out=24, generator=torch.Generator().manual_seed(0))
    Trainer(sae, source, config, out_dir=tmp_path / "run", quiet=True).run()
    given = options(place, "--json", tmp_path / "f.json")
    code, _, err = command(tmp_path / "run", *(o for o in given if o not in ("--layer", 1)))
    assert code == 0, err
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["site"] == "1.mlp_in" and found["spliced"] is None
    # what it learned to give back: against its own input it would be far worse
    assert found["reconstruction"]["fvu"] > 0
    rows = list(source.read())
    from mikernels.values.batch import Batch

    trained = load_sae(next((tmp_path / "run").glob("checkpoint-*"))).eval()
    batch = Batch(*(torch.cat([r[n] for r in rows]) for n in ("activations", "targets")))
    assert found["reconstruction"]["mse"] == pytest.approx(
        measure_reconstruction(trained, batch.map(lambda t: t[: found["tokens"]])).mse, rel=1e-4
    )


def test_what_is_wrong_is_said_before_a_model_is_read(command, place, tmp_path):
    shards(tmp_path / "bare", make("topk"), pieces=None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    run = place / "run"
    for arguments, said in (
        ((run,), "give either --activations PATH, or --model PATH"),
        ((tmp_path,), "SAE must be a folder with a checkpoint"),
        ((run, *options(place), "--features", "3-60"), "--features must be all, or numbers"),
        ((run, *options(place), "--features", "x"), "got 'x' in 'x'"),
        ((run, *options(place), "--out", tmp_path / "mine"), "must be absent, empty or a former"),
        ((run, *options(place), "--json", tmp_path / "no" / "f.json"), "--json must be a file of"),
        ((run, *options(place), "--context", 3000), "--text must hold a window of 3000 tokens"),
        ((run, *options(place), "--neuronpedia", tmp_path / "p", "--neuronpedia-source", "a"),
         "--neuronpedia-source must be MODEL/LAYER-SET"),
        ((run, "--activations", tmp_path / "bare"), "must have the metadata pieces"),
    ):  # fmt: skip
        code, _, err = command(*arguments)
        assert code == 2 and said in " ".join(err.split()), (arguments, err)
    assert not (run.parent / "p").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
