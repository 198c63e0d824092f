# SPDX-License-Identifier: Apache-2.0
"""`mikernels rate`: where items come from, and what is wrong is said before a model runs."""

import json
import random
import sys

import pytest
import torch
from decoder_cases import saved_tokenizer, tiny
from rate_cases import rated, some_items, world

from mikernels import cli
from mikernels.activations import write_shards
from mikernels.circuits import gim_probe
from mikernels.integrations.saelens import export_sae
from mikernels.owning import owned
from mikernels.rate import save_evidence
from mikernels.rate.items import load_items
from mikernels.training import load_sae

pytest.importorskip("flask")
from mikernels.rate import server  # noqa: E402  (after what it needs)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `mikernels ...` in this process; the page is served to nobody."""
    addresses = []

    def serve(session, port, ready, ended):
        ready(f"http://127.0.0.1:{port}/x/")

    def run(*arguments):
        addresses.clear()
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["mikernels", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    monkeypatch.setattr(server, "serve", serve)
    monkeypatch.setattr("webbrowser.open", addresses.append)
    run.opened = addresses
    return run


def test_features_of_a_run_over_text(command, tmp_path):
    tiny("llama", torch.float32).save_pretrained(tmp_path / "model")
    saved_tokenizer(tmp_path / "model")
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=3008)
    (tmp_path / "text.txt").write_text(" ".join(letters))
    where = ("--model", tmp_path / "model", "--text", tmp_path / "text.txt", "--context", 16)
    run = tmp_path / "run"
    small = ("--features", 40, "--k", 2, "--batch-size", 64, "--tokens", 640, "--lr", 0.01)
    code, _, err = command("train", *where, "--layer", 1, "--out", run, *small)
    assert code == 0, err
    plan = ("--features", 3, "--controls", 1, "--repeats", 1, "--questions", 4, "--examples", 2)
    code, out, err = command("rate", run, "--rater", "ada", *where, *plan, "--skip", 1600)
    assert code == 0, err
    assert command.opened == ["http://127.0.0.1:0/x/"] and "5 items to rate as ada" in out
    items = load_items(run / "rate")
    assert items.source["site"] == "1.residual" and items.source["skip"] == 1600
    # the text, without the first position of a window, and what the SAE makes of it there
    sae = load_sae(next(run.glob("checkpoint-*"))).eval()
    ids = torch.tensor([ord(c) - 96 for c in letters])[1600:].split(16)
    with torch.no_grad():
        hidden = tiny("llama", torch.float32)(torch.stack(ids), output_hidden_states=True)
        codes = sae.encode(hidden.hidden_states[2][:, 1:].reshape(-1, sae.config.d)).to_dense()
    read = torch.stack(ids)[:, 1:]
    codes = codes.view(*read.shape, -1)
    for item in items.items:
        for question in item.questions:
            # words have a space before them
            tokens = torch.tensor([ord(token.strip()) - 96 for token in question.tokens])
            found = (read.unfold(1, len(tokens), 1) == tokens).all(-1).nonzero()
            mine = [codes[w, at : at + len(tokens), int(item.name.split()[1])] for w, at in found]
            assert any(
                torch.allclose(torch.tensor(question.scores), row, rtol=1e-3, atol=1e-5)
                for row in mine
            )
    # another rater, the same items; no model
    code, out, err = command("rate", run, "--rater", "bob", "--no-open")
    assert code == 0 and command.opened == [], err
    assert load_items(run / "rate") == items
    code, _, err = command("rate", run, *where)
    assert code == 2 and "items.json must be absent to make items" in err
    with owned(run / "rate", "rate", ".bob.lock"):
        code, _, err = command("rate", run, "--rater", "bob")
        assert code == 1 and "must have one writer at a time" in err


def test_features_of_a_run_of_the_demo(command, tmp_path):
    sae, rows, pieces = world()
    export_sae(sae, tmp_path / "run")
    write_shards(tmp_path / "acts", [rows], metadata={"pieces": pieces})
    spec = {"activations": str(tmp_path / "acts"), "seed": 0, "out_dir": None}
    spec |= {"architecture": "topk", "sae": {}, "config": {}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(spec))
    made = ("--features", 5, "--controls", 2, "--game", "fuzzing")
    code, _, err = command("rate", tmp_path / "run", *made)
    assert code == 0, err
    items = load_items(tmp_path / "run" / "rate")
    assert items.game == "fuzzing" and items.source["activations"] == str(tmp_path / "acts")
    assert len(items.items) == 7 and items.source["usable"] == 8 <= items.source["drawn"] <= 12
    write_shards(tmp_path / "bare", [rows])
    (tmp_path / "run" / "rate" / "items.json").unlink()
    code, _, err = command("rate", tmp_path / "run", "--activations", tmp_path / "bare")
    assert code == 2 and "must have the metadata pieces" in err


def test_components_of_a_probe(command, tmp_path):
    prompts = torch.randint(2, 50, (8, 6), generator=torch.Generator().manual_seed(1))
    save_evidence(gim_probe(tiny("llama", torch.float32), prompts, 7), tmp_path / "probe.json")
    plan = ("--features", 2, "--controls", 1, "--repeats", 0, "--questions", 4, "--examples", 4)
    code, _, err = command("rate", tmp_path / "probe.json", "--rater", "ada", *plan)
    assert code == 0, err
    items = load_items(tmp_path / "probe-rate")
    assert (items.kind, items.game, len(items.items)) == ("component", "fuzzing", 3)
    page = server.make_app(rated(tmp_path / "probe-rate", "bob", None, 0), "x", 1, lambda: None)
    text = page.test_client().get("/x/", base_url="http://127.0.0.1:1").get_data(as_text=True)
    asked = text.split('class="questions"')[1]
    assert asked.count("peak") == 4 and "minus" in text and "Right tokens" in asked
    code, _, err = command("rate", tmp_path / "probe.json", "--game", "detection")
    assert code == 2 and "--game must be fuzzing for components, got 'detection'" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("absent",), "RUN must be a folder or a JSON file"),
        (("run",), "give either --activations PATH, or --model PATH"),
        (("run", "--model", "m"), "--model needs --text FILE"),
        (("run", "--game", "chess"), "--game must be detection or fuzzing for features"),
        (("run", "--rater", "items"), "--rater must be 1 to 40 letters"),
        (("run", "--questions", 3), "questions must be an even number"),
        (("run", "--model", "m", "--text", "t"), "--layer must be given for"),
        (("run", "--report"), "items of a run"),
        (("bad.json",), "bad.json must hold units"),
    ],
)
def test_what_is_wrong_is_said(command, tmp_path, monkeypatch, arguments, message):
    export_sae(world()[0], tmp_path / "run")
    (tmp_path / "bad.json").write_text(
        '{"format": "mikernels-evidence", "version": 1, "label": "x", "units": []}'
    )
    monkeypatch.chdir(tmp_path)
    code, _, err = command("rate", *arguments)
    assert code == 2 and message in err.replace("\n", " "), err


def test_all_rated_needs_no_page(command, tmp_path, monkeypatch):
    folder = tmp_path / "run" / "rate"
    folder.mkdir(parents=True)
    some_items(folder, features=2, controls=0, repeats=0)
    rated(folder, "ada", lambda item, turn: ([True] * 6, 3, ""))
    code, out, _ = command("rate", tmp_path / "run", "--rater", "ada")
    assert code == 0 and "ada has rated all items" in out and command.opened == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = command("rate", tmp_path / "run")
    assert code == 2 and "flask must be installed; `pip install 'mikernels[rate]'`" in err


def test_a_port_that_is_taken():
    with server.listening(0) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(OSError, match=f"rate: --port must be free on 127.0.0.1, got {port}"):
            server.serve(None, port, print, print)
    with pytest.raises(OSError, match="rate: --port must be free on 127.0.0.1, got 70000"):
        server.serve(None, 70_000, print, print)
