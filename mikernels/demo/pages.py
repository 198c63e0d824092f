# SPDX-License-Identifier: Apache-2.0
"""What the report says: from the runs' numbers and the trained SAE to the template's values."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mikernels.activations import Rows
from mikernels.demo import figures, report
from mikernels.demo.compare import NAMES, step_ms
from mikernels.demo.data import held_out
from mikernels.demo.examples import choose_features
from mikernels.demo.judge import Outcome
from mikernels.demo.options import DemoOptions
from mikernels.demo.variant_pages import side_by_side
from mikernels.evaluate import measure_reconstruction
from mikernels.evaluate.firing import Firing, encode_all
from mikernels.info import collect
from mikernels.nn import SAE
from mikernels.report import CollectedFeatures, FeatureView, collect_features, write_report
from mikernels.report.drawing import both, image
from mikernels.report.folder import PAGE

SIDE = 28
# of a card on this page; the folder of all features has more
EXAMPLES = 6
FEATURES = "features"


def build(
    options: DemoOptions,
    sae: SAE,
    rows: Rows,
    metadata: dict[str, Any],
    results: dict[str, dict[str, Any]],
    summary: list[tuple[str, str, str, str]],
    comparison: dict[str, Any],
    outcomes: list[Outcome],
    out: Path,
) -> Path:
    """Write `out / report.html`, with the variants if there are outcomes, and return its path."""
    by_digit = options.data == "mnist"
    cards, views = [], []
    labels = rows["labels"] if by_digit else rows["token_ids"]
    if by_digit:
        firing = encode_all(sae, rows["activations"].float())
        chosen = choose_features(firing, labels, per_label=2, shares=(1e-2, 1e-1))
        cards = [_digit_card(sae, firing, feature, rows) for feature in chosen]
    else:
        collected = collect_features(sae, [rows], metadata["pieces"])
        firing = collected.firing
        chosen = choose_features(firing, labels, rows["positions"])
        views = [_short(collected.view(feature)) for feature in chosen]
        _write_all(options, sae, rows, metadata, collected, results, out)
    last = results["fused"]["rows"][-1]
    unit = "digits" if by_digit else "tokens"
    features = sae.config.n_features
    ours, theirs = results["fused"]["rows"], results["dense"]["rows"]
    parts = {NAMES[name]: _parts(results[name]) for name in NAMES}
    counts, n_rows = firing.counts, firing.n_rows
    values = {
        "kind": "mnist" if by_digit else "tokens",
        "title": f"A sparse autoencoder of {'MNIST' if by_digit else 'SmolLM2-135M'}",
        "lede": _lede(options, metadata, features, firing.n_rows, comparison["agree"]),
        "headline": [
            {"value": summary[0][3].replace("x", "×"), "label": "faster per step"},
            {
                "value": f"{summary[0][2]} ms",
                "label": f"for {options.batch_size:,} {unit}; plain PyTorch {summary[0][1]} ms",
            },
            {
                "value": f"{1 - float(summary[-1][2]):.1%}",
                "label": f"of the variance of held-out {unit} explained",
            },
            {"value": f"{last['l0']:.0f}", "label": f"of {features:,} features active at a time"},
        ],
        "table": {
            "columns": [NAMES["dense"], NAMES["fused"], "ratio"],
            "rows": [
                tuple(cell.replace("x", "×") if i == 3 else cell for i, cell in enumerate(row))
                for row in summary
            ],
        },
        "table_note": (
            f"Plain PyTorch runs {comparison['steps']} steps and the fused path {options.steps}, "
            f"from one seed, each in a process of its own, on nine tenths of the {unit}; the rest "
            f"is held out. Peak extra memory is what training adds to the activations and weights: "
            f"gradients, optimiser state, temporaries."
        ),
        "losses_title": "The same losses" if comparison["agree"] else "The losses disagree",
        "agreement": comparison["message"][0].upper() + comparison["message"][1:] + ".",
        "figures": {
            "loss": both(lambda width: figures.loss_curves(ours, theirs, width)),
            "parts": both(lambda width: figures.step_parts(parts, width)),
            "density": both(lambda width: figures.density_histogram(counts, n_rows, unit, width)),
        },
        "variants": side_by_side(outcomes, options, n_rows, unit) if outcomes else None,
        "parts_note": (
            "Milliseconds of the median step, divided as the whole run's time is. Gradients are "
            "those of both weight matrices and biases; the optimiser is clipping, Adam and the "
            "decoder's constraint."
        ),
        "density_note": (
            f"A feature that is active on one row in a thousand is specific; one that is active on "
            f"a tenth of them says little. Counted over all {firing.n_rows:,} {unit}."
        ),
        "cards": cards,
        "views": views,
        "folder": None if by_digit else f"{FEATURES}/{PAGE}",
        "dictionary": _dictionary(sae, firing) if by_digit else [],
        "command": _command(options),
        "facts": _facts(options, options.config.peak_lr(features)),
        **_features_text(by_digit, len(chosen)),
    }
    path = out / "report.html"
    report.write(path, values)
    return path


def _short(view: FeatureView) -> FeatureView:
    """What fits on a page beside others."""
    return replace(view, examples=view.examples[:EXAMPLES], samples=[], similar=view.similar[:4])


def _write_all(
    options: DemoOptions,
    sae: SAE,
    rows: Rows,
    metadata: dict[str, Any],
    collected: CollectedFeatures,
    results: dict[str, dict[str, Any]],
    out: Path,
) -> None:
    """The report of all features, beside the page."""
    held = held_out(rows, options.seed)
    write_report(
        collected,
        out / FEATURES,
        title=f"Features of {metadata['title']}",
        reconstruction=measure_reconstruction(sae, rows["activations"][held].float()),
        metrics=results["fused"]["rows"],
        known=dict(_facts(options, options.config.peak_lr(sae.config.n_features))),
        command=_command(options),
    )


def _lede(
    options: DemoOptions, metadata: dict[str, Any], features: int, n_rows: int, agree: bool
) -> str:
    if options.data == "smollm2":
        learned = f"learned from {n_rows:,} tokens of Python's documentation"
    else:
        learned = "learned from the pixels"
    verdict = "The losses are the same; the time is not." if agree else "The losses DISAGREE."
    return (
        f"{features:,} features of {metadata['title']}, {learned}. It was trained twice from one "
        f"seed: in plain PyTorch, and with the fused kernels of mikernels. {verdict}"
    )


def _features_text(by_digit: bool, n: int) -> dict[str, str]:
    if by_digit:
        return {
            "features_title": "What the features look like",
            "features_note": (
                "Every feature adds its decoder direction to the reconstruction, in proportion to "
                f"its activation. Below the dictionary: {n} features with the digits that activate "
                "them most, and how their activation divides over the classes."
            ),
        }
    return {
        "features_title": f"What {n} of the features respond to",
        "features_note": (
            "Chosen without looking at the text: neither rare nor ubiquitous, strongly activated, "
            "and about different tokens. Shading is the activation, the underlined token the "
            "strongest of its excerpt; point at it for the value. Percentages are shares of a "
            "feature's total activation by token; the histogram shows its activations from zero to "
            "the largest. Names lead to the folder of all features, beside this page."
        ),
    }


def _parts(result: dict[str, Any]) -> dict[str, float]:
    whole = sum(result["parts"].values())
    return {name: step_ms(result) * part / whole for name, part in result["parts"].items()}


def _digit_card(sae: SAE, firing: Firing, feature: int, rows: Rows) -> dict[str, Any]:
    where, values = firing.of(feature)
    mass: Counter[int] = Counter()
    for label, value in zip(rows["labels"][where].tolist(), values.tolist(), strict=True):
        mass[label] += value
    total = sum(mass.values())
    maximum = float(values[0])
    return {
        "number": feature,
        "count": len(where),
        "density": len(where) / firing.n_rows,
        "histogram": torch.histc(values, bins=20, min=0, max=maximum).tolist(),
        "labels": [(label, value / total) for label, value in mass.most_common(4)],
        "direction": image(sae.w_dec[feature].detach().view(SIDE, SIDE), symmetric=True),
        "digits": [
            (image(rows["activations"][row].view(SIDE, SIDE)), value)
            for row, value in zip(where[:12].tolist(), values.tolist(), strict=False)
        ],
    }


def _dictionary(sae: SAE, firing: Firing, n: int = 96) -> list[str]:
    best = firing.counts.argsort(descending=True)[:n].tolist()
    return [image(sae.w_dec[f].detach().view(SIDE, SIDE), symmetric=True) for f in best]


def _command(options: DemoOptions) -> str:
    default = DemoOptions.for_data(options.data)
    names = ("tokens", "layer", "expansion", "k", "steps", "baseline_steps", "seed")
    changed = [name for name in names if getattr(options, name) != getattr(default, name)]
    given = [f" --{name.replace('_', '-')} {getattr(options, name)}" for name in changed]
    given += [] if options.variants else [" --no-variants"]
    return f"mikernels demo --data {options.data}{''.join(given)}"


def _facts(options: DemoOptions, rate: float) -> list[tuple[str, str]]:
    machine = collect()
    cpu = machine["cpu"]
    return [
        ("machine", f"{cpu['model']}, {machine['threads']} threads"),
        ("kernels", f"level {machine['level']}" if machine["level"] else "reference path"),
        (
            "versions",
            f"mikernels {machine['mikernels']}, torch {machine['packages']['torch']}, "
            f"Python {machine['python']}",
        ),
        (
            "training",
            f"Adam, learning rate {rate:.1e}, {options.batch_size:,} a step, "
            f"k = {options.k}, F = {options.expansion} d, seed {options.seed}",
        ),
    ]
