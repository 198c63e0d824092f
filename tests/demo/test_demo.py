# SPDX-License-Identifier: Apache-2.0
"""The whole demo on MNIST, its failures, and what it may clear."""

import io
import json
import re
import sys

import pytest
from demo_cases import check_self_contained, needs_mnist, table_rows
from made_features import MadeUp
from rich.console import Console

from mikernels.activations.shards import load_rows
from mikernels.demo import data
from mikernels.demo.compare import step_ms
from mikernels.demo.options import DemoOptions
from mikernels.demo.run import clear_run, run_demo
from mikernels.demo.variants import OTHERS, TOPK, VARIANTS
from mikernels.owning import owned
from mikernels.report import write_report
from mikernels.training import load_sae

SMALL = dict(data="mnist", expansion=1, k=8, batch_size=200, steps=12, baseline_steps=4, lr=1e-3)


def result_of(folder):
    return json.loads((folder / "run.result.json").read_text())


def held_out_fvu_and_l0(folder, checkpoint, options):
    """What the page says of a run, from what lies beside it."""
    rows, _ = load_rows(folder / "activations")
    unseen = rows["activations"][data.held_out(rows, options.seed)]
    codes = (sae := load_sae(checkpoint)).encode(unseen)
    y = sae.decode(codes).detach().double()
    fvu = (y - unseen).square().sum() / (unseen - unseen.double().mean(0)).square().sum()
    return float(fvu), float(codes.l0().double().mean())


@needs_mnist
def test_demo_on_mnist(tmp_path):
    options = DemoOptions(**SMALL, variants=False)
    text = io.StringIO()
    assert run_demo(options, tmp_path, Console(file=text, width=200))
    assert "losses agree over 4 common steps" in text.getvalue()
    folder = tmp_path / "mnist"
    page = (folder / "report.html").read_text(encoding="utf-8")
    check_self_contained(page)
    assert "losses agree" in page.replace("Losses", "losses")
    assert page.count("data:image/png") > 96
    assert result_of(folder / "dense")["steps"] == 4
    # the checkpoint, on the stored activations as they are, gives the figure that is shown
    fvu, _ = held_out_fvu_and_l0(folder, folder / "fused" / "checkpoint-12", options)
    assert f"{fvu:.4f}" in text.getvalue()
    assert 0.05 < fvu < 0.9
    # one time of a step, in the headline, the table and the plot
    shown = set(re.findall(r"([\d,]+) ms", page))
    assert shown == {f"{step_ms(result_of(folder / run)):,.0f}" for run in ("dense", "fused")}
    # no trace of variants that were not asked for
    assert "--no-variants" in page
    said = page + text.getvalue()
    assert not any(variant.title in said.replace("TopK", "") for variant in OTHERS)
    assert not any((folder / variant.folder).exists() for variant in OTHERS)


@needs_mnist
def test_demo_shows_the_variants_side_by_side(tmp_path):
    folder, options = tmp_path / "mnist", DemoOptions(**SMALL)
    for variant in OTHERS:  # what a former demo, or an interrupted one, left
        (folder / variant.folder / "checkpoint-9").mkdir(parents=True)
        (folder / variant.folder / ".run.json.partial").write_text("old")
    text = io.StringIO()
    assert run_demo(options, tmp_path, Console(file=text, width=200))
    page = (folder / "report.html").read_text(encoding="utf-8")
    check_self_contained(page)
    assert not re.search(r"\bnan\b", re.sub('data:image/png[^"]*', "", page), re.I)
    assert "--no-variants" not in page
    rows, said = table_rows(page), text.getvalue().splitlines()
    for variant in VARIANTS:
        run = folder / variant.folder
        # all on the same activations, in the same order, for as many steps
        spec, result = json.loads((run / "run.json").read_text()), result_of(run)
        assert spec["architecture"] == variant.architecture
        assert (spec["seed"], spec["config"]) == (options.seed, options.config.to_dict())
        assert result["steps"] == 12
        assert sorted(path.name for path in run.glob("*checkpoint*")) == ["checkpoint-12"]
        fvu, l0 = held_out_fvu_and_l0(folder, run / "checkpoint-12", options)
        dead = result["rows"][-1]["dead_fraction"]
        cells = (f"{fvu:.4f}", f"{l0:.1f}", f"{dead:.1%}", f"{step_ms(result):,.0f}")
        (row,) = [row for row in rows if row[0] == variant.title]
        assert row[1:-1] == cells
        assert any(all(cell in line for cell in row) for line in said)
        title = "mikernels, fused" if variant is TOPK else f"{variant.title}, fused"
        assert f"training 12 steps of 200 tokens: {title}" in said
        # an end in the wide and the narrow figure
        assert page.count(f">{variant.title}</text>") == 2
        assert f"{dead:.1%} dead, L0 {l0:.1f}" in page


@needs_mnist
@pytest.mark.parametrize(
    ("folder", "title"), [("dense", "plain PyTorch"), ("jumprelu", "JumpReLU, fused")]
)
def test_demo_says_which_training_process_failed(tmp_path, monkeypatch, folder, title):
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh\ncase "$3" in */{folder}/run.json) exit 3;; esac\n"""
        f"""exec {sys.executable} "$@"\n"""
    )
    python.chmod(0o755)
    monkeypatch.setattr("mikernels.demo.run.sys.executable", str(python))
    options = DemoOptions(**{**SMALL, "steps": 3, "baseline_steps": 2})
    with pytest.raises(RuntimeError, match=f"process of {title} must end with status 0, got 3"):
        run_demo(options, tmp_path, Console(file=io.StringIO(), width=200))
    assert not (tmp_path / "mnist" / "report.html").exists()


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
    write_report(MadeUp(9), tmp_path / "report")
    clear_run(tmp_path)
    assert not list(tmp_path.iterdir())


@needs_mnist
@pytest.mark.parametrize("name", ["dense", "jumprelu"])
def test_a_run_that_is_not_ours_to_clear_is_told_as_it_is(tmp_path, name):
    run, options = tmp_path / "mnist" / name, DemoOptions.for_data("mnist")
    run.mkdir(parents=True)
    text = io.StringIO()
    with owned(run, "another"), pytest.raises(BlockingIOError, match="beside another of"):
        run_demo(options, tmp_path, Console(file=text))
    (run / "notes.txt").write_text("mine")
    told = rf"^demo: {run} must hold a former demo's run and nothing else, got .*notes"
    with pytest.raises(FileExistsError, match=told):
        run_demo(options, tmp_path, Console(file=text))
    # before anything is trained
    assert "training" not in text.getvalue()


@needs_mnist
def test_settings_that_no_variant_has_are_refused_before_anything_is_trained(tmp_path):
    text = io.StringIO()
    options = DemoOptions(**{**SMALL, "k": 785})
    with pytest.raises(ValueError, match=r"TopKSAE: k must be in 1\.\.784"):
        run_demo(options, tmp_path, Console(file=text))
    assert "training" not in text.getvalue()


def test_two_demos_in_one_folder(tmp_path):
    (tmp_path / "mnist").mkdir()
    refused = pytest.raises(BlockingIOError, match="beside another")
    with owned(tmp_path / "mnist", "another"), refused:
        run_demo(DemoOptions.for_data("mnist"), tmp_path, Console(quiet=True))
