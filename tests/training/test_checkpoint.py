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
from full_disk import largest_file
from oracle import identical, num_threads, randn
from safetensors.torch import load_file
from torch import nn

from mikernels import tensor_files
from mikernels.activations import TensorSource
from mikernels.files import sealed
from mikernels.nn import TopKSAE
from mikernels.owning import owned
from mikernels.tensor_files import write_tensors
from mikernels.training import TrainConfig, Trainer, load_sae
from mikernels.training.state.checkpoint import checkpoints

# for another process to import this file
PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
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


# a run that has come to its end is not resumed
LONGER = {"total_tokens": (STEPS + 1) * BATCH}


def make(out_dir: Path | None, *, k: int = K, seed: int = 0, optimizer=None, **settings) -> Trainer:
    # other initial weights every time: what is resumed comes from the checkpoint
    sae = TopKSAE(D, F, k, dead_after=3 * BATCH, k_aux=5)
    source = TensorSource(5 * randn(200, D, seed=1), BATCH, seed)  # its scale is 1 / 4
    config = TrainConfig(**{**CONFIG, **settings})
    optimizer = optimizer(sae.parameters()) if optimizer else None
    return Trainer(sae, source, config, optimizer=optimizer, out_dir=out_dir, quiet=True)


def rows(out_dir: Path) -> list[dict]:
    """Without the timings."""
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    timings = ("step_ms", "tokens_per_second", "waiting_seconds")
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
        {"step": "dense", "optimizer": lambda p: torch.optim.Adafactor(p, lr=0.01)},
    ],
    ids=["fused", "bfloat16", "accumulation", "autograd", "sgd", "adafactor"],
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
        sys.path[:0] = {PATHS!r}
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
    trainer = make(whole, **settings, **LONGER)
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
            "mikernels-checkpoint, version 1 to 3, got no JSON",
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
    # in the midst of the weights
    said = "a checkpoint must be written to .*checkpoint-14 is int"
    with largest_file(8000), pytest.raises(OSError, match=said):
        trainer.run()
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
    shutil.rmtree(whole / "checkpoint-14")
    again = make(whole)
    again.resume()
    assert len(again.run().rows) == len(complete)
    assert rows(whole) == complete
    path.write_text("not json\n" + path.read_text())
    shutil.rmtree(whole / "checkpoint-14")
    broken = make(whole)
    broken.resume()
    with pytest.raises(ValueError, match="one JSON object a line, got line 1: 'not json'"):
        broken.run()


def everything(trainer: Trainer) -> list:
    """All that a restore changes, as plain values."""
    optimizer = trainer.optimizer.state_dict()
    tensors = {**trainer.sae.state_dict(), "generator": torch.get_rng_state()}
    tensors |= {f"{i}.{n}": v for i, e in optimizer["state"].items() for n, v in e.items()}
    plain = [trainer.step, trainer.tokens, trainer.means.read(), trainer.means.tokens]
    plain += [
        trainer.history.parts,
        trainer.history.scale,
        trainer.config,
        trainer.sae.config,
        trainer.source.state_dict(),
        optimizer["param_groups"],
    ]
    # as bytes, twenty times faster than as lists of numbers
    values = {
        name: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        if isinstance(t, torch.Tensor)
        else t
        for name, t in tensors.items()
    }
    return [values, copy.deepcopy(plain)]


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
    "beyond a double": 10**400,
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
    fresh = make(tmp_path / "a", **settings, **LONGER)
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
                hint = {"sha256", "NaN", "Infinity", "beyond a double"}
                assert any(name in str(error) for name in {*named[-2:], *hint}), (place, str(error))
            else:
                assert again, f"{place} is covered by no checksum"
                accepted.add(place)
                fresh = make(tmp_path / "a", **settings, **LONGER)
                fresh.sae.load_state_dict(trainer.sae.state_dict())
                torch.manual_seed(3)
                before = everything(fresh)
            assert everything(fresh) == before, place
    for place in accepted:
        assert VALID & set(place), place


@pytest.mark.parametrize("name", ["sae.safetensors", "training.safetensors", "state.json"])
def test_a_flipped_bit_is_refused_and_nothing_is_touched(uninterrupted, name) -> None:
    whole, _ = uninterrupted
    path = whole / "checkpoint-14" / name
    data = bytearray(path.read_bytes())
    # the last mantissa bit of a number, a digit of the state
    at = len(data) - 40 if name != "state.json" else data.index(b'"tokens": ') + 10
    data[at] ^= 1
    path.write_bytes(data)
    trainer = make(whole)
    before = everything(trainer)
    with pytest.raises(ValueError, match="SHA-256") as raised:
        trainer.resume()
    assert str(path) in str(raised.value) and everything(trainer) == before
    with pytest.raises(ValueError, match=f"{path} must .* SHA-256"):
        load_sae(path.parent)


FIRST = {"scale_activations": False, "decay": "constant"}


def as_version_1(folder: Path) -> None:
    def change(state):
        del state["sha256"], state["scale"], state["config"]["scale_activations"]
        del state["sae"]["architecture"]
        state["version"] = 1
        tokens, sums = state["means"]["tokens"], state["means"]["sums"]
        sums = {name: value / BATCH for name, value in sums.items()}
        state["means"] = {"sums": sums, "count": int(tokens) // BATCH}
        for group in state["optimizer"]["param_groups"]:
            del group["weight_decay"]

    refuse(folder / "state.json", change)


@pytest.mark.parametrize("uninterrupted", [FIRST], indirect=True)
def test_version_1_loads_with_a_warning_and_is_checked_as_far_as_it_goes(uninterrupted) -> None:
    whole, trainer = uninterrupted
    as_version_1(whole / "checkpoint-14")
    with pytest.warns(UserWarning, match="version 1, which has no checksums"):
        sae = load_sae(whole / "checkpoint-14")
    assert all(identical(t, trainer.sae.state_dict()[n]) for n, t in sae.state_dict().items())
    longer = make(whole, total_tokens=20 * BATCH, **FIRST)
    with pytest.warns(UserWarning, match="weighs AuxK anew"):
        assert longer.resume() == STEPS
    assert longer.means.read() == trainer.means.read()
    assert longer.run().rows[-1]["step"] == 20
    assert json.loads((whole / "checkpoint-20" / "state.json").read_text())["version"] == 3


@pytest.mark.parametrize("uninterrupted", [FIRST | {"decay": "linear"}], indirect=True)
def test_settings_of_version_1_are_told_as_they_mean_today(uninterrupted) -> None:
    """Its linear decay began where the warm-up ended: the same words are another schedule now."""
    whole, _ = uninterrupted
    as_version_1(whole / "checkpoint-14")
    said = (
        r"decay_steps = None, got 9; its .* mean today \{.*'decay_steps': 9.*'scale_activations': F"
    )
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=said):
        make(whole, **FIRST | {"decay": "linear"}).resume()
    with pytest.warns(UserWarning):
        same = make(whole, **FIRST | LONGER | {"decay": "linear", "decay_steps": STEPS - 5})
        assert same.resume() == STEPS


def _nan(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[3] = float("nan")
    return t


@pytest.mark.parametrize("uninterrupted", [FIRST], indirect=True)
@pytest.mark.parametrize(
    ("name", "key", "change", "said"),
    [
        ("sae", "w_enc", _nan, "must hold finite w_enc, got NaN or inf in 1 of 1,024 places"),
        ("sae", "w_dec", lambda t: t.T.contiguous(), r"w_dec = torch.float32 \[64, 16\]"),
        ("sae", "b_enc", lambda t: t[None], r"b_enc = torch.float32 \[64\], got .* \[1, 64\]"),
        ("sae", "tokens_since_fired", lambda t: t - 10**9, "tokens_since_fired of at least 0"),
        ("sae", "b_dec", lambda t: t.double(), "b_dec = torch.float32"),
        ("training", "optimizer.0.exp_avg", _nan, "finite optimizer.0.exp_avg"),
        ("training", "optimizer.0.exp_avg_sq", lambda t: -t - 1, "exp_avg_sq must be at least 0"),
        ("training", "optimizer.2.exp_avg", lambda t: t[:3], r"must be a tensor of shape \[64\]"),
        ("training", "optimizer.1.exp_avg", lambda t: t.long(), "must be floating"),
        ("training", "optimizer.0.exp_avg", lambda t: None, "exp_avg"),
        ("training", "torch_generator", lambda t: t[:100], "a state of torch's generator, got"),
        ("training", "torch_generator", lambda t: t.int(), "a state of torch's generator, got"),
        ("training", "torch_generator", lambda t: None, "torch_generator: .* got nothing"),
    ],
)
def test_tensors_are_checked_without_checksums_too(uninterrupted, name, key, change, said) -> None:
    whole, _ = uninterrupted
    folder = whole / "checkpoint-14"
    as_version_1(folder)
    path = folder / f"{name}.safetensors"
    tensors = {**load_file(path), key: change(load_file(path)[key])}
    tensors = {n: t for n, t in tensors.items() if t is not None}
    write_tensors(path, tensors)
    if name == "training":
        described = {n: f"{t.dtype} {list(t.shape)}" for n, t in tensors.items()}
        refuse(folder / "state.json", lambda state: state.update(tensors=described))
    trainer = make(whole, **FIRST)
    before = everything(trainer)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=said) as raised:
        trainer.resume()
    assert str(folder) in str(raised.value) and everything(trainer) == before
    if name == "sae" and key != "b_dec":
        with pytest.warns(UserWarning), pytest.raises(ValueError, match=said):
            load_sae(folder)


def test_sizes_are_compared_before_memory_is_asked_for(uninterrupted) -> None:
    whole, _ = uninterrupted
    path = whole / "checkpoint-14" / "state.json"
    refuse(path, lambda state: state["sae"].update(n_features=10**15))
    with pytest.raises(ValueError, match=r"must hold b_enc = torch.float32 \[1000000000000000\]"):
        load_sae(path.parent)


def test_loading_leaves_torchs_generator_alone(uninterrupted) -> None:
    whole, _ = uninterrupted
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_sae(whole / "checkpoint-14")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("failing", ["source", "optimizer"])
def test_a_load_that_fails_half_way_is_taken_back(failing, uninterrupted) -> None:
    whole, _ = uninterrupted
    trainer = make(whole, **LONGER)
    load, before = trainer.source.load_state_dict, everything(trainer)

    def half(state):
        load(state)
        if state["offset"]:
            raise KeyError("at")

    def never(state):
        trainer.optimizer.__setstate__({"state": {}, "param_groups": []})
        raise RuntimeError("its own hook")

    if failing == "source":
        trainer.source.load_state_dict = half  # type: ignore[method-assign]
    else:
        trainer.optimizer.load_state_dict = never  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="must hold a source position and optimiser state"):
        trainer.resume()
    assert everything(trainer) == before


def test_a_shorter_run_than_the_checkpoint_is_refused(uninterrupted) -> None:
    whole, _ = uninterrupted
    with pytest.raises(ValueError, match="total_tokens must be at least 448 .* got 256"):
        make(whole, total_tokens=8 * BATCH).resume()


def test_two_runs_in_one_folder(tmp_path, run_python) -> None:
    """The second is told of the first, which loses nothing."""
    first = make(tmp_path)
    give, told = first.source.next_batch, []

    def next_batch() -> torch.Tensor:
        if first.step == 9 and not told:
            for call in (make(tmp_path).run, make(tmp_path).resume):
                with pytest.raises(
                    BlockingIOError, match=f"beside Trainer of process {os.getpid()}"
                ):
                    call()
                told.append(call)
            said = run_python(
                f"""
                import sys
                sys.path[:0] = {PATHS!r}
                import test_checkpoint as t
                try:
                    t.make(t.Path({str(tmp_path)!r})).run()
                except OSError as error:
                    print(error)
                """
            )
            assert (
                f"one writer at a time, got a second beside Trainer of process {os.getpid()}"
                in said
            )
        return give()

    first.source.next_batch = next_batch  # type: ignore[method-assign]
    first.run()
    assert len(told) == 2 and [row["step"] for row in rows(tmp_path)] == [3, 6, 9, 12, 14]
    assert not (tmp_path / ".mikernels.lock").exists()


def test_a_run_that_went_on_after_resume_is_not_overwritten(uninterrupted) -> None:
    whole, _ = uninterrupted
    late, early = (make(whole, total_tokens=n * BATCH) for n in (20, 18))
    assert late.resume() == early.resume() == STEPS
    early.run()
    with pytest.raises(FileExistsError, match="must hold checkpoint-14, .*got .*checkpoint-18"):
        late.run()
    assert rows(whole)[-1]["step"] == 18


def test_only_our_own_folders_are_deleted(tmp_path) -> None:
    names = (".checkpoint-mine", ".checkpoint-4.partial.bak", ".checkpoint-x.old", "checkpoint-old")
    names += (".checkpoint-٣.partial", "checkpoint-٣", ".checkpoint-04.old", "checkpoint-007")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "sae.safetensors").write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "state.json").write_text("mine")
    (tmp_path / ".checkpoint-1.partial").mkdir()
    (tmp_path / ".checkpoint-1.partial" / ".state.json.partial").write_text("ours, interrupted")
    trainer = make(tmp_path, keep_checkpoints=1)
    give = trainer.source.next_batch

    def next_batch() -> torch.Tensor:
        if trainer.step == 9:
            (tmp_path / "checkpoint-8" / "notes.txt").write_text("mine")
        return give()

    trainer.source.next_batch = next_batch  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"checkpoint-8 holds \['notes.txt'\] beside a checkpoint"):
        trainer.run()
    for name in names:
        assert (tmp_path / name / "sae.safetensors").read_text() == "mine"
    assert (elsewhere / "state.json").read_text() == "mine"
    assert (tmp_path / "checkpoint-8" / "notes.txt").read_text() == "mine"
    left = {path.name for path in tmp_path.iterdir()} - set(names)
    assert left == {"elsewhere", "metrics.jsonl", "checkpoint-8", "checkpoint-14"}
    assert load_sae(tmp_path / "checkpoint-8").config.d == D


@pytest.mark.parametrize("name", ["checkpoint-9", ".checkpoint-9.partial", ".checkpoint-9.old"])
@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_what_has_a_checkpoints_name_is_neither_followed_nor_deleted(name, kind, tmp_path) -> None:
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    (elsewhere / "state.json").write_text("mine")
    out.mkdir()
    if kind == "link":
        (out / name).symlink_to(elsewhere)
    elif kind == "file":
        (out / name).write_text("mine")
    else:
        (out / name).mkdir()
        (out / name / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name}"):
        make(out).run()
    assert (elsewhere / "state.json").read_text() == "mine"
    assert [path.name for path in out.iterdir()] == [name]


@pytest.mark.parametrize("lost", ["folder", "metrics", "replaced", "moved"])
@pytest.mark.parametrize("last", [5, 14], ids=["midway", "at the end"])
def test_a_run_whose_folder_vanishes_ends_in_an_error(lost, last, tmp_path) -> None:
    out = tmp_path / "out"
    trainer = make(out, log_every=3, checkpoint_every=1000)
    save = trainer._save

    def lose() -> None:
        if lost == "folder":
            shutil.rmtree(out)
        elif lost == "metrics":
            (out / "metrics.jsonl").unlink()
        elif lost == "replaced":
            (out / "metrics.jsonl").replace(tmp_path / "away")
            (out / "metrics.jsonl").write_text("")
        else:
            out.rename(tmp_path / "moved")
            out.mkdir()

    give = trainer.source.next_batch
    if last == STEPS:
        trainer._save = lambda lines: (save(lines), lose())  # type: ignore[method-assign]
    else:

        def next_batch() -> torch.Tensor:
            if trainer.step == last:
                lose()
            return give()

        trainer.source.next_batch = next_batch  # type: ignore[method-assign]
    with pytest.raises(FileNotFoundError, match=f"{out}.* got (it was deleted|another)"):
        trainer.run()
    assert trainer.step == (6 if last == 5 else STEPS) and trainer.history.rows[-1]["step"] >= 6
    # nothing was made anew in the place of what was lost
    assert not list(out.glob("checkpoint-*")) if out.exists() and lost == "moved" else True


def test_metrics_on_a_full_disk_are_explained_once_and_stay_whole(tmp_path) -> None:
    trainer = make(tmp_path, log_every=1, checkpoint_every=1000)
    give, former = trainer.source.next_batch, resource.getrlimit(resource.RLIMIT_FSIZE)

    def next_batch() -> torch.Tensor:
        if trainer.step == 4:
            size = (tmp_path / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, former[1]))
        return give()

    trainer.source.next_batch = next_batch  # type: ignore[method-assign]
    try:
        with pytest.raises(OSError, match="metrics must be written to .*File too large.*resume"):
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_metrics_that_are_no_file_are_refused(kind, tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    trainer = make(tmp_path)
    with pytest.raises(ValueError, match=f"{path} must be a file of JSON lines, got a"):
        trainer.run()
    assert trainer.step == 0


@pytest.mark.parametrize(
    "line",
    ['{"step": -1}', '{"step": true}', '{"step": 1, "loss": "x"}', '{"loss": 1}', "[1]"]
    + ['{"step": 1, "loss": NaN}', '{"step": 1, "step": 2}', "[" * 5000, "\ufeff{}"],
)
def test_rows_of_metrics_are_checked(line, uninterrupted) -> None:
    whole, _ = uninterrupted
    path = whole / "metrics.jsonl"
    path.write_text(line + "\n" + path.read_text())
    trainer = make(whole, total_tokens=20 * BATCH)
    trainer.resume()
    with pytest.raises(ValueError, match=f"{path}.* line 1"):
        trainer.run()


def tied() -> TopKSAE:
    sae = TopKSAE(D, F, K)
    sae.w_enc = sae.w_dec
    return sae


def views() -> TopKSAE:
    sae, whole = TopKSAE(D, F, K), torch.randn(F + 4, D)
    sae.w_enc, sae.w_dec = nn.Parameter(whole[:F]), nn.Parameter(whole[4:])
    return sae


def more() -> TopKSAE:
    sae = TopKSAE(D, F, K)
    sae.register_buffer("extra", torch.zeros(3))
    return sae


def not_finite() -> TopKSAE:
    sae = TopKSAE(D, F, K)
    with torch.no_grad():
        sae.b_dec[0] = float("inf")
    return sae


@pytest.mark.parametrize(
    ("sae", "error", "said"),
    [
        (tied, ValueError, "memory of their own, got w_dec and w_enc in one"),
        (views, ValueError, "memory of their own, got w_dec and w_enc in one"),
        (more, ValueError, "state_dict must be of .* got .*'extra'"),
        (not_finite, FloatingPointError, "b_dec must be finite"),
    ],
)
@pytest.mark.parametrize("step", ["fused", "autograd"])
def test_an_sae_that_cannot_be_saved_is_refused_at_the_start(sae, error, said, step, tmp_path):
    source = TensorSource(randn(200, D, seed=1), BATCH)
    with pytest.raises(error, match=f"Trainer: .*{said}"):
        Trainer(sae(), source, TrainConfig(**CONFIG, step=step), out_dir=tmp_path, quiet=True).run()
    assert not list(tmp_path.glob("*checkpoint*"))


def test_neighbours_in_one_memory_are_saved(tmp_path) -> None:
    sae, whole = TopKSAE(D, F, K), torch.cat([TopKSAE(D, F, K).w_dec.detach()] * 2)
    sae.w_enc, sae.w_dec = nn.Parameter(whole[:F]), nn.Parameter(whole[F:])
    source = TensorSource(randn(200, D, seed=1), BATCH)
    Trainer(sae, source, TrainConfig(**CONFIG), out_dir=tmp_path, quiet=True).run()
    loaded = load_sae(tmp_path / "checkpoint-14")
    assert identical(loaded.w_enc, sae.w_enc) and identical(loaded.w_dec, sae.w_dec)


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ({"at": torch.zeros(1)}, TypeError),
        ({"at": float("nan")}, ValueError),
        ({"at": {3: 4}}, TypeError),
        ({"at": b"x"}, TypeError),
    ],
)
def test_a_source_state_that_cannot_be_saved_is_refused_at_the_start(state, error, tmp_path):
    trainer = make(tmp_path)
    trainer.source.state_dict = lambda: state  # type: ignore[method-assign]
    with pytest.raises(error, match="must be JSON-able .*got: source.at"):
        trainer.run()
    assert trainer.step == 0


class Odd(torch.optim.SGD):
    """Makes a state at its first step that no file can hold."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["seen"] = {1, 2}


def test_an_optimizer_state_that_cannot_be_saved_is_refused_after_one_step(tmp_path) -> None:
    trainer = make(tmp_path, step="autograd", optimizer=lambda p: Odd(p, lr=0.1))
    with pytest.raises(TypeError, match="optimizer.state.optimizer.0.seen must be JSON-able"):
        trainer.run()
    assert trainer.step == 1


class Uneven(torch.optim.SGD):
    """Makes a state that can be written, and is refused when it is read: resume would be late."""

    def __init__(self, params, entry: str, value: object):
        super().__init__(params, lr=0.1)
        self.entry, self.value = entry, value

    def step(self, closure=None):
        super().step(closure)
        self.state[self.param_groups[0]["params"][0]][self.entry] = self.value


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("seen", 1, "same entries for every parameter of 2 dimensions"),
        ("sum", torch.ones(3), r"optimizer.0.sum must be a tensor of shape \[64, 16\], got \[3\]"),
        ("step", -1, "optimizer.0.step must be a number of at least 0, got -1"),
    ],
)
def test_an_optimizer_state_that_resume_refuses_is_refused_after_one_step(
    entry, value, said, tmp_path
) -> None:
    trainer = make(tmp_path, step="autograd", optimizer=lambda p: Uneven(p, entry, value))
    with pytest.raises(ValueError, match=f"resume takes back, got Uneven: .*{said}"):
        trainer.run()
    assert trainer.step == 1


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("mine")
    deep = tmp_path.joinpath(*["x" * 200] * ((4000 - len(str(tmp_path))) // 201))
    deep /= "y" * (4059 - len(str(deep)) - 1)  # fits, and the files of a checkpoint do not
    for out in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300), deep):
        trainer = make(out)
        with pytest.raises(OSError, match="^.*Trainer: .* must be written to"):
            trainer.run()
        assert trainer.step == 0
    assert (tmp_path / "file").read_text() == "mine"
    mkdir = Path.mkdir

    def read_only(self, *args, **kwargs):
        if "checkpoint" in self.name:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", read_only)
    trainer = make(tmp_path / "b")
    with pytest.raises(OSError, match="checkpoints must be written to .*Read-only") as raised:
        trainer.run()
    assert raised.value.errno == errno.EROFS and trainer.step == 0


def test_resume_while_another_writes_is_refused(uninterrupted, tmp_path) -> None:
    whole, _ = uninterrupted
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "newest"
    link.symlink_to(whole / f"checkpoint-{STEPS}")
    for folder in (None, link):
        refused = pytest.raises(BlockingIOError, match="beside another of process")
        with owned(whole, "another"), refused:
            make(whole, **LONGER).resume(folder)
        assert make(whole, **LONGER).resume(folder) == STEPS


def test_a_relative_folder_is_the_one_that_it_was(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    trainer = make(Path("run"))
    give = trainer.source.next_batch

    def move() -> torch.Tensor:
        os.chdir(tmp_path / "elsewhere")
        return give()

    trainer.source.next_batch = move  # type: ignore[method-assign]
    trainer.run()
    assert [path.name for path in checkpoints(tmp_path / "run")] == [
        "checkpoint-12",
        "checkpoint-14",
    ]
    assert not list((tmp_path / "elsewhere").iterdir())
