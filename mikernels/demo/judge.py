# SPDX-License-Identifier: Apache-2.0
"""What became of every variant: its SAE on held-out activations, and what a step cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from mikernels.demo.compare import memory, step_ms
from mikernels.demo.variants import Variant
from mikernels.evaluate import measure_reconstruction
from mikernels.nn import SAE

COLUMNS = ("held-out FVU", "L0", "dead features", "ms a step", "peak extra memory")


@dataclass(frozen=True, eq=False)
class Outcome:
    """A variant's run and its SAE in use.

    Attributes:
        rows: measurements by step. fvu, l0: of held-out rows.
        dead_fraction: features that did not fire in the last sixth of training, as in `rows`.
        density: `[F]` float64, share of all rows on which each feature is active.
        step_ms: of the median step. peak_extra_bytes: None where it could not be measured.
    """

    variant: Variant
    rows: list[dict[str, Any]]
    fvu: float
    l0: float
    dead_fraction: float
    density: torch.Tensor
    step_ms: float
    peak_extra_bytes: int | None

    def figures(self) -> dict[str, Any]:
        """As numbers."""
        names = ("fvu", "l0", "dead_fraction", "step_ms", "peak_extra_bytes")
        return {name: getattr(self, name) for name in names}

    def cells(self) -> tuple[str, ...]:
        """As text, under COLUMNS."""
        return (
            f"{self.fvu:.4f}",
            f"{self.l0:.1f}",
            f"{self.dead_fraction:.1%}",
            f"{self.step_ms:,.0f}",
            memory(self.peak_extra_bytes),
        )


def judge(
    variant: Variant, result: dict[str, Any], sae: SAE, x: torch.Tensor, held: torch.Tensor
) -> Outcome:
    """The outcome of a run.

    Args:
        result: of its process. sae: its checkpoint's. x: all rows. held: `[n]` bool, held out.

    Raises:
        ValueError: the reconstructions are not finite.
    """
    unseen = measure_reconstruction(sae, x[held], where="demo")
    return Outcome(
        variant=variant,
        rows=result["rows"],
        fvu=unseen.fvu,
        l0=unseen.l0,
        dead_fraction=result["rows"][-1]["dead_fraction"],
        density=measure_reconstruction(sae, x, where="demo").density,
        step_ms=step_ms(result),
        peak_extra_bytes=result["peak_extra_bytes"],
    )


def variants_table(outcomes: list[Outcome]) -> Table:
    """All of them for the console."""
    table = Table(header_style="bold")
    table.add_column("variant, fused", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for outcome in outcomes:
        table.add_row(outcome.variant.title, *outcome.cells())
    return table
