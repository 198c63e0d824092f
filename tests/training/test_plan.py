# SPDX-License-Identifier: Apache-2.0
"""What a run is said to take, beside what it takes. Times are measured, and not tested: what they
are made of is."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from decoder_cases import saved_tokenizer, tiny
from transformers import AutoTokenizer

from mikernels import cli
from mikernels.activations import ModelSource, TensorSource, write_shards
from mikernels.nn import TopKSAE
from mikernels.training import TrainConfig, Trainer, plan, planning
from mikernels.training.state.checkpoint import checkpoints


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(planning, "SECONDS", 0.05)


def made(**more):
    generator = torch.Generator().manual_seed(0)
    return TopKSAE(16, n_features=64, k=4, generator=generator, **more)


def source(batch_size=50):
    return TensorSource(
        torch.randn(500, 16, generator=torch.Generator().manual_seed(1)), batch_size
    )


def size(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def test_bytes_are_those_of_the_run_and_nothing_is_left(tmp_path):
    config = TrainConfig(1000, 50, checkpoint_every=6, keep_checkpoints=2, log_every=5)
    sae, rows = made(), source()
    rows.next_batch()
    before = [p.clone() for p in sae.parameters()], rows.state_dict(), torch.get_rng_state()
    found = plan(sae, rows, config, out_dir=tmp_path / "not" / "yet")
    assert not list(tmp_path.iterdir())
    assert all(map(torch.equal, sae.parameters(), before[0])) and sae.config == made().config
    assert rows.state_dict() == before[1] and torch.equal(torch.get_rng_state(), before[2])
    Trainer(sae, source(), config, out_dir=tmp_path / "run", quiet=True).run()
    each = size(checkpoints(tmp_path / "run")[-1])
    # but for the digits of numbers in state.json and metrics.jsonl
    assert abs(found.checkpoint_bytes - each) < 300
    assert abs(found.kept_bytes - size(tmp_path / "run")) < 900
    assert found.disk_bytes - found.kept_bytes == found.checkpoint_bytes
    assert found.steps == 20 and found.tokens == 1000 and not found.warnings
    assert found.seconds == sum(found.parts.values())
    assert found.parts["steps"] == 20 * found.step_seconds


def test_the_line_of_dead_features():
    """From none at dead_after to all that are assumed at the end, through both measured points."""
    config = TrainConfig(1000, 50, checkpoint_every=8)
    measured = dict(start=1.0, step=2.0, dead_from=4, row=0.5, rows=1000, save=3.0)
    sizes = dict(extra=100, held=10, checkpoint=7, line=1)
    found = planning._summed(
        planning._Measured(dead_steps=[6.0, 14.0], **measured, **sizes), config, 0.2, 1000, 120, 99
    )
    line = torch.tensor([0.0, 4.0, 12.0])
    at = torch.linspace(0, 1, 100_001)
    exact = torch.where(at < 0.25, 4 * at * line[1], line[1] + (at - 0.25) / 0.75 * 8).mean().item()
    assert found.parts["auxk"] == pytest.approx(16 * exact, rel=1e-4)
    assert found.parts["checkpoints"] == 3 * 3.0 and found.parts["source"] == 500
    assert found.seconds_without_dead == found.seconds - found.parts["auxk"]
    assert (found.extra_bytes, found.total_bytes, found.warnings) == (100, 1110, [])
    none = planning._Measured(dead_steps=[], **measured, **sizes)
    tight = planning._summed(none, config, 0.2, 1000, 109, 20)
    assert tight.parts["auxk"] == 0 and tight.dead_step_seconds is None
    assert [w.split(":")[0] for w in tight.warnings] == ["memory", "disk"]


def test_auxk_is_measured_where_features_can_die():
    config = TrainConfig(1000, 50)
    found = plan(made(), source(), config)
    assert found.dead_step_seconds is not None and found.checkpoint_bytes == found.disk_bytes == 0
    for sae in (made(aux_coefficient=0.0), made(dead_after=10_000)):
        assert plan(sae, source(), config).dead_step_seconds is None


def test_a_model_is_read_in_whole_blocks(tmp_path):
    texts = ["a b c d e f g h " * 20] * 3
    saved_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    more = dict(context=16, buffer_rows=64)
    rows = ModelSource(tiny("llama", torch.float32), tokenizer, 0, texts, 50, **more)
    sae = TopKSAE(rows.d, n_features=64, k=4)
    before = rows.state_dict()
    fed, seconds, read, held = planning._source(rows, TrainConfig(1000, 50))
    assert rows.state_dict() == before and seconds > 0 and len(fed.next_batch()) == 50
    # 4 windows of 16 tokens are a block, each without its first; a row has three numbers beside it
    block = 4 * 15
    assert read == math.ceil(1000 / block) * block and held == 2 * block * (rows.d * 4 + 3 * 8)
    assert plan(sae, rows, TrainConfig(1000, 50)).parts["source"] > 0
    once = ModelSource(rows.model, tokenizer, 0, iter(texts), 50, **more)
    with pytest.raises(ValueError, match="plan: texts must be a list"):
        plan(sae, once, TrainConfig(1000, 50))


def test_what_cannot_fit_is_not_tried(monkeypatch, tmp_path):
    config = TrainConfig(1000, 50)
    monkeypatch.setattr(planning, "_measure", None)
    monkeypatch.setattr(planning, "available_memory", lambda: 1000)
    found = plan(made(), source(), config)
    assert math.isnan(found.seconds) and found.warnings[0].startswith("memory: the gradients")
    monkeypatch.setattr(planning, "available_memory", lambda: None)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: _Free)
    found = plan(made(), source(), config, out_dir=tmp_path)
    assert found.warnings[0].startswith("disk: a checkpoint")
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(NotADirectoryError, match="plan: out_dir must be a folder, got .*file;"):
            plan(made(), source(), config, out_dir=out)
    for share in (-0.1, 1.5, math.nan, "much", True):
        with pytest.raises(ValueError, match="plan: dead must be a share"):
            plan(made(), source(), config, dead=share)


class _Free:
    free = 9


def test_an_interrupted_plan_offers_nothing_to_resume(tmp_path, monkeypatch):
    class Stopped(TensorSource):
        def next_batch(self):
            if list(tmp_path.iterdir()):
                raise KeyboardInterrupt
            return super().next_batch()

    stopped = Stopped(torch.randn(500, 16), 50)
    before = stopped.state_dict()
    with pytest.raises(KeyboardInterrupt, match="plan: interrupted; nothing is left of it"):
        plan(made(), stopped, TrainConfig(1000, 50), out_dir=tmp_path / "run")
    assert not list(tmp_path.iterdir()) and stopped.state_dict() == before


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mikernels", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, capsys.readouterr().out

    return run


def test_the_command_takes_the_options_of_train(command, tmp_path, monkeypatch):
    write_shards(tmp_path / "acts", [torch.randn(600, 8)])
    options = ("--activations", tmp_path / "acts", "--expansion", 2, "--k", 3)
    options += ("--batch-size", 50, "--out", tmp_path / "run", "--arch", "batch_topk")
    code, out = command("plan", *options, "--dead", 0.2, "--json", tmp_path / "plan.json")
    told = json.loads((tmp_path / "plan.json").read_text())
    assert code == 0 and out.startswith("12 steps, 600 tokens\ntime ")
    assert told["steps"] == 12 and told["dead"] == 0.2 and told["checkpoint_bytes"] > 0
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(planning, "available_memory", lambda: 1000)
    code, out = command("train", *options, "--plan")
    assert code == 1 and "warning memory: " in out and not (tmp_path / "run").exists()
