# SPDX-License-Identifier: Apache-2.0
"""What commands share that look at a trained SAE: its folder, its model, what judges found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mikernels.cli.inputs import Inputs
from mikernels.cli.options import option

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from mikernels.activations import Rows
    from mikernels.evaluate import Reconstruction, Spliced
    from mikernels.models.load import LocalModel
    from mikernels.nn import SAE
    from mikernels.report.quality import TextTable
    from mikernels.values.batch import Batch

JUDGES = "Judges"
Trained = Annotated[
    Path,
    typer.Argument(
        help="Folder of a checkpoint, of a training run (its newest one), or of SAELens."
    ),
]
OfBatchTopK = Annotated[
    float | None, option("Of a BatchTopK SAE from SAELens, which does not keep it.", JUDGES)
]
BatchSize = Annotated[int, option("Rows encoded at a time.", JUDGES)]
Device = Annotated[
    str | None, option("cpu, cuda or cuda:N.", JUDGES, show_default="cuda where there is one")
]
Threads = Annotated[int | None, option("CPU threads.", JUDGES, show_default="torch's")]


def load_any(folder: Path, k: float | None = None, where: str = "eval") -> SAE:
    """The SAE of a checkpoint, of the newest checkpoint of a run, or of a folder of SAELens.

    Args:
        where: the command, for messages.

    Raises:
        FileNotFoundError, ValueError: none of these; see their loaders.
    """
    from mikernels.integrations import saelens
    from mikernels.integrations.saelens.form import CONFIG
    from mikernels.training import load_sae
    from mikernels.training.state.checkpoint import STATE, checkpoints, runs_within

    if (folder / CONFIG).exists():
        return saelens.load_sae(folder, k=k)
    if k is not None:
        raise ValueError(
            f"{where}: --k must be left out for an SAE that is not SAELens', got {k:g}"
        )
    if (folder / STATE).exists():
        return load_sae(folder)
    if found := checkpoints(folder):
        return load_sae(found[-1])
    names = runs_within(folder)
    held = f", which holds the runs {', '.join(names)}: give one of these" if names else ""
    raise FileNotFoundError(
        f"{where}: SAE must be a folder with a checkpoint ({STATE}), checkpoint-<step> folders or "
        f"an SAE of SAELens ({CONFIG}), got {folder}{held}"
    )


def read_model(
    sae: SAE, inputs: Inputs, head: bool
) -> tuple[torch.nn.Module, Any, list[torch.Tensor]]:
    """The model, its tokeniser and windows of text: the model last, after all that may be wrong."""
    local = inputs.local()
    with local.reading():
        _check_sizes(sae, inputs, local)
        tokenizer = local.tokenizer()
        # a shorter one at the end says little
        windows = inputs.windows(tokenizer, whole=True)
        return local.model(head=head), tokenizer, windows


def _check_sizes(sae: SAE, inputs: Inputs, local: LocalModel) -> None:
    from mikernels.activations import Site
    from mikernels.evaluate.judged import check_width
    from mikernels.models.sites import read_sites

    d, layers = local.sizes()
    if d is not None:
        check_width(inputs.where, sae, d * len(inputs.sites), str(local.folder))
    for site in read_sites(inputs.where, "--layer", inputs.sites):
        if layers is not None and isinstance(site, Site) and not 0 <= site.layer < layers:
            raise IndexError(
                f"{inputs.where}: --layer must be in 0..{layers - 1} ({layers} decoder layers), "
                f"got {site.layer}"
            )


def batch_of(where: str, rows: Rows, targeted: bool) -> Batch:
    """Rows with what their reconstructions are compared with.

    Args:
        targeted: that is their targets, not they themselves; see `learned_target`.

    Raises:
        ValueError: there are none.
    """
    from mikernels.values.batch import Batch

    targets = rows.get("targets") if targeted else None
    if targeted and targets is None:
        raise ValueError(
            f"{where}: the SAE has learned to give a target, and must be compared with it, got "
            f"none; give the --model and site that it was trained on, or --activations with targets"
        )
    return Batch(rows["activations"].float(), None if targets is None else targets.float())


def residual_layer(inputs: Inputs) -> int | str | None:
    """The layer (or module) whose output is all that is read; None where it is something else."""
    from mikernels.activations import Site
    from mikernels.models.sites import read_sites

    site, *more = read_sites(inputs.where, "--layer", inputs.sites)
    if more or (isinstance(site, Site) and site.place != "residual"):
        return None
    return site.layer if isinstance(site, Site) else site


def splice(
    sae: SAE,
    model: torch.nn.Module,
    tokenizer: Any,
    windows: list[torch.Tensor],
    inputs: Inputs,
    seed: int,
    console: Console,
) -> Spliced:
    """The model's loss with the reconstruction in place, with a bar of its progress."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from mikernels.evaluate import measure_spliced
    from mikernels.evaluate.spliced import RUNS

    layer = residual_layer(inputs)
    assert layer is not None
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        total = len(RUNS) * sum(map(len, windows))
        task = progress.add_task("running the model", total=total)
        return measure_spliced(
            model,
            layer,
            windows,
            sae,
            skip_first=inputs.skip_first,
            special_ids=tokenizer.all_special_ids,
            seed=seed,
            progress=lambda tokens: progress.advance(task, tokens),
        )


def set_threads(where: str, threads: int | None) -> None:
    """`--threads`."""
    import torch

    if threads is not None:
        if threads < 1:
            raise ValueError(f"{where}: --threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)


def _print(console: Console, found: TextTable) -> None:
    from rich.table import Table

    table = Table(title=found.title, header_style="bold")
    for i, name in enumerate(found.columns):
        table.add_column(name, justify="right" if i else "left")
    for row in found.rows:
        table.add_row(*row)
    console.print(table)
    if found.note:
        console.print(found.note, highlight=False, markup=False)


def print_reconstruction(
    console: Console, found: Reconstruction, random: Reconstruction | None = None
) -> None:
    """Its table, and how often features fire."""
    from mikernels.report.quality import density_table, reconstruction_table

    _print(console, reconstruction_table(found, random))
    _print(console, density_table(found))


def print_spliced(console: Console, found: Spliced) -> None:
    """Its table."""
    from mikernels.report.quality import spliced_table

    _print(console, spliced_table(found))
    if not found.told_apart:
        console.print("SAE and random SAE are not told apart", style="yellow")
