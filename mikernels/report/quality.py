# SPDX-License-Identifier: Apache-2.0
"""What judges of an SAE found, as tables of text: for the console, and for pages."""

from __future__ import annotations

from dataclasses import dataclass

from mikernels.evaluate import Reconstruction, Spliced

LINES = (
    ("variance unexplained (FVU)", "fvu", "{:.4f}"),
    ("mean squared error", "mse", "{:.4g}"),
    ("cosine", "cosine", "{:.4f}"),
    ("norm, reconstruction / activation", "norm_ratio", "{:.4f}"),
    ("L0, mean", "l0", "{:.1f}"),
)
LABELS = {
    "clean": "itself",
    "sae": "the SAE",
    "random": "a random SAE",
    "mean": "its mean",
    "zero": "zero",
}


@dataclass(frozen=True)
class TextTable:
    """A table; its first column is of names, the others of numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def reconstruction_table(found: Reconstruction, random: Reconstruction | None = None) -> TextTable:
    """How well activations are given back, and how many features that takes."""
    columns = [found] if random is None else [found, random]
    rows = [
        (label, *(form.format(getattr(column, name)) for column in columns))
        for label, name, form in LINES
    ]
    shares = ", ".join(f"{100 * q:g}" for q in found.l0_quantiles)
    quantiles = ("  ".join(map(str, column.l0_quantiles.values())) for column in columns)
    rows.append((f"L0 of {shares} % of tokens", *quantiles))
    dead = (f"{column.dead:,} ({column.dead_fraction:.1%})" for column in columns)
    rows.append(("features that never fired here", *dead))
    return TextTable(
        f"Reconstruction of {found.tokens:,} activations",
        ("", *("SAE", "random SAE")[: len(columns)]),
        tuple(rows),
    )


def density_table(found: Reconstruction) -> TextTable:
    """How many features fire on which share of tokens."""
    rows = [
        (f"{10**low:.2g} to {10**high:.2g}", f"{n:,}") for low, high, n in found.density_histogram
    ]
    return TextTable("How often features fire", ("share of tokens", "features"), tuple(rows))


def spliced_table(found: Spliced) -> TextTable:
    """What the model loses by a reconstruction."""
    recovered = {
        "sae": (found.recovered, found.recovered_zero),
        "random": (found.random_recovered, found.random_recovered_zero),
    }
    rows = []
    for name, label in LABELS.items():
        intervals = recovered.get(name)
        cells = ("", "") if intervals is None else tuple(map(str, intervals))
        rows.append((label, f"{found.losses[name]:.4f}", *cells))
    return TextTable(
        f"Next-token loss over {found.windows:,} windows, {found.predictions:,} predictions",
        ("layer replaced by", "loss (nats)", "of mean ablation", "of zero ablation"),
        tuple(rows),
        f"the SAE adds {found.increase} nats; recovered: share of an ablation's harm that is "
        f"undone; 95 % intervals of a bootstrap over windows",
    )
