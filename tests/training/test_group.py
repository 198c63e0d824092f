# SPDX-License-Identifier: Apache-2.0
"""Several trainers in one run: each as if alone, whatever becomes of the others."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from decoder_cases import Characters, tiny
from oracle import identical, num_threads, randn

from mikernels.activations import ModelSource, TensorSource
from mikernels.nn import BatchTopKSAE, JumpReLUSAE, TopKSAE, Transcoder
from mikernels.training import TrainConfig, Trainer, TrainerGroup, TrainingFailed
from mikernels.training.state.checkpoint import checkpoints
from mikernels.training.trainer import METRICS

D, F, BATCH, STEPS = 16, 32, 32, 9
CONFIG = {
    "total_tokens": STEPS * BATCH,
    "batch_size": BATCH,
    "lr": 3e-3,
    "log_every": 2,
    "checkpoint_every": 4,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with num_threads(1):
        yield


class Counted(TensorSource):
    """A source that tells how often it was read, and draws from torch's generator as it is."""

    def __init__(self):
        super().__init__(randn(200, D, seed=1), BATCH)
        self.read = 0

    def next_batch(self):
        self.read += 1
        return super().next_batch() + 0.01 * torch.rand(1)


# what they are, and settings of their runs
MEMBERS = {
    "k2": (lambda: TopKSAE(D, F, 2, dead_after=3 * BATCH, k_aux=5), {}),
    "jump": (lambda: JumpReLUSAE(D, F, target_l0=4), {}),
    "k5": (lambda: BatchTopKSAE(D, F, 5.0), {"log_every": 3}),
}


def member(name: str, source, folder: Path | None, **settings) -> Trainer:
    torch.manual_seed(len(name))
    make, own = MEMBERS[name]
    config = TrainConfig(**{**CONFIG, **own, **settings})
    out_dir = folder / name if folder else None
    return Trainer(make(), source, config, out_dir=out_dir, quiet=True)


def group(folder: Path | None, names=tuple(MEMBERS), **settings) -> TrainerGroup:
    source = Counted()
    return TrainerGroup({name: member(name, source, folder, **settings) for name in names})


def rows(folder: Path) -> list[dict]:
    """Without the timings."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    timings = ("step_ms", "tokens_per_second", "waiting_seconds")
    return [{name: v for name, v in row.items() if name not in timings} for row in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, dict[str, Trainer]]:
    folder = tmp_path_factory.mktemp("alone")
    with num_threads(1):
        trainers = {name: member(name, Counted(), folder) for name in MEMBERS}
        for trainer in trainers.values():
            trainer.run()
    return folder, trainers


def check_as_alone(alone, folder: Path, trainers: dict[str, Trainer]) -> None:
    for name, trainer in trainers.items():
        assert rows(folder / name) == rows(alone[0] / name), name
        for key, value in alone[1][name].sae.state_dict().items():
            assert identical(value, trainer.sae.state_dict()[key]), (name, key)


def interrupt(trainer: Trainer, step: int, number: int = signal.SIGINT) -> None:
    """The signal comes in the midst of this trainer's step."""
    inner = trainer._step_on

    def step_on(batches) -> None:
        inner(batches)
        if trainer.step == step - 1:
            os.kill(os.getpid(), number)

    trainer._step_on = step_on  # type: ignore[method-assign]


def test_settings_share_one_reading_and_are_as_alone_interrupted_or_not(alone, tmp_path, capfd):
    first = group(tmp_path)
    source = first.trainers["k2"].source._shared.source
    interrupt(first.trainers["jump"], 6)
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert source.read == 6 and identical(torch.get_rng_state(), before)
    said = capfd.readouterr().err
    assert "interrupted and saved, k2 at step 6, jump at step 6, k5 at step 6; " in said
    assert "make the same TrainerGroup and call resume() before run() to continue" in said
    second = group(tmp_path)
    assert second.resume() == dict.fromkeys(MEMBERS, 6)
    histories = second.run()
    assert list(histories) == list(MEMBERS) and len(histories["k5"].rows) == 3
    check_as_alone(alone, tmp_path, second.trainers)


def test_a_half_finished_set_is_mended(alone, tmp_path, capfd) -> None:
    """Killed between two saves, and one member not saved at all: those behind catch up."""
    first = group(tmp_path)
    interrupt(first.trainers["k2"], 7)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    shutil.rmtree(tmp_path / "jump" / "checkpoint-7")  # leaves checkpoint-4
    for path in checkpoints(tmp_path / "k5"):
        shutil.rmtree(path)
    second = group(tmp_path)
    assert second.resume() == {"k2": 7, "jump": 4, "k5": 0}
    assert "jump (from step 4), k5 (from step 0) must catch up" in capfd.readouterr().err
    source = second.trainers["k2"].source._shared.source
    second.run()
    assert source.read == 9  # k5 alone to 4, with jump to 7, all to 9
    check_as_alone(alone, tmp_path, second.trainers)


def test_a_member_is_an_ordinary_run(alone, tmp_path) -> None:
    first = group(tmp_path)
    interrupt(first.trainers["k5"], 5)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    trainer = member("jump", Counted(), tmp_path)
    assert trainer.resume() == 5
    trainer.run()
    check_as_alone(alone, tmp_path, {"jump": trainer})
    # and the others go on without it, or with it where it has come to its end
    second = group(tmp_path)
    assert second.resume() == {"k2": 5, "jump": 9, "k5": 5}
    second.run()
    check_as_alone(alone, tmp_path, second.trainers)
    with pytest.raises(
        ValueError, match=r"total_tokens \(--tokens\) must be above 288, where .*k2"
    ):
        group(tmp_path).resume()


def test_what_ends_one_does_not_end_the_others(alone, tmp_path, monkeypatch, capfd) -> None:
    made = group(tmp_path)
    k2, k5 = made.trainers["k2"], made.trainers["k5"]
    inner = k2._step_on

    def diverge(batches) -> None:
        inner(batches)
        if k2.step == 5:
            k2.sae.b_dec.data.fill_(torch.nan)

    k2._step_on = diverge  # type: ignore[method-assign]
    rename = os.rename

    def full(source, target) -> None:
        if "k5/checkpoint-8" in str(target):
            raise OSError(errno.ENOSPC, "full")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(TrainingFailed) as raised:
        made.run()
    assert list(raised.value.errors) == ["k2", "k5"]
    said = str(raised.value)
    assert "2 of 3 runs failed, the other 1 are trained: k2: FloatingPointError: " in said
    assert "the loss must be finite" in said and "k5: OSError: " in said and "No space" in said
    assert "k2 ends here: Trainer: the loss" in capfd.readouterr().err
    check_as_alone(alone, tmp_path, {"jump": made.trainers["jump"]})
    for name in ("k2", "k5"):
        assert [path.name for path in checkpoints(tmp_path / name)] == ["checkpoint-4"]
    monkeypatch.undo()
    again = group(tmp_path)
    assert again.resume() == {"k2": 4, "jump": 9, "k5": 4}
    again.run()
    check_as_alone(alone, tmp_path, again.trainers)
    assert not k5.source.waiting and not k2.source.waiting  # nothing is kept for the ended


class Broken(Counted):
    """Its fifth batch cannot be read; what comes after it could."""

    def next_batch(self):
        batch = super().next_batch()
        if self.read == 5:
            raise ValueError("torn")
        return batch


def test_a_source_that_fails_fails_for_all_alike(tmp_path) -> None:
    source = Broken()
    made = TrainerGroup({name: member(name, source, None) for name in ("k2", "k5")})
    with pytest.raises(
        TrainingFailed, match="none is trained to its end: k2, k5: ValueError: torn"
    ):
        made.run()
    assert source.read == 5 and {t.step for t in made.trainers.values()} == {4}


def test_one_that_stops_at_once_lets_go_of_all(tmp_path) -> None:
    """The second Ctrl-C: nothing is saved, and no folder stays locked."""
    made = group(tmp_path, checkpoint_every=100)
    interrupt(made.trainers["k2"], 3)
    interrupt(made.trainers["jump"], 3)
    scale = {name: t.sae.b_dec.clone() for name, t in made.trainers.items()}
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert all(not checkpoints(tmp_path / name) for name in MEMBERS)
    assert all(sorted(p.name for p in (tmp_path / n).iterdir()) == [METRICS] for n in MEMBERS)
    assert scale.keys() == made.trainers.keys()


def refused_groups(folder: Path):
    source = Counted()
    trained = member("k2", source, None, total_tokens=BATCH)
    trained.run()
    one, other = (member("k2", source, folder) for _ in range(2))
    shared = Trainer(one.sae, source, one.config, quiet=True)
    return {
        "none": ({}, ValueError, "at least one Trainer, got none"),
        "list": ([one], TypeError, "a dict of Trainers by name, got list"),
        "sae": ({"a": one.sae}, TypeError, "must be Trainers, got TopKSAE as 'a'"),
        "trained": ({"a": trained}, ValueError, "must be new, got 'a'"),
        "folder": ({"a": one, "b": other}, ValueError, "an out_dir each, got .*k2 for 2"),
        "weights": ({"a": one, "b": shared}, ValueError, "weights of their own, got a: "),
    }


def test_groups_that_cannot_be_are_refused(tmp_path) -> None:
    for trainers, kind, message in refused_groups(tmp_path).values():
        with pytest.raises(kind, match=message):
            TrainerGroup(trainers)
    stream = iter([randn(BATCH, D, seed=1)] * 3)
    with pytest.raises(ValueError, match="trainers of one iterator must have one source"):
        TrainerGroup({name: member(name, stream, None) for name in ("k2", "k5")})
    source = TensorSource(randn(200, D, seed=1))
    sizes = {f"{n}": member("k2", source, None, batch_size=n) for n in (16, 32)}
    with pytest.raises(ValueError, match=r"must have one batch_size, got \[16, 32\]"):
        TrainerGroup(sizes)
    made = group(None)
    with pytest.raises(ValueError, match="is in another group"):
        TrainerGroup(made.trainers)
    with pytest.raises(FileNotFoundError, match="an out_dir of the group must hold a checkpoint"):
        group(tmp_path).resume()


def test_nothing_has_begun_when_one_is_refused(tmp_path, monkeypatch) -> None:
    (tmp_path / "k5").mkdir(parents=True)
    (tmp_path / "k5" / METRICS).mkdir()
    made = group(tmp_path)
    source = made.trainers["k2"].source._shared.source
    with pytest.raises(ValueError, match="must be a file of JSON lines, got a folder"):
        made.run()
    assert source.read == 0
    shutil.rmtree(tmp_path / "k5")
    # there is room for each, and not for all
    each = sum(p.numel() * 12 * 3 for p in made.trainers["k2"].sae.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Free(2 * each))
    with pytest.raises(OSError, match="MB free for checkpoints"):
        group(tmp_path).run()


class Few(Characters):
    """Of as many characters as the tiny models know."""

    def __call__(self, text, **options):
        return {"input_ids": [1 + ord(c) % 45 for c in text]}


class Free:
    def __init__(self, free: int):
        self.free = free


def test_a_damaged_member_is_named_and_no_other_is_touched(tmp_path) -> None:
    group(tmp_path, total_tokens=4 * BATCH).run()
    state = tmp_path / "k5" / "checkpoint-4" / "state.json"
    state.write_text(state.read_text().replace('"tokens": 128', '"tokens": 129'))
    made = group(tmp_path)
    former = made.trainers["k2"].sae.w_enc.clone()
    with pytest.raises(ValueError, match="k5/checkpoint-4/state.json"):
        made.resume()
    assert identical(made.trainers["k2"].sae.w_enc, former) and made.trainers["k2"].step == 0


# ---- sites of a model

TEXTS = ["the quick brown fox jumps over the lazy dog, " * 7, "0123456789 " * 10]
SITES = [0, "1.mlp_out", "2.attn_out", "1.mlp_in"]
TARGETS = [None, None, None, "1.mlp_out"]
# few windows a block, less than a batch; and outliers, which are others at each site
OPTIONS = {"context": 16, "windows_per_forward": 2, "buffer_rows": 32, "outlier_norm": 1.6}


@pytest.fixture(scope="module")
def model():
    return tiny("llama", torch.float32)


def test_sources_of_several_sites_give_what_each_gives_alone(model) -> None:
    passes = []
    handle = model.model.layers[0].register_forward_hook(lambda m, a, o: passes.append(1))
    each = ModelSource.each(model, Few(), SITES, TEXTS, 20, seed=3, targets=TARGETS, **OPTIONS)
    single = [
        ModelSource(model, Few(), site, TEXTS, 20, 3, target=target, **OPTIONS)
        for site, target in zip(SITES, TARGETS, strict=True)
    ]
    passes.clear()
    got = [[source.next_rows() for source in each] for _ in range(30)]
    shared = len(passes)
    passes.clear()
    expected = [[source.next_rows() for source in single] for _ in range(30)]
    handle.remove()
    assert shared < 1.1 * len(passes) / len(SITES)
    assert each[0].state_dict()["epoch"] >= 1
    for mine, theirs in zip(got, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.keys() == b.keys() and all(identical(a[name], b[name]) for name in a)
    assert [s.state_dict() for s in each] == [s.state_dict() for s in single]
    dropped = [source.dropped["outlier"] for source in each]
    assert len(set(dropped)) > 2, "the sites should differ in what they drop"
    # from there on elsewhere, in any order, and with one that nobody reads
    fresh = ModelSource.each(model, Few(), SITES, TEXTS, 20, seed=3, targets=TARGETS, **OPTIONS)
    for number in (2, 0, 3):
        fresh[number].load_state_dict(each[number].state_dict())
    for _ in range(30):
        for number in (3, 0):
            a, b = fresh[number].next_rows(), each[number].next_rows()
            assert all(identical(a[name], b[name]) for name in a)
    waiting = fresh[0]._passes._waiting
    assert sum(found.size() for _, found in waiting[fresh[1]]) < 33 * 20 + 100


def test_sites_and_settings_mix_and_resume_alone(model, tmp_path) -> None:
    def source(site, target=None):
        return ModelSource(model, Few(), site, TEXTS, BATCH, target=target, **OPTIONS)

    def trainer(name, own) -> Trainer:
        torch.manual_seed(0)
        sae = (Transcoder if "mlp_in" in name else TopKSAE)(24, 48, 6 if "k6" in name else 3)
        config = TrainConfig(**{**CONFIG, "total_tokens": 6 * BATCH})
        return Trainer(sae, own, config, out_dir=tmp_path / name, quiet=True)

    names = ["0.residual-k3", "0.residual-k6", "1.mlp_in"]
    each = ModelSource.each(
        model, Few(), [0, "1.mlp_in"], TEXTS, BATCH, targets=[None, "1.mlp_out"], **OPTIONS
    )
    made = TrainerGroup({name: trainer(name, each["mlp" in name]) for name in names})
    interrupt(made.trainers["1.mlp_in"], 4)
    with pytest.raises(KeyboardInterrupt):
        made.run()
    own = {"0.residual-k6": source(0), "1.mlp_in": source("1.mlp_in", "1.mlp_out")}
    for name, alone in own.items():
        resumed = trainer(name, alone)
        assert resumed.resume() == 4
        resumed.run()
        found = rows(tmp_path / name)
        shutil.rmtree(tmp_path / name)
        fresh = (0,) if "mlp" not in name else ("1.mlp_in", "1.mlp_out")
        whole = trainer(name, source(*fresh))
        whole.run()
        assert found == rows(tmp_path / name)
        for key, value in whole.sae.state_dict().items():
            assert identical(value, resumed.sae.state_dict()[key]), (name, key)


def test_a_site_that_is_not_finite_ends_alone(model) -> None:
    layer = model.model.layers[2]
    handle = layer.register_forward_hook(lambda m, a, out: out * torch.nan)
    try:
        good, bad = ModelSource.each(model, Few(), [0, 2], TEXTS, 20, **OPTIONS)
        good.next_batch()
        with pytest.raises(ValueError, match="must be finite in all but"):
            bad.next_batch()
        assert good.next_batch().isfinite().all()
    finally:
        handle.remove()
    with pytest.raises(ValueError, match="layers must be at least one"):
        ModelSource.each(model, Few(), [], TEXTS)
    with pytest.raises(ValueError, match="targets as many or None, got 1 and 2"):
        ModelSource.each(model, Few(), [0], TEXTS, targets=[1, 2])
