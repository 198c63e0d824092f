# SPDX-License-Identifier: Apache-2.0
"""`mikernels bench quality`: equal batches, honest clocks, intervals, and a run from end to end."""

import json
import math
import time

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from mikernels.bench import cli
from mikernels.bench.quality import contenders, figures, session, tables, tasks
from mikernels.bench.quality.feed import Feed, orders

SIZES = contenders.Sizes(16, 48, 4, 32, 6)


def task() -> tasks.Task:
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(3))
    return tasks.Task("toy", SIZES, x[:200], x[200:], lambda view: {"f1": 0.5}, "a toy")


def test_orders_show_every_row_once_an_epoch() -> None:
    first = orders(10, 4, 0)
    seen = torch.cat([next(first) for _ in range(5)])
    assert seen[:10].sort().values.equal(torch.arange(10))
    assert seen[10:].sort().values.equal(torch.arange(10))
    again = orders(10, 4, 0)
    assert torch.equal(seen, torch.cat([next(again) for _ in range(5)]))
    assert not torch.equal(next(orders(10, 4, 1)), seen[:4])


def test_the_clock_holds_what_lies_between_batches() -> None:
    x = torch.randn(20, 3)
    feed = Feed(x, 4, 3, 0, 3)

    def busy(seconds: float) -> None:
        start = time.process_time()
        while time.process_time() - start < seconds:
            pass

    def measure() -> float:
        busy(0.05)
        return 0.25

    feed.measure = measure
    for _ in feed:
        busy(0.02)
    feed.finish()
    assert 0.06 <= feed.seconds < 0.1
    assert [point["step"] for point in feed.curve] == [1, 2, 3]
    assert [point["tokens"] for point in feed.curve] == [4, 8, 12]
    assert feed.curve[-1] == {"step": 3, "tokens": 12, "cpu": feed.seconds, "fvu": 0.25}
    short = Feed(x, 4, 3, 0, 1)
    next(short)
    with pytest.raises(RuntimeError, match="3 batches must be taken, got 1"):
        short.finish()


def test_contenders_are_read() -> None:
    found = contenders.parse("saelens:architecture=batchtopk,lr=3e-3,share=0.5,flag=true,k=none")
    assert found.library == "saelens" and found.steps(SIZES) == 3
    assert found.settings == {"architecture": "batchtopk", "lr": 3e-3, "flag": True, "k": None}
    for text, message in (
        ("keras", "must begin with one of mikernels, saelens"),
        ("saelens:lr", "must be name=value, got 'lr'"),
        ("saelens:share=0", r"share of 'saelens:share=0' must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            contenders.parse(text)


def test_intervals_are_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = [1.0, 2.0, 4.0, 4.5]
    sem = stats.sem(values)
    expected = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=sem)
    found = figures.interval(values)
    assert found[1:] == pytest.approx(expected)
    assert figures.interval([2.0]) == (2.0, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("ours", "word"),
    [
        ([0.20, 0.21, 0.19], "better"),
        ([0.40, 0.41, 0.39], "worse"),
        ([0.3001, 0.3102, 0.2901], "not worse"),
        ([0.25, 0.37, 0.27], "open"),
    ],
)
def test_a_verdict_is_of_the_differences(ours: list[float], word: str) -> None:
    pytest.importorskip("scipy.stats")
    theirs = [0.30, 0.31, 0.29]
    assert figures.verdict("fvu", ours, theirs)[1] == word
    # of what should be large, the same distances on the other side
    flipped = [t - (o - t) for o, t in zip(ours, theirs, strict=True)]
    assert figures.verdict("f1", flipped, theirs)[1] == word


def test_the_share_of_time_is_read_off_the_curves() -> None:
    mine = [{"cpu": 1.0, "fvu": 0.5}, {"cpu": 2.0, "fvu": 0.3}, {"cpu": 3.0, "fvu": 0.2}]
    other = [{"cpu": 5.0, "fvu": 0.9}, {"cpu": 10.0, "fvu": 0.31}]
    assert figures.share_of_time(mine, other) == pytest.approx(0.2)
    assert figures.share_of_time(other, mine) is None


def test_ours_is_scored_in_the_unit_of_the_activations() -> None:
    big = task()
    scaled = tasks.replace(big, train=64 * big.train, held=64 * big.held)
    found = [session.one(t, contenders.parse("mikernels"), 0) for t in (big, scaled)]
    curves = [[point["fvu"] for point in run["curve"]] for run in found]
    # a power of two changes no bit of a run on scaled activations
    assert curves[0] == curves[1] and len(curves[0]) == SIZES.steps
    assert 0 < curves[0][-1] < curves[0][0]


@pytest.mark.peers
@pytest.mark.parametrize("text", ["saelens:recipe=ours,norm=1", "saelens:architecture=batchtopk"])
def test_saelens_trains_on_the_same_batches(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sae_lens")
    seen: dict[str, list[torch.Tensor]] = {"mikernels": [], text: []}
    original = Feed.next_batch
    for name, batches in seen.items():

        def spy(self: Feed, batches: list[torch.Tensor] = batches) -> torch.Tensor:
            batches.append(original(self).clone())
            return batches[-1]

        monkeypatch.setattr(Feed, "next_batch", spy)
        monkeypatch.setattr(Feed, "__next__", spy)
        found = session.one(task(), contenders.parse(name), 1)
        assert found["curve"][-1]["fvu"] == found["figures"]["fvu"] > 0
        assert found["figures"]["cpu_s"] > 0
    assert len(seen[text]) == SIZES.steps
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))


def test_a_session_saves_goes_on_and_is_shown(tmp_path) -> None:
    pytest.importorskip("scipy.stats")
    file = tmp_path / "quality-toy.json"
    console = Console(width=200, record=True, quiet=True)
    names = ["mikernels", "mikernels:encoder_scale=0.3"]
    whole = session.measure(task(), names, 2, file, True, console)
    saved = json.loads(file.read_text())
    assert [(run["contender"], run["seed"]) for run in saved["runs"]] == [
        (name, seed) for seed in (0, 1) for name in names
    ]
    assert saved["machine"]["level"] == whole["machine"]["level"]
    again = session.measure(task(), names, 2, file, True, console)
    assert again["runs"] == saved["runs"]
    other = tasks.replace(task(), note="another")
    with pytest.raises(ValueError, match="must hold runs of this task with these versions"):
        session.measure(other, names, 2, file, True, console)
    # a pair to show
    runs = [
        {**run, "contender": "saelens"} for run in saved["runs"] if run["contender"] == names[1]
    ]
    whole["runs"] = [run for run in saved["runs"] if run["contender"] == "mikernels"] + runs
    whole["comparisons"] = [figures.compare(whole["runs"], "mikernels", "saelens")]
    wide = Console(width=200, record=True)
    tables.show(whole, wide)
    text = wide.export_text()
    assert "ours against theirs" in text and "saelens" in text


def test_the_best_of_the_others_comes_first() -> None:
    pytest.importorskip("scipy.stats")
    point = {"step": 1, "tokens": 1, "cpu": 1.0}

    def run(name: str, fvu: float) -> dict:
        return {
            "contender": name,
            "seed": 0,
            "figures": {"fvu": fvu, "cpu_s": 1.0},
            "curve": [point | {"fvu": fvu}],
        }

    equal = "b" + session.AT_EQUAL_CPU
    runs = [run(*r) for r in (("mikernels", 0.2), ("mikernels:x=1", 0.1), ("a", 0.4), ("b", 0.3))]
    pairs = session.comparisons([*runs, run(equal, 0.35)], "mikernels")
    assert [(pair["ours"], pair["theirs"]) for pair in pairs] == [
        ("mikernels", "b"),
        ("mikernels", equal),
        ("mikernels", "a"),
        ("mikernels:x=1", "b"),
        ("mikernels:x=1", "a"),
    ]


def test_the_command_refuses_other_tasks() -> None:
    result = CliRunner().invoke(cli.app, ["quality", "nothing"])
    assert result.exit_code == 2 and "synthetic, smollm2" in result.output
