# SPDX-License-Identifier: Apache-2.0
"""All contenders over all seeds, each run saved when it is done."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mikernels.files import read_json

from ..harness import machine, results
from ..harness.spec import Unavailable
from . import figures
from .contenders import Contender, parse, train, unexplained
from .feed import Feed
from .tasks import ALIVE_IN, Task, dead

SCHEMA = 1
MARKS = 20
# held-out rows that the points of a learning curve are measured on; figures are of all of them
CURVE_ROWS = 4096
# ours first: it is what the others are compared with
DEFAULT = (
    "mikernels",
    "mikernels:encoder_scale=0.3",
    "mikernels:encoder_scale=0.1",
    "saelens",
    "saelens:recipe=ours",
    "saelens:recipe=ours,norm=1",
    "saelens:architecture=batchtopk,recipe=ours",
    "dictionary_learning",
    "dictionary_learning:recipe=ours",
)
AT_EQUAL_CPU = " at our CPU time"
PACKAGES = ("torch", "sae-lens", "dictionary-learning", "transformers", "scipy")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def one(task: Task, contender: Contender, seed: int) -> dict[str, Any]:
    """One run and its figures."""
    steps = contender.steps(task.sizes)
    feed = Feed(task.train, task.sizes.batch, steps, seed, MARKS)
    trained = train(contender, task.sizes, feed, task.held[:CURVE_ROWS])
    return {
        "contender": contender.text,
        "seed": seed,
        "settings": trained.settings,
        "figures": {
            "fvu": unexplained(trained.view, task.held),
            **task.judge(trained.view),
            "dead": dead(trained.view, task.train[:ALIVE_IN]),
            "tokens": steps * task.sizes.batch,
            "cpu_s": feed.seconds,
            "cpu_ms": 1e3 * feed.seconds / steps,
        },
        "curve": feed.curve,
    }


def measure(
    task: Task,
    contenders: list[str],
    seeds: int,
    file: Path | None,
    equal_cpu: bool,
    console: Console,
) -> dict[str, Any]:
    """Runs what the file does not hold yet; one seed of everyone before the next.

    Returns:
        The whole: machine, versions, task, runs and comparisons with the first contender.
    """
    facts = machine.facts()
    whole = _started(task, facts, file)
    done = {(run["contender"], run["seed"]): run for run in whole["runs"]}
    missing: set[str] = set()

    def run(contender: Contender, text: str, seed: int) -> None:
        if (text, seed) in done or contender.library in missing:
            return
        with console.status(f"{task.name}, seed {seed}: {text}"):
            try:
                found = one(task, contender, seed) | {"contender": text}
            except Unavailable as error:
                missing.add(contender.library)
                console.print(f"[yellow]left out[/] {text}: {error}", highlight=False)
                return
        done[text, seed] = found
        whole["runs"].append(found)
        if file is not None:
            results.save(file, whole)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in found["figures"].items())
        console.print(f"[dim]seed {seed}[/] {text}: {shown}", highlight=False)

    chosen = [parse(text) for text in contenders]
    for seed in range(seeds):
        for contender in chosen:
            run(contender, contender.text, seed)
        mine = done.get((chosen[0].text, seed))
        for contender in chosen[1:] if equal_cpu and mine else ():
            other = done.get((contender.text, seed))
            if contender.library == chosen[0].library or other is None:
                continue
            share = mine["figures"]["cpu_s"] / other["figures"]["cpu_s"] * contender.share
            cut = Contender(contender.text, contender.library, contender.settings, min(share, 64))
            run(cut, contender.text + AT_EQUAL_CPU, seed)
    whole["comparisons"] = comparisons(whole["runs"], chosen[0].text)
    if file is not None:
        results.save(file, whole)
    return whole


def comparisons(runs: list[dict[str, Any]], first: str) -> list[dict[str, Any]]:
    """Each of ours with each of the others, the best of these by FVU first.

    What was trained for the CPU time of the first contender is compared with that one alone.
    """
    names = list(dict.fromkeys(run["contender"] for run in runs))
    ours = [name for name in names if name.startswith("mikernels")]

    def mean_fvu(name: str) -> float:
        return figures.interval([r["figures"]["fvu"] for r in runs if r["contender"] == name]).mean

    theirs = sorted((name for name in names if name not in ours), key=mean_fvu)
    return [
        figures.compare(runs, mine, other)
        for mine in ours
        for other in theirs
        if mine == first or not other.endswith(AT_EQUAL_CPU)
    ]


def _started(task: Task, facts: dict[str, Any], file: Path | None) -> dict[str, Any]:
    new = {
        "schema": SCHEMA,
        "machine": facts,
        "versions": versions(),
        "task": {
            "name": task.name,
            "note": task.note,
            **task.sizes.__dict__,
            "train_rows": len(task.train),
            "held_rows": len(task.held),
            "dead": f"fires on none of {ALIVE_IN:,} training rows",
            "threads": torch.get_num_threads(),
        },
        "runs": [],
        "comparisons": [],
    }
    if file is None or not file.exists():
        return new
    fix = "measure again, into another file"
    old = read_json(file, "bench quality", "a results file of `mikernels bench quality`", fix)
    same = isinstance(old, dict) and all(
        old.get(name) == new[name] for name in ("schema", "versions", "task")
    )
    if not same:
        raise ValueError(
            f"bench quality: {file} must hold runs of this task with these versions, got another "
            f"file; {fix}"
        )
    results.same_machine(file, old, facts)
    return old
