# SPDX-License-Identifier: Apache-2.0
"""The whole demo on MNIST, its failures, and what it may clear."""

import io
import json
import re

import pytest
from demo_cases import check_self_contained, needs_mnist
from rich.console import Console

from mikernels.demo import data
from mikernels.demo.compare import step_ms
from mikernels.demo.options import DemoOptions
from mikernels.demo.run import clear_run, run_demo
from mikernels.owning import owned
from mikernels.training import load_sae


@needs_mnist
def test_demo_on_mnist(tmp_path):
    options = DemoOptions(
        data="mnist", expansion=1, k=8, batch_size=200, steps=12, baseline_steps=4, lr=1e-3
    )
    text = io.StringIO()
    assert run_demo(options, tmp_path, Console(file=text, width=200))
    assert "losses agree over 4 common steps" in text.getvalue()
    page = (tmp_path / "mnist" / "report.html").read_text(encoding="utf-8")
    check_self_contained(page)
    assert "losses agree" in page.replace("Losses", "losses")
    assert page.count("data:image/png") > 96
    result = json.loads((tmp_path / "mnist" / "dense" / "run.result.json").read_text())
    assert result["steps"] == 4
    # the checkpoint, on the stored activations as they are, gives the figure that is shown
    rows, _ = data.load_rows(tmp_path / "mnist" / "activations")
    unseen = rows["activations"][data.held_out(rows, options.seed)]
    sae = load_sae(tmp_path / "mnist" / "fused" / "checkpoint-12")
    y = sae.decode(sae.encode(unseen)).detach().double()
    fvu = (y - unseen).square().sum() / (unseen - unseen.double().mean(0)).square().sum()
    assert f"{fvu.item():.4f}" in text.getvalue()
    assert 0.05 < fvu < 0.9
    # one time of a step, in the headline, the table and the plot
    shown = set(re.findall(r"([\d,]+) ms", page))
    medians = {
        f"{step_ms(json.loads((tmp_path / 'mnist' / run / 'run.result.json').read_text())):,.0f}"
        for run in ("dense", "fused")
    }
    assert shown == medians


@needs_mnist
def test_demo_says_that_a_training_process_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("mikernels.demo.run.sys.executable", "/bin/false")
    options = DemoOptions(data="mnist", steps=3, baseline_steps=2)
    with pytest.raises(RuntimeError, match="plain PyTorch must end with status 0, got 1"):
        run_demo(options, tmp_path, Console(file=io.StringIO()))


def test_a_run_is_cleared_of_what_a_demo_left_and_of_nothing_else(tmp_path):
    ours = ("run.json", "run.result.json", "metrics.jsonl", ".run.json.partial")
    for name in ours:
        (tmp_path / name).write_text("old")
    for name in ("checkpoint-3", ".checkpoint-4.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("old")
    (tmp_path / "checkpoint-5").mkdir()
    for strange in (tmp_path / "notes.txt", tmp_path / "checkpoint-3" / "notes.txt"):
        strange.write_text("mine")
        with pytest.raises(FileExistsError, match=f"{tmp_path} must hold a former demo's run"):
            clear_run(tmp_path)
        assert all((tmp_path / name).exists() for name in ours) and strange.read_text() == "mine"
        strange.unlink()
    (tmp_path / "run").symlink_to(tmp_path)
    with pytest.raises(FileExistsError):
        clear_run(tmp_path / "run")
    (tmp_path / "run").unlink()
    clear_run(tmp_path)
    assert not list(tmp_path.iterdir())


@needs_mnist
def test_a_run_that_is_not_ours_to_clear_is_told_as_it_is(tmp_path):
    out, options = tmp_path / "mnist", DemoOptions.for_data("mnist")
    (out / "dense").mkdir(parents=True)
    with owned(out / "dense", "another"), pytest.raises(BlockingIOError, match="beside another of"):
        run_demo(options, tmp_path, Console(quiet=True))
    (out / "dense" / "notes.txt").write_text("mine")
    told = rf"^demo: {out / 'dense'} must hold a former demo's run and nothing else, got .*notes"
    with pytest.raises(FileExistsError, match=told):
        run_demo(options, tmp_path, Console(quiet=True))


def test_two_demos_in_one_folder(tmp_path):
    (tmp_path / "mnist").mkdir()
    refused = pytest.raises(BlockingIOError, match="beside another")
    with owned(tmp_path / "mnist", "another"), refused:
        run_demo(DemoOptions.for_data("mnist"), tmp_path, Console(quiet=True))
