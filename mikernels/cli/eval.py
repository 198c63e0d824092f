# SPDX-License-Identifier: Apache-2.0
"""`mikernels eval`: what a trained SAE does on activations or text that it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mikernels.cli.figures import Json, check_json, write_figures
from mikernels.cli.inputs import (
    TOKENS,
    Activations,
    Context,
    Field,
    GGUFFile,
    Inputs,
    Layer,
    Model,
    OwnPlace,
    Skip,
    SkipFirst,
    Texts,
    Tokens,
    learned_target,
    read_inputs,
)
from mikernels.cli.judged import (
    JUDGES,
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
    set_threads,
    splice,
)
from mikernels.cli.options import device_of, option
from mikernels.cli.train_runs import sparsity

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from mikernels.evaluate import Probes, Reconstruction
    from mikernels.nn import SAE


def evaluate(
    sae: Trained,
    activations: Activations = None,
    model: Model = None,
    gguf_file: GGUFFile = None,
    layer: Layer = None,
    site: OwnPlace = None,
    text: Texts = None,
    field: Field = "text",
    context: Context = 256,
    skip_first: SkipFirst = 1,
    skip: Skip = 0,
    tokens: Tokens = None,
    spliced: Annotated[
        bool,
        option(
            "With --model: also the model's loss with the reconstruction in place.",
            JUDGES,
            "--spliced/--no-spliced",
        ),
    ] = True,
    probes: Annotated[
        bool,
        option("With --model: also sparse probes, by sae-probes (the extra).", JUDGES, "--probes"),
    ] = False,
    synthetic: Annotated[
        str | None,
        option(
            "Instead of activations: a world of known features, small or 16k, that the SAE was "
            "trained on (sae-lens).",
            JUDGES,
            metavar="SIZE",
        ),
    ] = None,
    probe_cache: Annotated[
        Path, option("Folder that keeps the activations of --probes.", JUDGES)
    ] = Path("out/probes"),
    k: OfBatchTopK = None,
    batch_size: BatchSize = 4096,
    seed: Annotated[int, option("Seed of the random SAE and the intervals.", JUDGES)] = 0,
    device: Device = None,
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """Judge a trained SAE: reconstructions, and what its language model loses by them.

    With --activations: variance unexplained, L0, dead features, how often each fires. With --model
    also the cross-entropy of the model when the layer's output is replaced by the reconstruction,
    beside a random SAE and ablations. Give activations or text that the SAE was not trained on.

    Examples:

        mikernels eval out/sae --activations held-out/

        mikernels eval out/sae --model ~/models/gpt2 --layer 6 --text unseen.txt --json eval.json

        mikernels eval out/sae --model ~/models/gpt2 --layer 6 --text corpus.txt --skip 10M
    """
    from rich.console import Console

    from mikernels.activations import Site
    from mikernels.evaluate import measure_reconstruction

    inputs = None
    if synthetic is not None:
        from mikernels.evaluate.synthetic import SIZES

        if activations or model is not None:
            raise ValueError("eval: --synthetic must go without --activations and --model")
        if synthetic not in SIZES:
            raise ValueError(f"eval: --synthetic must be one of {list(SIZES)}, got {synthetic!r}")
    else:
        inputs = read_inputs(
            "eval",
            activations=activations,
            model=model,
            gguf_file=gguf_file,
            layers=None if layer is None else [layer],
            run=sae if layer is not None or activations else None,
            site=site,
            text=text,
            field=field,
            context=context,
            skip_first=skip_first,
            skip=skip,
            tokens=tokens,
        )
    if probes:
        from mikernels.evaluate.probes import check_installed

        if model is None:
            raise ValueError("eval: --probes needs --model, got none")
        check_installed("eval")
    if inputs is not None and model is not None and (spliced or probes):
        place = next((s.place for s in inputs.sites if isinstance(s, Site)), "residual")
        if place != "residual":
            raise ValueError(
                f"eval: --site must be residual for --spliced and --probes, got {place}; add "
                f"--no-spliced for the reconstruction alone"
            )
    if batch_size < 1:
        raise ValueError(f"eval: --batch-size must be at least 1, got {batch_size}")
    check_json("eval", json_file)
    set_threads("eval", threads)
    target = device_of("eval", device)
    judged = load_any(sae, k).to(target).eval()
    targeted = learned_target(sae, judged)
    if targeted and model is not None and (spliced or probes):
        raise ValueError(
            "eval: the SAE must reconstruct what it reads for --spliced and --probes, got one that "
            "has learned a target; add --no-spliced for the reconstruction alone"
        )
    console = Console()
    console.print(
        f"{judged.name} of {sae}: d {judged.config.d:,}, F {judged.config.n_features:,}, "
        f"{sparsity(judged)}",
        highlight=False,
    )
    found: dict[str, Any] = {"sae": str(sae), "architecture": judged.architecture, "seed": seed}
    found["config"] = judged.config.to_dict()
    if inputs is None:
        from mikernels.evaluate.synthetic import judge, world

        assert synthetic is not None
        known = judge(judged, world(synthetic), tokens or TOKENS, seed=seed + 2)
        found |= {"synthetic": synthetic, "known": known}
        for name, value in known.items():
            console.print(f"{name:>12}  {value:.4f}", highlight=False)
    elif inputs.activations:
        saved = inputs.saved(judged, batch_size)
        measured = measure_reconstruction(
            judged, (batch_of("eval", rows, targeted) for rows in saved), batch_size
        )
        found |= {"activations": inputs.label, "reconstruction": measured.to_dict()}
        print_reconstruction(console, measured)
    else:
        assert layer is not None and text is not None
        settings = {"layer": layer, "sites": [str(s) for s in inputs.sites]}
        settings |= {"context": context, "skip_first": skip_first}
        network, tokenizer, windows = read_model(judged, inputs, spliced)
        network = network.to(target)
        found |= {"model": model, "text": [str(path) for path in text], **settings}
        if spliced:
            loss = splice(judged, network, tokenizer, windows, inputs, seed, console)
            found |= {"reconstruction": loss.reconstruction.to_dict(), "spliced": loss.to_dict()}
            print_reconstruction(console, loss.reconstruction, loss.random_reconstruction)
            print_spliced(console, loss)
        else:
            measured = _by_model(judged, network, tokenizer, windows, inputs, batch_size, targeted)
            found["reconstruction"] = measured.to_dict()
            print_reconstruction(console, measured)
        if probes:
            name = str(inputs.local().folder.resolve())
            probed = _probed(judged, network, tokenizer, name, layer, probe_cache, seed, console)
            found["probes"] = probed.to_dict()
            _print_probes(console, probed)
    write_figures("eval", json_file, found)


def _by_model(
    sae: SAE,
    model: torch.nn.Module,
    tokenizer: Any,
    windows: list[torch.Tensor],
    inputs: Inputs,
    batch_size: int,
    targeted: bool,
) -> Reconstruction:
    from mikernels.activations import ModelSource
    from mikernels.evaluate import measure_reconstruction

    source = ModelSource(
        model,
        tokenizer,
        inputs.sites,
        [],
        context=inputs.context,
        skip_first=inputs.skip_first,
        target=inputs.targets or None,
    )
    rows = (batch_of("eval", found, targeted) for found in source.read_windows(windows))
    return measure_reconstruction(sae, rows, batch_size)


def _probed(
    sae: SAE,
    model: torch.nn.Module,
    tokenizer: Any,
    name: str,
    layer: int,
    cache: Path,
    seed: int,
    console: Console,
) -> Probes:
    from mikernels.evaluate import measure_probes

    with console.status("sparse probes") as status:
        return measure_probes(
            model, tokenizer, layer, sae, cache, name=name, seed=seed, progress=status.update
        )


def _print_probes(console: Console, found: Probes) -> None:
    from rich.table import Table

    table = Table(
        title=f"Sparse probes, mean AUC over {len(found.datasets)} data sets", header_style="bold"
    )
    for name in ("features", "SAE", "random SAE", "activations", "SAE less random"):
        table.add_column(name, justify="right")
    for k, gain in found.gain.items():
        apart = "" if found.told_apart(k) else " (not told apart)"
        intervals = (str(found.auc[source][k]) for source in ("sae", "random", "raw"))
        table.add_row(str(k), *intervals, f"{gain}{apart}")
    table.add_row("all", "", "", str(found.raw_all), "")
    console.print(table)
    console.print(
        "95 % intervals of a bootstrap over data sets; not told apart: those of the SAE and the "
        "random SAE overlap",
        highlight=False,
    )
