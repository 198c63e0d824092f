# SPDX-License-Identifier: Apache-2.0
"""Metrics beside metrics.jsonl: the same values, resumed without doubles, never at a run's cost."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import num_threads, randn

from mikernels.activations import TensorSource
from mikernels.nn import TopKSAE
from mikernels.training import (
    RunInfo,
    TensorBoardLogger,
    TrainConfig,
    Trainer,
    TrainerGroup,
    WandbLogger,
)
from mikernels.training.loggers.wandb import ID

STEPS, BATCH = 6, 16


def trainer(out_dir: Path | None, log_to, steps: int = STEPS) -> Trainer:
    torch.manual_seed(0)
    config = TrainConfig(
        steps * BATCH, BATCH, lr=1e-3, log_every=1, checkpoint_every=2, decay="constant"
    )
    source = TensorSource(randn(100, 8, seed=1), BATCH)
    return Trainer(TopKSAE(8, 16, 2), source, config, out_dir=out_dir, log_to=log_to, quiet=True)


@pytest.fixture(autouse=True)
def one_thread():
    with num_threads(1):
        yield


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Recorded:
    """A logger of one's own."""

    def __init__(self, fails: str = ""):
        self.fails, self.said = fails, []

    def start(self, run: RunInfo) -> None:
        self.said.append(run)
        self._may_fail("start")

    def log(self, row: dict) -> None:
        self.said.append(dict(row))
        row.clear()  # its own copy
        if len(self.said) == 3:
            self._may_fail("log")

    def finish(self, failed: bool) -> None:
        self.said.append(failed)
        self._may_fail("finish")

    def _may_fail(self, where: str) -> None:
        if where in self.fails:
            raise RuntimeError(f"{where} is down")


def test_any_logger_gets_what_metrics_jsonl_gets(tmp_path) -> None:
    own = Recorded()
    made = trainer(tmp_path / "run", [own])
    history = made.run()
    info, *rows, failed = own.said
    assert rows == history.rows == lines(tmp_path / "run") and failed is False
    assert (info.name, info.out_dir, info.step) == ("run", tmp_path / "run", 0)
    assert info.settings["sae"]["k"] == 2 and info.settings["config"]["batch_size"] == BATCH
    json.dumps(info.settings)


@pytest.mark.filterwarnings("ignore:Trainer. the run goes on")
@pytest.mark.parametrize(
    ("fails", "said", "calls"),
    [
        ("log", "gets no more rows, since log raised RuntimeError: log is down", 4),
        ("finish", "may lack its last rows, since finish raised RuntimeError: finish", 8),
        ("log finish", "could not be finished either", 4),
    ],
)
def test_a_logger_that_fails_loses_nothing_of_the_run(fails, said, calls, tmp_path) -> None:
    bad, good = Recorded(fails), Recorded()
    with pytest.warns(RuntimeWarning, match=said):
        history = trainer(tmp_path, [bad, good]).run()
    assert len(history.rows) == STEPS and lines(tmp_path) == history.rows == good.said[1:-1]
    assert len(bad.said) == calls and (tmp_path / "checkpoint-6").is_dir()


def test_a_logger_that_does_not_start_refuses_the_run(tmp_path) -> None:
    first, second = Recorded(), Recorded("start")
    with pytest.raises(RuntimeError, match="start is down"):
        trainer(tmp_path, [first, second]).run()
    assert first.said[1:] == [True] and lines(tmp_path) == []
    with pytest.raises(TypeError, match=r"must be a list of loggers, got one Recorded; pass"):
        trainer(None, first)
    for bad in (Recorded, print, "tensorboard"):
        with pytest.raises(TypeError, match="objects with start"):
            trainer(None, [bad])


def test_a_diverged_run_is_finished_as_failed(tmp_path) -> None:
    own = Recorded()
    made = trainer(tmp_path, [own])
    inner = made._step_on

    def diverge(batches) -> None:
        inner(batches)
        made.sae.b_dec.data.fill_(torch.nan)

    made._step_on = diverge  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError):
        made.run()
    assert own.said[-1] is True


@pytest.mark.parametrize(
    ("package", "kind"), [("tensorboard", TensorBoardLogger), ("wandb", WandbLogger)]
)
def test_a_missing_package_is_named_before_training(package, kind, monkeypatch) -> None:
    inner = builtins.__import__

    def without(name, globals=None, locals=None, fromlist=(), level=0):
        if package in (name, *(fromlist or ())):
            raise ImportError(name)
        return inner(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=f"the package {package} must be installed; `pip"):
        kind()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_the_metrics_also_of_a_resumed_run(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(ValueError, match="folder must be given for a run without out_dir"):
        trainer(None, [TensorBoardLogger()]).run()
    torn = trainer(tmp_path / "run", [TensorBoardLogger()])
    inner = torn._step_on

    def kill(batches) -> None:
        if torn.step == 5:
            raise KeyboardInterrupt  # one step was logged past the checkpoint at 4
        inner(batches)

    torn._step_on = kill  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        torn.run()
    assert len(lines(tmp_path / "run")) == 5
    made = trainer(tmp_path / "run", [TensorBoardLogger()])
    assert made.resume() == 4
    made.run()
    rows = lines(tmp_path / "run")
    shown = scalars(tmp_path / "run")
    assert shown.keys() == {f"train/{name}" for name in rows[0]} - {"train/step"}
    for tag, values in shown.items():
        name = tag.removeprefix("train/")
        assert values == [(row["step"], float(np.float32(row[name]))) for row in rows], tag


def test_loggers_of_a_group_are_one_for_each(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    for log_to in ([TensorBoardLogger()], None):
        made = {n: trainer(tmp_path / n, log_to or [TensorBoardLogger()], 2) for n in ("a", "b")}
        group = TrainerGroup(made)
        if log_to:
            with pytest.raises(
                ValueError, match="one run at a time, got a second, b; make one for"
            ):
                group.run()
            continue
        group.run()
        assert [len(scalars(tmp_path / n)["train/fvu"]) for n in ("a", "b")] == [2, 2]


class FakeRun:
    def __init__(self, options):
        self.options, self.rows, self.code = options, [], None
        self.id = options.get("id", "abc123")

    def log(self, row, step):
        self.rows.append((step, row))

    def finish(self, exit_code):
        self.code = exit_code


def test_wandb_is_called_as_documented(tmp_path, monkeypatch) -> None:
    """init(...), log(row, step=), finish(exit_code=), by a recorded stand-in: no service starts."""
    wandb = pytest.importorskip("wandb")
    runs: list[FakeRun] = []

    def init(**options):
        runs.append(FakeRun(options))
        return runs[-1]

    monkeypatch.setattr(wandb, "init", init)
    trainer(tmp_path / "run", [WandbLogger(project="saes")], 4).run()
    (run,) = runs
    options = run.options
    assert options["project"] == "saes" and options["name"] == "run"
    assert options["dir"] == str(tmp_path / "run") and options["reinit"] == "create_new"
    assert options["config"]["sae"]["k"] == 2 and "id" not in options
    assert run.rows == [(row["step"], row) for row in lines(tmp_path / "run")] and run.code == 0
    assert (tmp_path / "run" / ID).read_text() == "abc123\n"
    longer = trainer(tmp_path / "run", [WandbLogger()])
    longer.resume()
    longer.run()
    assert (runs[1].options["id"], runs[1].options["resume"]) == ("abc123", "allow")
    assert [step for step, _ in runs[1].rows] == [5, 6]
    (tmp_path / "run" / ID).write_bytes(b"\xff/../c")
    longest = trainer(tmp_path / "run", [WandbLogger()], 8)
    longest.resume()
    longest.run()
    assert "id" not in runs[2].options


def test_wandb_itself_offline(tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    group = {n: trainer(tmp_path / n, [WandbLogger()], 2) for n in ("a", "b")}
    histories = TrainerGroup(group).run()
    for name, history in histories.items():
        (file,) = (tmp_path / name / "wandb").glob("offline-run-*/*.wandb")
        held = file.read_bytes()
        assert (tmp_path / name / ID).read_text().strip().encode() in held
        assert repr(history.rows[-1]["fvu"]).encode() in held
