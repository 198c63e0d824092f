# SPDX-License-Identifier: Apache-2.0
"""`mikernels report`: every feature of a trained SAE, as a folder of pages."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mikernels.cli.figures import Json, check_json, write_figures
from mikernels.cli.inputs import (
    Activations,
    Context,
    Field,
    GGUFFile,
    Inputs,
    Layers,
    Model,
    OwnPlace,
    Skip,
    SkipFirst,
    Texts,
    Tokens,
    activations_of,
    learned_target,
    read_inputs,
)
from mikernels.cli.judged import (
    BatchSize,
    Device,
    OfBatchTopK,
    Threads,
    Trained,
    batch_of,
    load_any,
    print_reconstruction,
    print_spliced,
    read_model,
    residual_layer,
    set_threads,
    splice,
)
from mikernels.cli.options import OUTPUT, device_of, option
from mikernels.cli.train_runs import sparsity

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from mikernels.activations import Rows
    from mikernels.evaluate import Reconstruction, Spliced
    from mikernels.nn import SAE
    from mikernels.report import CollectedFeatures
    from mikernels.report.neuronpedia import Source

NAME = "report"
PAGES, NEURONPEDIA = "Pages", "Neuronpedia"


def report(
    ctx: typer.Context,
    run: Trained,
    activations: Activations = None,
    model: Model = None,
    gguf_file: GGUFFile = None,
    layer: Layers = None,
    site: OwnPlace = None,
    text: Texts = None,
    field: Field = "text",
    context: Context = 256,
    skip_first: SkipFirst = 1,
    skip: Skip = 0,
    tokens: Tokens = None,
    features: Annotated[
        str, option("Those to show: all, or numbers and ranges such as 1,5,100-199.", PAGES)
    ] = "all",
    examples: Annotated[int, option("Strongest examples of each feature.", PAGES)] = 10,
    samples: Annotated[int, option("Samples of each lower quarter of its activations.", PAGES)] = 2,
    title: Annotated[
        str | None, option("Of the page.", PAGES, show_default="the SAE and its model")
    ] = None,
    spliced: Annotated[
        bool,
        option(
            "With --model: also the model's loss with the reconstruction in place.",
            PAGES,
            "--spliced/--no-spliced",
        ),
    ] = True,
    neuronpedia: Annotated[
        Path | None, option("Also write all features for Neuronpedia to this folder.", NEURONPEDIA)
    ] = None,
    source: Annotated[
        str | None,
        option(
            "Their names of model, layer and set: gpt2-small/6-res-16k.",
            NEURONPEDIA,
            "--neuronpedia-source",
            metavar="MODEL/LAYER-SET",
            show_default="by --model and --layer",
        ),
    ] = None,
    creator: Annotated[
        str,
        option("Id of their user that imports it.", NEURONPEDIA, "--neuronpedia-creator"),
    ] = "mikernels",
    k: OfBatchTopK = None,
    batch_size: BatchSize = 4096,
    seed: Annotated[int, option("Of the random SAE beside it, and of intervals.", PAGES)] = 0,
    device: Device = None,
    threads: Threads = None,
    scratch: Annotated[
        Path | None,
        option(
            "Folder that keeps activations meanwhile, 8 bytes each.",
            OUTPUT,
            show_default="in memory",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        option("Folder of the report.", OUTPUT, show_default="RUN/report, or beside RUN"),
    ] = None,
    json_file: Json = None,
) -> None:
    """Look at every feature: pages to search, sort and link to, which open without a server.

    One pass over the tokens. Of each feature: the text that it fires on, tokens that it promotes
    (with --model), features that write the same, how often and how strongly it fires; above all of
    them what `mikernels eval` measures. --activations are shards that have the text of their
    tokens, as the demo's, whose runs need no option at all.

    Examples:

        mikernels report out/sae --model ~/models/gpt2 --layer 6 --text corpus.txt --tokens 1M

        mikernels report out/demo/smollm2/fused

        mikernels report saelens/ --model gpt2 --layer 6 --text corpus.txt --features 0-999 \
--out pages
    """
    from rich.console import Console

    from mikernels import _pages
    from mikernels.report.folder import check_free

    started = time.perf_counter()
    _pages.check_installed(NAME)
    if batch_size < 1:
        raise ValueError(f"{NAME}: --batch-size must be at least 1, got {batch_size}")
    check_json(NAME, json_file)
    set_threads(NAME, threads)
    target = device_of(NAME, device)
    folder = _folder_of(run) if out is None else out
    check_free(folder, NAME)
    sae = load_any(run, k, NAME).to(target).eval()
    numbers = _numbers(features, _all_features(sae))
    if not activations and model is None:
        activations = activations_of(run)
    inputs = read_inputs(
        NAME,
        run=run,
        activations=activations,
        model=model,
        gguf_file=gguf_file,
        layers=layer,
        site=site,
        text=text,
        field=field,
        context=context,
        skip_first=skip_first,
        skip=skip,
        tokens=tokens,
    )
    pedia = None if neuronpedia is None else _source(inputs, source, creator, sae)
    rows_of_training = _metrics(run)
    console = Console()
    console.print(
        f"{sae.name} of {run}: d {sae.config.d:,}, F {sae.config.n_features:,}, {sparsity(sae)}",
        highlight=False,
        markup=False,
    )
    read = _read(sae, inputs, learned_target(run, sae), batch_size, seed, spliced, console)
    found: dict[str, Any] = {
        "sae": str(run),
        "architecture": sae.architecture,
        "config": sae.config.to_dict(),
        **read.origin,
    }
    collected = _collect(sae, read, examples, samples, scratch, batch_size, console)
    reconstruction = read.reconstruction()
    if reconstruction is not None:
        random = None if read.loss is None else read.loss.random_reconstruction
        print_reconstruction(console, reconstruction, random)
    if read.loss is not None:
        print_spliced(console, read.loss)
    _write(
        collected,
        folder,
        numbers,
        console,
        title=title or f"Features of {run.absolute().name}",
        reconstruction=reconstruction,
        spliced=read.loss,
        metrics=rows_of_training,
        known=_known(run, sae, read.origin),
        command=_command(ctx),
    )
    if neuronpedia is not None and pedia is not None:
        from mikernels.report.neuronpedia import export

        with console.status("writing features for Neuronpedia"):
            where = export(collected, neuronpedia, pedia)
        console.print(f"for Neuronpedia: {where}", highlight=False, markup=False)
    found |= {
        "report": str(folder),
        "tokens": collected.n_rows,
        "features": collected.n_features,
        "features_that_fire": int((collected.counts > 0).sum()),
        "reconstruction": None if reconstruction is None else reconstruction.to_dict(),
        "spliced": None if read.loss is None else read.loss.to_dict(),
        "seconds": time.perf_counter() - started,
    }
    write_figures(NAME, json_file, found)


def _folder_of(run: Path) -> Path:
    """Within a run, beside anything else: a checkpoint holds its own files alone."""
    from mikernels.training.state.checkpoint import checkpoints

    whole = run.absolute()
    return run / "report" if checkpoints(run) else whole.with_name(f"{whole.name}-report")


def _all_features(sae: SAE) -> int:
    from mikernels.nn import CrossLayerTranscoder

    n = sae.config.n_features
    return n * sae.config.n_layers if isinstance(sae, CrossLayerTranscoder) else n


def _numbers(given: str, n: int) -> list[int] | None:
    """`--features`; None is all."""
    if given.strip() == "all":
        return None
    found: list[int] = []
    for part in given.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if not first <= last < n:
            raise ValueError(
                f"{NAME}: --features must be all, or numbers and ranges in 0..{n - 1} such as "
                f"1,5,100-199, got {part!r} in {given!r}"
            )
        found += range(first, last + 1)
    return list(dict.fromkeys(found))


def _source(inputs: Inputs, given: str | None, creator: str, sae: SAE) -> Source:
    """What Neuronpedia calls it."""
    from mikernels.report.neuronpedia import Source

    layer = residual_layer(inputs) if inputs.sites else None
    if given is None and inputs.model is not None and isinstance(layer, int):
        model = re.sub(r"[^a-z0-9.-]+", "-", Path(inputs.model).stem.lower()).strip("-.")
        given = f"{model}/{layer}-res-{sae.config.n_features}"
    parts = re.fullmatch(r"([^/]+)/(\d+)-([^/]+)", given or "")
    if parts is None:
        raise ValueError(
            f"{NAME}: --neuronpedia-source must be MODEL/LAYER-SET such as gpt2-small/6-res-16k, "
            f"got {given!r}"
        )
    return Source(
        model=parts[1],
        layer=int(parts[2]),
        set=parts[3],
        creator_id=creator,
        creator=creator,
        release=parts[3],
        title=parts[3],
        description=f"{sae.name}, {sae.config.n_features:,} features",
        dataset=inputs.label,
        n_tokens_in_prompt=inputs.context if inputs.model else None,
    )


def _metrics(run: Path) -> list[dict[str, Any]]:
    """What was measured in training, if that is there."""
    from mikernels.training.state.metrics import complete_rows
    from mikernels.training.trainer import METRICS

    path = next((p for p in (run / METRICS, run.absolute().parent / METRICS) if p.exists()), None)
    return [] if path is None else [*complete_rows(path, NAME, "move the file away")]


@dataclass
class _Reading:
    """What is read, and what is measured on the way.

    Attributes:
        rows: to be read once. total: how many at most. text: a tokenizer, or the text of tokens.
        origin: where they are from. model: of the activations. loss: with the reconstruction in
            place.
    """

    rows: Iterator[Rows]
    total: int
    text: Any
    origin: dict[str, Any]
    measured: Any
    model: torch.nn.Module | None = None
    loss: Spliced | None = None

    def reconstruction(self) -> Reconstruction | None:
        """After the rows were read; None of a transcoder without its targets."""
        if self.loss is not None:
            return self.loss.reconstruction
        # without a mean, nothing was counted
        return self.measured.result() if self.measured and len(self.measured.mean) else None


def _read(
    sae: SAE,
    inputs: Inputs,
    targeted: bool,
    batch_size: int,
    seed: int,
    spliced: bool,
    console: Console,
) -> _Reading:
    from mikernels.evaluate.reconstruction import ReconstructionSums

    if inputs.activations:
        text = inputs.pieces()
        shards = inputs.shards()
        total = sum(shard.rows for shard in shards) - inputs.skip
        total = total if inputs.tokens is None else min(total, inputs.tokens)
        measured: ReconstructionSums | None = ReconstructionSums(NAME)
        rows = _measured(sae, targeted, inputs.saved(sae, batch_size), measured, batch_size)
        return _Reading(rows, total, text, {"activations": inputs.label}, measured)

    from mikernels.activations import ModelSource

    with console.status("loading the model"):
        network, tokenizer, windows = read_model(sae, inputs, True)
    network = network.to(next(sae.parameters()).device)
    source = ModelSource(
        network,
        tokenizer,
        inputs.sites,
        [],
        context=inputs.context,
        skip_first=inputs.skip_first,
        target=inputs.targets or None,
    )
    loss = None
    if spliced and not targeted and residual_layer(inputs) is not None:
        loss = splice(sae, network, tokenizer, windows, inputs, seed, console)
    measured = None if loss else ReconstructionSums(NAME)
    assert inputs.texts is not None
    origin = {
        "model": inputs.model,
        "site": ", ".join(source.sites),
        "text": [str(path) for path in inputs.texts.paths],
        "context": inputs.context,
        "skip": inputs.skip,
        "skip_first": inputs.skip_first,
    }
    rows = _measured(sae, targeted, source.read_windows(windows), measured, batch_size)
    total = sum(map(len, windows))
    return _Reading(rows, total, tokenizer, origin, measured, network, loss)


def _measured(
    sae: SAE, targeted: bool, rows: Iterable[Rows], sums: Any, batch_size: int
) -> Iterator[Rows]:
    """The same rows, whose reconstructions are counted on the way, where it is known of what."""
    import torch

    from mikernels.evaluate.judged import reconstructed

    for part in rows:
        if sums is not None and ("targets" in part or not targeted):
            batch = batch_of(NAME, part, targeted)
            with torch.no_grad():
                for one, codes, y in reconstructed(NAME, sae, batch, batch_size):
                    sums.add(one, codes, y)
        yield part


def _collect(
    sae: SAE,
    read: _Reading,
    examples: int,
    samples: int,
    scratch: Path | None,
    batch_size: int,
    console: Console,
) -> CollectedFeatures:
    from mikernels.report import collect_features

    with _bar(console) as progress:
        task = progress.add_task("tokens read", total=read.total)

        def counted() -> Iterator[Rows]:
            for part in read.rows:
                yield part
                progress.advance(task, len(part["activations"]))

        return collect_features(
            sae,
            counted(),
            read.text,
            model=read.model,
            examples=examples,
            samples=samples,
            scratch=scratch,
            batch=batch_size,
        )


def _write(
    collected: CollectedFeatures,
    folder: Path,
    numbers: list[int] | None,
    console: Console,
    **more: Any,
) -> None:
    from mikernels.report import write_report

    with _bar(console) as progress:
        total = collected.n_features if numbers is None else len(numbers)
        task = progress.add_task("features written", total=total)
        page = write_report(
            collected,
            folder,
            numbers=numbers,
            progress=lambda n: progress.advance(task, n),
            **more,
        )
    size = sum(path.stat().st_size for path in folder.rglob("*.*"))
    console.print(
        f"report: {page} ({size / 2**20:,.1f} MB); open it in a browser",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _bar(console: Console) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    return Progress(*columns, console=console, transient=True)


def _known(run: Path, sae: SAE, origin: dict[str, Any]) -> dict[str, str]:
    from mikernels._version import __version__

    shown = {name: _said(value) for name, value in origin.items()}
    return {
        "SAE": str(run),
        "architecture": f"{sae.name}, d {sae.config.d:,}, F {sae.config.n_features:,}, "
        f"{sparsity(sae)}",
        **{name.replace("_", " "): value for name, value in shown.items()},
        "version": f"mikernels {__version__}",
    }


def _said(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _command(ctx: typer.Context) -> str:
    """What was typed, with the options that were given."""
    words = ["mikernels", NAME]
    for parameter in ctx.command.params:
        name = parameter.name or ""
        source = ctx.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        value = ctx.params[name]
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [parameter.opts[0], str(one)]
    return shlex.join(words)
