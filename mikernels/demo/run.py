# SPDX-License-Identifier: Apache-2.0
"""The demo: activations, trainings in processes of their own, comparison, tables, report."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from mikernels import supported_levels
from mikernels.activations.shards import load_rows
from mikernels.demo.compare import NAMES, compare, results_table, summarise
from mikernels.demo.data import (
    held_out,
    mnist_shards,
    package_folder,
    smollm2_shards,
)
from mikernels.demo.judge import judge, variants_table
from mikernels.demo.options import DemoOptions
from mikernels.demo.variants import OTHERS, TOPK, Variant, sae_settings
from mikernels.evaluate import variance_unexplained
from mikernels.files import explained, partial_of, read_json, write_json
from mikernels.nn import ARCHITECTURES, SAE
from mikernels.owning import LOCK, owned
from mikernels.report.folder import is_report, remove_report
from mikernels.schema import Result, check
from mikernels.training import load_sae
from mikernels.training.state.checkpoint import own_folders, remove_checkpoints
from mikernels.training.trainer import METRICS

SPEC, RESULT = "run.json", "run.result.json"
# the columns of the first table
SUMMARY = ("what", "plain", "fused", "ratio")


def run_demo(options: DemoOptions, out: Path, console: Console) -> dict[str, Any]:
    """Do it all under `out / options.data`.

    Returns:
        What was printed, JSON-able: agree (whether the losses do), steps, message; summary, of each
        row its what, plain, fused and ratio; variants, of each fvu, l0, dead_fraction, step_ms and
        peak_extra_bytes; options, seconds and report, the page's path.

    Raises:
        ValueError, ModuleNotFoundError: for options or packages that do not fit, before training.
        FileExistsError: a folder that it would clear holds other things.
        BlockingIOError: another demo runs there.
        RuntimeError: when a training process fails.
    """
    started = time.perf_counter()
    for package in ("matplotlib", "jinja2"):
        package_folder(package, "pip install 'mikernels[report]'")
    if not supported_levels():
        console.print(
            "the compiled kernels are absent, so the fused path runs its slow reference; "
            "`mikernels info` says why and how to mend it",
            style="yellow",
        )
    out = out / options.data
    with explained("demo", "a report", out, "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
    with owned(out, "demo") as mine:
        found = _run(options, out, console, started)
        mine.check()
    return found


def _run(options: DemoOptions, out: Path, console: Console, started: float) -> dict[str, Any]:
    if options.data == "smollm2":
        folder = smollm2_shards(out, options.layer, options.tokens, options.seed, console)
    else:
        folder = mnist_shards(out)
    rows, metadata = load_rows(folder)
    x, held = rows["activations"].float(), held_out(rows, options.seed)
    variants = {name: TOPK for name in NAMES}
    if options.variants:
        variants |= {variant.folder: variant for variant in OTHERS}
    # what cannot be trained or cleared is refused before the first run
    specs = {
        name: _spec(variant, options, folder, x.shape[1], None if name == "dense" else out / name)
        for name, variant in variants.items()
    }
    for name in variants:
        _clear(out / name)

    def train(name: str) -> dict[str, Any]:
        title = NAMES.get(name, f"{variants[name].title}, fused")
        steps = options.baseline_steps if name == "dense" else options.steps
        console.print(f"training {steps:,} steps of {options.batch_size:,} tokens: {title}")
        return _train(out / name, title, specs[name])

    results = {name: train(name) for name in NAMES}
    comparison = compare(results["dense"]["rows"], results["fused"]["rows"])
    # what a user does with a checkpoint and the activations that are stored beside it
    sae = _trained(out / TOPK.folder, options)
    summary = summarise(results, options.batch_size, variance_unexplained(sae, x[held]))
    console.print(results_table(summary))
    console.print(comparison["message"], style="green" if comparison["agree"] else "bold red")
    outcomes = []
    if options.variants:
        outcomes.append(judge(TOPK, results[TOPK.folder], sae, x, held))
        for variant in OTHERS:
            result = train(variant.folder)
            trained = _trained(out / variant.folder, options)
            outcomes.append(judge(variant, result, trained, x, held))
        console.print(variants_table(outcomes))

    from mikernels.demo.pages import build  # matplotlib and jinja2: the report extra

    with console.status("writing the report"):
        report = build(options, sae, rows, metadata, results, summary, comparison, outcomes, out)
    seconds = time.perf_counter() - started
    console.print(f"report: [link=file://{report.resolve()}]{report}[/]  ({seconds:.0f} s in all)")
    return {
        **comparison,
        "summary": [dict(zip(SUMMARY, row, strict=True)) for row in summary],
        "variants": {outcome.variant.folder: outcome.figures() for outcome in outcomes},
        "options": asdict(options),
        "seconds": seconds,
        "report": str(report),
    }


def _spec(
    variant: Variant, options: DemoOptions, folder: Path, d: int, run_dir: Path | None
) -> dict[str, Any]:
    """`run.json` of a fused run into `run_dir`, or of plain PyTorch, whose weights are of no use
    afterwards."""
    features = options.expansion * d
    settings = sae_settings(variant.architecture, options, features)
    ARCHITECTURES[variant.architecture].config_type(d, **settings)
    config = options.baseline_config(features) if run_dir is None else options.config
    return {
        "activations": str(folder),
        "seed": options.seed,
        "out_dir": None if run_dir is None else str(run_dir),
        "architecture": variant.architecture,
        "sae": settings,
        "config": config.to_dict(),
    }


def _clear(run_dir: Path) -> None:
    with explained("demo", "a training run", run_dir, "choose another --out"):
        run_dir.mkdir(exist_ok=True)
    with owned(run_dir, "demo"):
        clear_run(run_dir)


def _trained(run_dir: Path, options: DemoOptions) -> SAE:
    return load_sae(run_dir / f"checkpoint-{options.steps}").eval()


def _train(run_dir: Path, title: str, spec: dict[str, Any]) -> dict[str, Any]:
    path = run_dir / SPEC
    with explained("demo", "the settings of a run", path, "free space"):
        write_json(path, spec)
    done = subprocess.run([sys.executable, "-m", "mikernels.demo.worker", str(path)])
    if done.returncode != 0:
        raise RuntimeError(
            f"demo: the training process of {title} must end with status 0, got "
            f"{done.returncode}; its message is above"
        )
    answer, fix = run_dir / RESULT, "run the demo again"
    raw = read_json(answer, "demo", "the result of a run", fix)
    result = check(Result, raw, "demo", answer, fix).model_dump()
    nan = float("nan")
    result["rows"] = [
        {name: nan if v is None else v for name, v in row.items()} for row in result["rows"]
    ]
    return result


def clear_run(run_dir: Path) -> None:
    """Delete what a former demo left in a run's folder.

    Raises:
        FileExistsError: it holds anything else; nothing has been deleted then.
    """
    files = [*(run_dir / name for name in (SPEC, RESULT, METRICS))]
    files += [partial_of(path) for path in files]
    folders, report = own_folders(run_dir), run_dir / "report"
    for path in run_dir.iterdir():
        ours = path in folders or (path in files and path.is_file()) or path.name == LOCK
        # of `mikernels report`
        ours = ours or (path == report and is_report(report, "demo"))
        if run_dir.is_symlink() or not ours:
            raise FileExistsError(
                f"demo: {run_dir} must hold a former demo's run and nothing else, got {path}; move "
                f"it away or choose another --out"
            )
    remove_checkpoints(run_dir)
    remove_report(report, "demo")
    for path in files:
        path.unlink(missing_ok=True)
