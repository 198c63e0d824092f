# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: exact resume, kills, interruptions, damaged files, full disks."""

import copy
import errno
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracle import identical, num_threads, randn
from safetensors.torch import load_file

from mikernels import tensor_files
from mikernels.files import sealed
from mikernels.nn import TopKSAE
from mikernels.tensor_files import write_tensors
from mikernels.training import TrainConfig, Trainer, load_sae
from mikernels.training.checkpoint import checkpoints
from mikernels.training.sources import TensorSource

D, F, K, BATCH, STEPS = 16, 64, 4, 32, 14
CONFIG = {
    "total_tokens": STEPS * BATCH,
    "batch_size": BATCH,
    "lr": 3e-3,
    "log_every": 3,
    "checkpoint_every": 4,
    "warmup_steps": 5,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with num_threads(1):
        yield


def make(out_dir: Path | None, *, k: int = K, seed: int = 0, optimizer=None, **settings) -> Trainer:
    # other initial weights every time: what is resumed comes from the checkpoint
    sae = TopKSAE(D, F, k, dead_after=3 * BATCH, k_aux=5)
    source = TensorSource(randn(200, D, seed=1), BATCH, seed)
    config = TrainConfig(**{**CONFIG, **settings})
    optimizer = optimizer(sae.parameters()) if optimizer else None
    return Trainer(sae, source, config, optimizer=optimizer, out_dir=out_dir, quiet=True)


def rows(out_dir: Path) -> list[dict]:
    """Without the timings."""
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    timings = ("step_ms", "tokens_per_second")
    return [{name: v for name, v in row.items() if name not in timings} for row in lines]


def stop_after(trainer: Trainer, step: int, number: int = signal.SIGINT) -> None:
    """The signal comes in the midst of a step."""
    give, sent = trainer.source.next_batch, []

    def next_batch() -> torch.Tensor:
        if trainer.step == step - 1 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return give()

    trainer.source.next_batch = next_batch  # type: ignore[method-assign]


@pytest.fixture
def uninterrupted(tmp_path, request) -> tuple[Path, Trainer]:
    torch.manual_seed(7)
    trainer = make(tmp_path / "whole", **getattr(request, "param", {}))
    trainer.run()
    return tmp_path / "whole", trainer


@pytest.mark.parametrize(
    "uninterrupted",
    [
        {},
        {"dtype": "bfloat16"},
        {"accumulation": 2, "total_tokens": 2 * STEPS * BATCH, "k_start": 9, "k_anneal_steps": 8},
        {"step": "autograd"},
        {"step": "autograd", "optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)},
    ],
    ids=["fused", "bfloat16", "accumulation", "autograd", "sgd"],
    indirect=True,
)
def test_a_resumed_run_has_the_same_bits(uninterrupted, tmp_path, request) -> None:
    whole, reference = uninterrupted
    settings = request.node.callspec.params["uninterrupted"]
    torch.manual_seed(7)
    first = make(tmp_path / "parts", **settings)
    stop_after(first, 5)  # between two logged steps, and not where checkpoints are due
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert [path.name for path in checkpoints(tmp_path / "parts")] == [
        "checkpoint-4",
        "checkpoint-5",
    ]
    second = make(tmp_path / "parts", **settings)
    assert second.resume() == 5
    history = second.run()
    assert rows(tmp_path / "parts") == rows(whole)
    assert [row["step"] for row in history.rows] == [3, 6, 9, 12, 14]
    assert max(row["aux_loss"] for row in history.rows) > 0
    for name, value in reference.sae.state_dict().items():
        assert identical(value, second.sae.state_dict()[name]), name


def test_the_newest_checkpoints_are_kept_and_load_as_an_sae(uninterrupted) -> None:
    whole, trainer = uninterrupted
    assert [path.name for path in checkpoints(whole)] == ["checkpoint-12", "checkpoint-14"]
    assert sorted(path.name for path in whole.iterdir()) == [
        "checkpoint-12",
        "checkpoint-14",
        "metrics.jsonl",
    ]
    sae = load_sae(whole / "checkpoint-14")
    assert sae.config == trainer.sae.config
    x = randn(9, D)
    assert identical(sae(x).reconstruction, trainer.sae(x).reconstruction)
    assert torch.equal(sae.tokens_since_fired, trainer.sae.tokens_since_fired)


def test_a_finished_run_can_be_prolonged(uninterrupted) -> None:
    whole, _ = uninterrupted
    before = rows(whole)
    longer = make(whole, total_tokens=20 * BATCH, keep_checkpoints=1)
    assert longer.resume() == STEPS
    longer.run()
    assert rows(whole)[: len(before)] == before and rows(whole)[-1]["step"] == 20
    assert [path.name for path in checkpoints(whole)] == ["checkpoint-20"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_saved_and_says_how_to_go_on(number, tmp_path, capfd) -> None:
    trainer = make(tmp_path)
    former = signal.getsignal(number)
    stop_after(trainer, 6, number)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as raised:
        trainer.run()
    if number == signal.SIGTERM:
        assert raised.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(number) is former
    said = capfd.readouterr().err
    assert f"interrupted after step 6, saved {tmp_path / 'checkpoint-6'}" in said
    assert "call resume() before run()" in said


KILLED = {"checkpoint_every": 2, "log_every": 1, "total_tokens": 60 * BATCH}


def train_and_die(out_dir: Path, when: str) -> None:
    """In a process of its own: resume, and at the given moment of a save, SIGKILL."""
    torch.manual_seed(7)
    trainer = make(out_dir, **KILLED)
    if checkpoints(out_dir):
        trainer.resume()
    calls, fsync, rename = [], os.fsync, os.rename

    def die_at_fsync(descriptor):
        calls.append(descriptor)
        # two of a trial at the start, eight a save, the metrics first: the second file of the fifth
        # checkpoint is being flushed
        if len(calls) == 38:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    def die_at_rename(source, target):
        if trainer.step >= 30:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.fsync = die_at_fsync if when == "fsync" else fsync
    os.rename = die_at_rename if when == "rename" else rename
    trainer.run()


def kill_and_resume(out_dir: Path) -> None:
    """Kills children of a fresh process, which has no threads yet that a fork would lose."""
    torch.set_num_threads(1)
    make(None)  # imports what the first optimiser imports, once for all children
    for when in ("fsync", "rename", "any moment", "never"):
        if (child := os.fork()) == 0:
            train_and_die(out_dir, when)
            os._exit(0)
        if when == "any moment":
            while int(checkpoints(out_dir)[-1].name.split("-")[1]) < 34:
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(when, status)
        newest = checkpoints(out_dir)[-1]
        assert load_sae(newest).config.d == D
        if status:
            assert status == -signal.SIGKILL
            assert int(newest.name.split("-")[1]) >= rows_of_killed(out_dir) - 2
        if when in ("fsync", "rename"):
            assert any(path.name.startswith(".checkpoint") for path in out_dir.iterdir())


def rows_of_killed(out_dir: Path) -> int:
    """The last step that was logged; the last line may be cut."""
    return (out_dir / "metrics.jsonl").read_text().count("\n")


def test_a_killed_run_loses_nothing_older_than_the_last_interval(tmp_path, run_python) -> None:
    said = run_python(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import test_checkpoint
        test_checkpoint.kill_and_resume(Path({str(tmp_path / "killed")!r}))
        """
    )
    assert said.splitlines()[:2] == ["fsync -9", "rename -9"] and "never 0" in said
    torch.manual_seed(7)
    whole = make(tmp_path / "whole", **KILLED)
    whole.run()
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(1, 61))
    killed = load_sae(tmp_path / "killed" / "checkpoint-60").state_dict()
    for name, value in whole.sae.state_dict().items():
        assert identical(value, killed[name]), name


def test_a_new_run_refuses_the_folder_of_another(uninterrupted, tmp_path) -> None:
    whole, _ = uninterrupted
    with pytest.raises(FileExistsError, match=r"without checkpoints .* call resume\(\)"):
        make(whole).run()
    with pytest.raises(FileNotFoundError, match="must hold a checkpoint-<step> folder"):
        make(tmp_path / "empty").resume()
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        make(None).resume(tmp_path / "missing")
    with pytest.raises(ValueError, match="must be the newest checkpoint of out_dir"):
        make(whole).resume(whole / "checkpoint-12")
    # an older one continues elsewhere
    elsewhere = make(tmp_path / "elsewhere")
    assert elsewhere.resume(whole / "checkpoint-12") == 12
    assert elsewhere.run().rows[-1]["step"] == STEPS


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"k": 5}, "must hold k = 5, got 4"),
        ({"lr": 1e-3}, "must hold lr = 0.001, got 0.003"),
        ({"dtype": "bfloat16"}, "must hold dtype = bfloat16, got None"),
        ({"step": "autograd"}, "must hold step = autograd, got fused"),
        ({"seed": 5}, "same data|seed"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(uninterrupted, settings, difference) -> None:
    whole, _ = uninterrupted
    trainer = make(whole, **settings)
    before = {name: t.clone() for name, t in trainer.sae.state_dict().items()}
    with pytest.raises(ValueError, match=difference):
        trainer.resume()
    assert trainer.step == 0
    assert all(identical(t, before[name]) for name, t in trainer.sae.state_dict().items())


def refuse(path: Path, change, *, sealed_again: bool = True) -> None:
    """Change a JSON file, with the checksum of its contents made to fit."""
    state = json.loads(path.read_text())
    change(state)
    if sealed_again and isinstance(state.get("sha256"), dict):
        files_ = {name: v for name, v in state.pop("sha256").items() if name != "self"}
        state = sealed(state, **files_)
    path.write_text(json.dumps(state))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _foreign_json(path: Path) -> None:
    path.write_text('{"format": "another", "version": 2}')


def _lacks_entries(path: Path) -> None:
    refuse(path, lambda state: state.pop("source"))


def rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other tensors, with their checksum in the state."""
    hashed = write_tensors(path, tensors)
    refuse(path.parent / "state.json", lambda state: state["sha256"].update({path.name: hashed}))


def _foreign_tensors(path: Path) -> None:
    rewrite(path, {"weight": torch.zeros(3)})


def _other_shape(path: Path) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    rewrite(path, {**tensors, name: torch.zeros(3)})


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        (
            "state.json",
            _truncate,
            "mikernels-checkpoint, version 1 or 2, got no JSON",
        ),
        ("state.json", _foreign_json, "got format 'another', version 2"),
        ("state.json", _lacks_entries, "must hold source: field required, got nothing"),
        ("state.json", Path.unlink, "got no such file"),
        ("sae.safetensors", _truncate, "a complete safetensors file, got SafetensorError"),
        ("sae.safetensors", _foreign_tensors, "must hold b_dec = torch.float32 .16., got none"),
        ("sae.safetensors", _other_shape, r"got torch.float32 \[3\]"),
        ("training.safetensors", _truncate, "a complete safetensors file"),
        ("training.safetensors", _other_shape, r"got torch.float32 \[3\]"),
        ("training.safetensors", Path.unlink, "No such file"),
    ],
)
def test_a_damaged_checkpoint_is_named(uninterrupted, name, damage, expected) -> None:
    whole, _ = uninterrupted
    path = whole / "checkpoint-14" / name
    damage(path)
    trainer = make(whole)
    with pytest.raises(ValueError, match=expected) as raised:
        trainer.resume()
    assert str(path) in str(raised.value)
    # the one before it is whole
    shutil.rmtree(path.parent)
    assert make(whole).resume() == 12


def test_a_full_disk_leaves_the_former_checkpoint(tmp_path, monkeypatch) -> None:
    trainer = make(tmp_path)
    write, calls = tensor_files.write_all, []

    def fill(file, data):
        calls.append(len(data))
        if trainer.step == 8:  # in the second checkpoint
            write(file, data[:1])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, data)

    monkeypatch.setattr(tensor_files, "write_all", fill)
    with pytest.raises(OSError, match="free disk space, then resume") as raised:
        trainer.run()
    assert raised.value.errno == errno.ENOSPC
    assert str(tmp_path / "checkpoint-4") in str(raised.value) and "is intact" in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "metrics.jsonl"]
    monkeypatch.undo()
    again = make(tmp_path)
    assert again.resume() == 4
    assert again.run().rows[-1]["step"] == STEPS


def test_writes_that_really_fail_leave_the_former_checkpoint(tmp_path) -> None:
    make(tmp_path).run()
    trainer = make(tmp_path, total_tokens=64 * BATCH)
    trainer.resume()
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the kernel refuses to let a file grow beyond this, in the midst of the weights
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, former[1]))
    try:
        with pytest.raises(OSError, match="a checkpoint must be written to .*checkpoint-14 is int"):
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-12", "checkpoint-14"]
    assert not list(tmp_path.glob(".checkpoint*"))
    assert make(tmp_path, total_tokens=64 * BATCH).resume() == STEPS


def test_what_cannot_be_saved_is_refused_before_the_first_step(tmp_path, monkeypatch) -> None:
    trainer = make(tmp_path / "a")
    trainer.source.state_dict = lambda: {"at": torch.zeros(1)}  # type: ignore[method-assign]
    with pytest.raises(TypeError, match="must be JSON-able"):
        trainer.run()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    full = make(tmp_path / "b")
    with pytest.raises(OSError, match="MB free for checkpoints, got 0 MB") as raised:
        full.run()
    assert raised.value.errno == errno.ENOSPC and full.step == 0


def test_the_metrics_file_is_cut_to_the_resumed_step(uninterrupted) -> None:
    whole, _ = uninterrupted
    path = whole / "metrics.jsonl"
    complete = rows(whole)
    path.write_text(path.read_text() + '{"step": 15}\n{"step": 16, "los')
    again = make(whole)
    again.resume()
    assert len(again.run().rows) == len(complete)
    assert rows(whole) == complete
    path.write_text("not json\n" + path.read_text())
    broken = make(whole)
    broken.resume()
    with pytest.raises(ValueError, match="one JSON object a line, got line 1: 'not json'"):
        broken.run()


def everything(trainer: Trainer) -> list:
    """All that a restore changes, as plain values."""
    optimizer = trainer.optimizer.state_dict()
    tensors = {**trainer.sae.state_dict(), "generator": torch.get_rng_state()}
    tensors |= {f"{i}.{n}": v for i, e in optimizer["state"].items() for n, v in e.items()}
    plain = [trainer.step, trainer.tokens, trainer.means.read(), trainer.means.count]
    plain += [trainer.history.parts, trainer.source.state_dict(), optimizer["param_groups"]]
    values = {name: t.tolist() if isinstance(t, torch.Tensor) else t for name, t in tensors.items()}
    return copy.deepcopy([values, plain])


def fields(value, at: tuple = ()) -> Iterator[tuple]:
    """The place of every entry of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in items:
        yield (*at, name)
        if isinstance(item, dict | list):
            yield from fields(item, (*at, name))


MISSING = object()
MUTATIONS = {
    "missing": MISSING,
    "null": None,
    "negative": -1,
    "NaN": float("nan"),
    "inf": float("inf"),
    "string": "1",
    "huge": 10**18,
    "list": [1],
    "dict": {"x": 1},
    "bool": True,
    "fraction": 0.5,
}
# what a file with a checksum that fits may say instead: other measurements, a schedule of FREE, a
# setting of the optimiser, and a version-1 file's fields
VALID = {"means", "parts", "tokens", "total_tokens", "log_every", "checkpoint_every"}
VALID |= {"keep_checkpoints", "cuda_graph", "eps", "lr", "betas", "offset", "epoch", "step"}
VALID |= {"project", "unit_norm", "weight_decay", "momentum", "dampening", "scale"}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"step": "autograd"},
        {"step": "autograd", "optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)},
    ],
    ids=["fused", "autograd", "sgd"],
)
def test_every_field_of_a_state_is_checked_before_any_is_used(mutation, settings, tmp_path) -> None:
    trainer = make(tmp_path / "a", **settings)
    trainer.run()
    path = tmp_path / "a" / "checkpoint-14" / "state.json"
    whole, value = path.read_text(), MUTATIONS[mutation]
    torch.manual_seed(3)
    fresh = make(tmp_path / "a", **settings)
    before = everything(fresh)
    accepted = set()
    for place in fields(json.loads(whole)):

        def change(state, place=place):
            *outer, last = place
            for name in outer:
                state = state[name]
            if value is MISSING:
                del state[last]
            else:
                state[last] = value

        # with the checksum made to fit, unless that is what is changed
        for again in (False, True) if place[0] != "sha256" else (False,):
            path.write_text(whole)
            unchanged = json.loads(whole)
            change(changed := json.loads(whole))
            if json.dumps(changed) == json.dumps(unchanged):
                continue
            refuse(path, change, sealed_again=again)
            try:
                fresh.resume()
            except ValueError as error:
                assert str(path.parent) in str(error)
                named = [str(name) for name in place if isinstance(name, str)]
                hint = {"sha256", "NaN", "Infinity"}
                assert any(name in str(error) for name in {*named[-2:], *hint}), (place, str(error))
            else:
                assert again, f"{place} is covered by no checksum"
                accepted.add(place)
                fresh = make(tmp_path / "a", **settings)
                fresh.sae.load_state_dict(trainer.sae.state_dict())
                torch.manual_seed(3)
                before = everything(fresh)
            assert everything(fresh) == before, place
    for place in accepted:
        assert VALID & set(place), place
