# SPDX-License-Identifier: Apache-2.0
"""What commands read: models and texts by any path, activations kept and used again."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from decoder_cases import saved_tokenizer, tiny
from rich.console import Console

from mikernels import cli
from mikernels.activations import ModelSource, ShardSource, saved
from mikernels.activations.shards import load_rows
from mikernels.cli.inputs import model_path, read_inputs
from mikernels.models.load import LocalModel
from mikernels.training.progress import Board
from mikernels.training.state.metrics import Pace

D, LETTERS = 24, "a b c d e f g h i j k l m n o p q r s t u v w x y z "
SMALL = (
    *("--expansion", 2, "--k", 3, "--batch-size", 50, "--log-every", 1, "--lr", 0.01),
    *("--context", 16),
)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `mikernels ...` in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setenv("COLUMNS", "1000")
        monkeypatch.setattr(sys, "argv", ["mikernels", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny("llama", torch.float32).save_pretrained(folder / "model")
    saved_tokenizer(folder / "model")
    records = [{"id": i, "meta": {"body": LETTERS * 4}} for i in range(20)]
    (folder / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "bad.jsonl").write_text((folder / "t.jsonl").read_text() + '{"id": 21}\n')
    return folder


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def reads(place, *more, text="t.jsonl"):
    return (
        *("train", "--model", place / "model", "--layer", 1, "--text", place / text),
        *("--field", "meta.body", *SMALL, *more),
    )


def test_activations_are_kept_used_again_and_never_others(command, place, tmp_path, monkeypatch):
    acts = tmp_path / "acts"
    keep = ("--save-activations", acts)
    code, out, err = command(*reads(place, "--tokens", 320, "--out", tmp_path / "a", *keep))
    assert code == 0 and f"activations: 320 rows in {acts}" in out, err
    rows, metadata = load_rows(acts)
    local = LocalModel(place / "model")
    texts = read_inputs("x", model=str(place / "model"), layers=[1], text=[place / "t.jsonl"],
                        field="meta.body").texts  # fmt: skip
    source = ModelSource(local.model(), local.tokenizer(), 1, texts, context=16)
    expected = torch.cat([part["activations"] for part in source.read()])
    assert torch.equal(rows["activations"], expected[:320])
    assert set(metadata["pieces"]) == {str(i) for i in rows["token_ids"].unique().tolist()}
    # the same again: no model is run, and the losses are those of --activations
    with monkeypatch.context() as patch:
        patch.setattr(LocalModel, "model", None)
        code, out, err = command(*reads(place, "--tokens", 320, "--out", tmp_path / "b", *keep))
        assert code == 0 and f"activations: read from {acts}" in out, err
        given = ("--activations", acts, *SMALL, "--out", tmp_path / "d")
        assert command("train", *given)[0] == 0
        # a copy of the model elsewhere is the same model, and the first 200 rows are among 320
        shutil.copytree(place / "model", tmp_path / "model")
        moved = reads(place, "--tokens", 200, "--out", tmp_path / "e", *keep)
        moved = (*moved, "--model", tmp_path / "model")
        assert command(*moved)[0] == 0
        for more, message in (
            (("--site", "mlp_out"), "sites = ['1.mlp_out'], got ['1.residual']"),
            (("--context", 8), "context = 8, got 16"),
            (("--tokens", 900), "must hold 900 rows, got 320"),
            (("--text", place / "bad.jsonl"), "of the same texts, got ['t.jsonl'] then and"),
        ):
            code, _, err = command(*reads(place, "--tokens", 200, *keep, *more))
            assert code == 2 and f"{acts} must hold" in err and message in err, err
        (tmp_path / "model" / "config.json").open("a").write("\n")
        code, _, err = command(*moved)
        assert code == 2 and f"of the same model, got another {tmp_path}/model/config.json" in err
    losses = {n: [row["loss"] for row in rows_of(tmp_path / n)] for n in "abd"}
    assert losses["a"] == losses["b"] == losses["d"] and len(losses["a"]) == 7


def test_an_interrupted_collection_is_made_again(command, place, tmp_path, monkeypatch):
    acts = tmp_path / "acts"
    given = reads(place, "--tokens", 320, "--save-activations", acts, "--out", tmp_path / "a")
    written = saved.write_shards

    def stopped(folder, parts, **more):
        def some():
            yield next(parts)
            raise KeyboardInterrupt

        return written(folder, some(), rows_per_shard=50, **more)

    with monkeypatch.context() as patch:
        patch.setattr(saved, "write_shards", stopped)
        assert command(*given)[0] == 130
    names = ["activations-00000.safetensors", "activations-00001.safetensors"]
    assert sorted(path.name for path in acts.iterdir()) == names
    code, _, err = command(*given)
    assert code == 0 and ShardSource(acts).n_rows == 320, err
    # what is not ours stays
    for name, content in (("index.json", None), ("notes.txt", "mine")):
        (acts / name).unlink() if content is None else (acts / name).write_text(content)
    code, _, err = command(*given)
    assert code == 2 and "notes.txt; move it away or choose another folder" in err
    assert len(list(acts.iterdir())) == 2


def test_a_full_disk_is_found_before_the_model_runs(command, place, tmp_path, monkeypatch):
    monkeypatch.setattr(saved.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    monkeypatch.setattr(ModelSource, "read", None)
    acts = tmp_path / "new" / "acts"
    code, _, err = command(*reads(place, "--tokens", "1k", "--save-activations", acts))
    assert code == 1 and "must have 0 MB free for 1,000 rows, got 0 MB; free space" in err
    # a text has no more tokens than bytes
    code, _, err = command(*reads(place, "--tokens", "1b", "--save-activations", acts))
    size = (place / "t.jsonl").stat().st_size
    assert f"must have {size * 120 / 1e6:,.0f} MB free for {size:,} rows" in err
    assert not acts.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "{model}", "--layer", 1, "--text", "{text}", "--field", "meta.body"),
         "--tokens must be given with"),
        (("--model", "{model}", "--layer", 1), "--model needs --layer NUMBER and --text FILE"),
        (("--model", "{model}", "--layer", 1, "--text", "{text}", "--tokens", 9),
         "t.jsonl line 1 must be a record with the field 'text', got ['id', 'meta.body']"),
        (("--model", "{text}", "--layer", 1, "--text", "{text}", "--field", "meta.body",
          "--tokens", 9), "must be a model folder or a .gguf file, got the file"),
        (("--activations", "{npy}", "--text", "{text}"), "--text must go with --model, and"),
        (("--activations", "{npy}", "--save-activations", "x"), "--save-activations must go with"),
        (("--activations", "{npy}", "--activations", "no.npy"), "existing folder of safetensors"),
        (("--activations", "{npy}", "--skip-first", 300), "--skip-first must be in 0..14"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_a_model_is_read(
    command, place, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(LocalModel, "model", None)
    np.save(tmp_path / "x.npy", np.zeros((9, 5), np.float32))
    names = {"model": place / "model", "text": place / "t.jsonl", "npy": tmp_path / "x.npy"}
    filled = [str(a).format(**names) for a in arguments]
    code, _, err = command("train", *SMALL, "--out", tmp_path / "run", *filled)
    assert code == 2 and message in err, err
    assert not (tmp_path / "run").exists()


def test_a_bad_line_ends_a_run_with_its_place(command, place, tmp_path):
    given = reads(place, "--tokens", "10k", "--out", tmp_path / "a", text="bad.jsonl")
    code, _, err = command(*given)
    assert code == 2 and "bad.jsonl line 21 must be a record with the field 'meta.body'" in err


def test_arrays_from_the_command_line(command, tmp_path):
    x = np.random.default_rng(0).standard_normal((200, D)).astype(np.float32)
    np.save(tmp_path / "1.npy", x[:150])
    np.save(tmp_path / "2.npy", x[150:])
    files = [part for n in (1, 2) for part in ("--activations", tmp_path / f"{n}.npy")]
    code, out, err = command("train", *files, *SMALL, "--out", tmp_path / "run")
    assert code == 0 and "200 tokens" in out, err
    code, out, err = command("eval", tmp_path / "run", *files, "--skip", 100)
    assert code == 0 and "Reconstruction of 100 activations" in out, err


def test_models_by_path_name_and_id(tmp_path, monkeypatch):
    for name in ("a.gguf", "b.GGUF"):
        (tmp_path / name).touch()
        local = LocalModel(tmp_path / name)
        assert (local.folder, local.gguf_file, local.name) == (tmp_path, name, name[:1])
        assert local.files() == [tmp_path / name]
    with pytest.raises(ValueError, match="gguf_file must be left out for the file .*got 'b.GGUF'"):
        LocalModel(tmp_path / "a.gguf", "b.GGUF")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_path("x", "~/a.gguf") == tmp_path / "a.gguf"
    import huggingface_hub

    def cached(name, local_files_only):
        assert local_files_only
        if name == "ada/model":
            return str(tmp_path)
        raise huggingface_hub.errors.LocalEntryNotFoundError(name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert model_path("x", "ada/model") == tmp_path
    with pytest.raises(FileNotFoundError, match="^x: --model must be .*`hf download gpt2` fetches"):
        model_path("x", "gpt2")
    with pytest.raises(FileNotFoundError, match="got /no/such/folder; give the path of one"):
        model_path("x", "/no/such/folder")


def test_waiting_for_activations_is_apart_from_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    pace = Pace(torch.device("cpu"))
    for waited, trained in ((60.0, 1.0), (0.5, 2.0)):
        with pace.waiting():
            now[0] += waited
        with pace.training():
            now[0] += trained
    assert pace.read() == (3.0, 60.5)
    pace.mark()
    assert pace.read() == (0.0, 0.0)

    class Event:
        """Of a device that takes 2 s for what the host launches at once."""

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "stream"

        def synchronize(self):
            now[0] = max(now[0], 5.0 + 63.5)

        def elapsed_time(self, end):
            return 2000.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    pace = Pace(torch.device("cuda"))
    for _ in range(2):
        with pace.waiting():
            now[0] += 2.5
        with pace.training():
            now[0] += 0.001
    assert pace.read() == pytest.approx((4.0, 1.002))


def test_collecting_is_shown_on_a_terminal_and_in_a_log():
    for terminal in (True, False):
        console = Console(record=True, force_terminal=terminal, width=120, file=io.StringIO())
        with Board(console) as board:
            report = board.reporter(10, 0, "fused")
            for done in (0, 8, 16):
                report.collecting(done, 16)
                if terminal and done == 8:
                    board._progress.refresh()
        text = console.export_text()
        if terminal:
            assert "activations" in text and "8/16" in text
        else:
            assert text == "activations: reading 16 tokens\n"
