# SPDX-License-Identifier: Apache-2.0
"""`mikernels eval`: what a trained SAE does on activations or text that it has not seen."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mikernels.cli.figures import Json, check_json, write_figures
from mikernels.cli.train import (
    ACTIVATIONS,
    Context,
    GGUFFile,
    Texts,
    _device,
    count,
    option,
    sparsity,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from rich.console import Console

    from mikernels.evaluate import Probes, Reconstruction, Spliced
    from mikernels.models.load import LocalModel
    from mikernels.nn import SAE

JUDGES = "Judges"
# with --model: a minute or two of SmolLM2-135M on a desktop processor
TOKENS = 32_768


def evaluate(
    sae: Annotated[
        Path,
        typer.Argument(
            help="Folder of a checkpoint, of a training run (its newest one), or of SAELens."
        ),
    ],
    activations: Annotated[
        Path | None,
        option("Folder of safetensors shards, or one file, of \\[rows, d].", ACTIVATIONS),
    ] = None,
    model: Annotated[
        Path | None,
        option("Instead: local folder of a Hugging Face model or a GGUF file.", ACTIVATIONS),
    ] = None,
    gguf_file: GGUFFile = None,
    layer: Annotated[
        int | None,
        option("Decoder layer, from 0: the residual stream after it.", ACTIVATIONS),
    ] = None,
    text: Texts = None,
    context: Context = 256,
    skip_first: Annotated[
        int, option("Positions of a window left as they are: attention sinks.", ACTIVATIONS)
    ] = 1,
    skip: Annotated[
        int,
        option(
            "Rows, or tokens of the text, passed over at the start: those trained on.",
            ACTIVATIONS,
            parser=lambda text: 0 if str(text) == "0" else count(text),
            metavar="N",
        ),
    ] = 0,
    tokens: Annotated[
        int | None,
        option(
            "Rows, or tokens of the text, to judge by, e.g. 100k.",
            ACTIVATIONS,
            parser=count,
            metavar="N",
            show_default="all rows, or 32,768 tokens",
        ),
    ] = None,
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
    k: Annotated[
        float | None,
        option("Of a BatchTopK SAE from SAELens, which does not keep it.", JUDGES),
    ] = None,
    batch_size: Annotated[int, option("Rows encoded at a time.", JUDGES)] = 4096,
    seed: Annotated[int, option("Seed of the random SAE and the intervals.", JUDGES)] = 0,
    device: Annotated[
        str | None,
        option("cpu, cuda or cuda:N.", JUDGES, show_default="cuda where there is one"),
    ] = None,
    threads: Annotated[int | None, option("CPU threads.", JUDGES, show_default="torch's")] = None,
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
    import torch
    from rich.console import Console

    if (activations is not None) + (model is not None) + (synthetic is not None) != 1:
        raise ValueError(
            "eval: give either --activations FOLDER, or --model FOLDER with --layer and --text, or "
            "--synthetic SIZE"
        )
    if synthetic is not None:
        from mikernels.evaluate.synthetic import SIZES

        if synthetic not in SIZES:
            raise ValueError(f"eval: --synthetic must be one of {list(SIZES)}, got {synthetic!r}")
    if model is not None and (layer is None or not text):
        raise ValueError("eval: --model needs --layer NUMBER and --text FILE")
    if probes:
        from mikernels.evaluate.probes import check_installed

        if model is None:
            raise ValueError("eval: --probes needs --model, got none")
        check_installed("eval")
    if not 0 <= skip_first < context - 1:
        raise ValueError(
            f"eval: --skip-first must be in 0..{context - 2} (--context less two), got {skip_first}"
        )
    if batch_size < 1:
        raise ValueError(f"eval: --batch-size must be at least 1, got {batch_size}")
    check_json("eval", json_file)
    if threads is not None:
        if threads < 1:
            raise ValueError(f"eval: --threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    target = _device(device, "eval")
    judged = load_any(sae, k).to(target).eval()
    console = Console()
    console.print(
        f"{judged.name} of {sae}: d {judged.config.d:,}, F {judged.config.n_features:,}, "
        f"{sparsity(judged)}",
        highlight=False,
    )
    found: dict[str, Any] = {"sae": str(sae), "architecture": judged.architecture, "seed": seed}
    found["config"] = judged.config.to_dict()
    if synthetic is not None:
        from mikernels.evaluate.synthetic import judge, world

        known = judge(judged, world(synthetic), tokens or TOKENS, seed=seed + 2)
        found |= {"synthetic": synthetic, "known": known}
        for name, value in known.items():
            console.print(f"{name:>12}  {value:.4f}", highlight=False)
    elif activations is not None:
        measured = _by_rows(judged, activations, skip, tokens, batch_size)
        found |= {"activations": str(activations), "reconstruction": measured.to_dict()}
        _print_reconstruction(console, measured)
    else:
        assert model is not None and layer is not None and text is not None
        settings = {"layer": layer, "context": context, "skip_first": skip_first}
        network, tokenizer, windows = _load(
            judged, model, gguf_file, layer, text, context, skip, tokens or TOKENS, spliced
        )
        network = network.to(target)
        found |= {"model": str(model), "text": [str(path) for path in text], **settings}
        if spliced:
            loss = _spliced(judged, network, tokenizer, windows, layer, skip_first, seed, console)
            found |= {"reconstruction": loss.reconstruction.to_dict(), "spliced": loss.to_dict()}
            _print_reconstruction(console, loss.reconstruction, loss.random_reconstruction)
            _print_spliced(console, loss)
        else:
            measured = _by_model(
                judged, network, tokenizer, windows, layer, context, skip_first, batch_size
            )
            found["reconstruction"] = measured.to_dict()
            _print_reconstruction(console, measured)
        if probes:
            probed = _probed(judged, network, tokenizer, model, layer, probe_cache, seed, console)
            found["probes"] = probed.to_dict()
            _print_probes(console, probed)
    write_figures("eval", json_file, found)


def load_any(folder: Path, k: float | None = None) -> SAE:
    """The SAE of a checkpoint, of the newest checkpoint of a run, or of a folder of SAELens.

    Raises:
        FileNotFoundError, ValueError: none of these; see their loaders.
    """
    from mikernels.integrations import saelens
    from mikernels.integrations.saelens.form import CONFIG
    from mikernels.training import load_sae
    from mikernels.training.state.checkpoint import STATE, checkpoints

    if (folder / CONFIG).exists():
        return saelens.load_sae(folder, k=k)
    if k is not None:
        raise ValueError(f"eval: --k must be left out for an SAE that is not SAELens', got {k:g}")
    if (folder / STATE).exists():
        return load_sae(folder)
    if found := checkpoints(folder):
        return load_sae(found[-1])
    raise FileNotFoundError(
        f"eval: SAE must be a folder with a checkpoint ({STATE}), checkpoint-<step> folders or an "
        f"SAE of SAELens ({CONFIG}), got {folder}"
    )


def _by_rows(
    sae: SAE, folder: Path, skip: int, tokens: int | None, batch_size: int
) -> Reconstruction:
    from mikernels.activations.shards import Shard, open_shards
    from mikernels.evaluate import measure_reconstruction
    from mikernels.evaluate.judged import check_width

    shards = open_shards(folder)
    for shard in shards:
        check_width("eval", sae, shard.d, str(shard.path))
    held = sum(shard.rows for shard in shards)
    if held <= skip:
        raise ValueError(
            f"eval: --activations must hold rows after --skip {skip:,}, got {held:,} rows in "
            f"{folder}; give others, or a smaller --skip"
        )
    end = held if tokens is None else min(held, skip + tokens)

    def rows() -> Iterator[torch.Tensor]:
        first = 0
        for shard in shards:
            yield from _part(shard, skip - first, end - first)
            first += shard.rows

    def _part(shard: Shard, start: int, stop: int) -> Iterator[torch.Tensor]:
        stop = min(stop, shard.rows)
        for at in range(max(start, 0), stop, batch_size):
            yield shard.read(at, min(at + batch_size, stop))["activations"].float()

    return measure_reconstruction(sae, rows(), batch_size)


def _load(
    sae: SAE,
    folder: Path,
    gguf_file: str | None,
    layer: int,
    text: list[Path],
    context: int,
    skip: int,
    tokens: int,
    head: bool,
) -> tuple[torch.nn.Module, Any, list[torch.Tensor]]:
    """The model, its tokeniser and windows of text: the model last, after all that may be wrong."""
    from mikernels.activations import TextFiles
    from mikernels.models.load import LocalModel

    texts = TextFiles(text)
    local = LocalModel(folder, gguf_file)
    with local.reading():
        _check_sizes(sae, local, layer)
        tokenizer = local.tokenizer()
        windows = _windows(tokenizer, texts, context, skip, tokens)
        return local.model(head=head), tokenizer, windows


def _check_sizes(sae: SAE, local: LocalModel, layer: int) -> None:
    from mikernels.evaluate.judged import check_width

    d, layers = local.sizes()
    if d is not None:
        check_width("eval", sae, d, str(local.folder))
    if layers is not None and not 0 <= layer < layers:
        raise IndexError(
            f"eval: --layer must be in 0..{layers - 1} ({layers} decoder layers), got {layer}"
        )


def _windows(
    tokenizer: Any, texts: Any, context: int, skip: int, tokens: int
) -> list[torch.Tensor]:
    from mikernels.activations.windows import begins_with_bos, token_windows

    passed, wanted = (-(-number // context) for number in (skip, tokens))
    found = list(
        islice(
            token_windows(tokenizer, texts, context, bos=begins_with_bos(tokenizer)),
            passed + wanted,
        )
    )
    read = sum(map(len, found))
    # a shorter one at the end says little
    whole = [window for window in found[passed:] if len(window) == context]
    if not whole:
        after = f" after --skip {skip:,}" if skip else ""
        raise ValueError(
            f"eval: --text must hold a window of {context} tokens{after}, got {read:,} tokens in "
            f"all; give more text, or a smaller --context"
        )
    return whole


def _spliced(
    sae: SAE,
    model: torch.nn.Module,
    tokenizer: Any,
    windows: list[torch.Tensor],
    layer: int,
    skip_first: int,
    seed: int,
    console: Console,
) -> Spliced:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from mikernels.evaluate import measure_spliced
    from mikernels.evaluate.spliced import RUNS

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        total = len(RUNS) * sum(map(len, windows))
        task = progress.add_task("running the model", total=total)
        return measure_spliced(
            model,
            layer,
            windows,
            sae,
            skip_first=skip_first,
            special_ids=tokenizer.all_special_ids,
            seed=seed,
            progress=lambda tokens: progress.advance(task, tokens),
        )


def _by_model(
    sae: SAE,
    model: torch.nn.Module,
    tokenizer: Any,
    windows: list[torch.Tensor],
    layer: int,
    context: int,
    skip_first: int,
    batch_size: int,
) -> Reconstruction:
    from mikernels.activations import ModelSource
    from mikernels.evaluate import measure_reconstruction

    source = ModelSource(model, tokenizer, layer, [], context=context, skip_first=skip_first)
    rows = (found["activations"].float() for found in source.read_windows(windows))
    return measure_reconstruction(sae, rows, batch_size)


def _probed(
    sae: SAE,
    model: torch.nn.Module,
    tokenizer: Any,
    folder: Path,
    layer: int,
    cache: Path,
    seed: int,
    console: Console,
) -> Probes:
    from mikernels.evaluate import measure_probes

    name = str(folder.resolve())
    with console.status("sparse probes") as status:
        return measure_probes(
            model, tokenizer, layer, sae, cache, name=name, seed=seed, progress=status.update
        )


def _print_reconstruction(
    console: Console, found: Reconstruction, random: Reconstruction | None = None
) -> None:
    from rich.table import Table

    table = Table(title=f"Reconstruction of {found.tokens:,} activations", header_style="bold")
    columns = [found] if random is None else [found, random]
    table.add_column("")
    for name in ("SAE", "random SAE")[: len(columns)]:
        table.add_column(name, justify="right")
    lines = (
        ("variance unexplained (FVU)", "fvu", "{:.4f}"),
        ("mean squared error", "mse", "{:.4g}"),
        ("cosine", "cosine", "{:.4f}"),
        ("norm, reconstruction / activation", "norm_ratio", "{:.4f}"),
        ("L0, mean", "l0", "{:.1f}"),
    )
    for label, name, form in lines:
        table.add_row(label, *(form.format(getattr(column, name)) for column in columns))
    quantiles = ["  ".join(map(str, c.l0_quantiles.values())) for c in columns]
    shares = ", ".join(f"{100 * q:g}" for q in found.l0_quantiles)
    table.add_row(f"L0 of {shares} % of tokens", *quantiles)
    table.add_row(
        "features that never fired here", *(f"{c.dead:,} ({c.dead_fraction:.1%})" for c in columns)
    )
    console.print(table)
    bins = Table(title="How often features fire", header_style="bold")
    bins.add_column("share of tokens")
    bins.add_column("features", justify="right")
    for low, high, n in found.density_histogram:
        bins.add_row(f"{10**low:.2g} to {10**high:.2g}", f"{n:,}")
    console.print(bins)


def _print_spliced(console: Console, found: Spliced) -> None:
    from rich.table import Table

    table = Table(
        title=f"Next-token loss over {found.windows:,} windows, {found.predictions:,} predictions",
        header_style="bold",
    )
    for name in ("layer replaced by", "loss (nats)", "of mean ablation", "of zero ablation"):
        table.add_column(name, justify="left" if name.startswith("layer") else "right")
    recovered = {
        "sae": (found.recovered, found.recovered_zero),
        "random": (found.random_recovered, found.random_recovered_zero),
    }
    labels = {
        "clean": "itself",
        "sae": "the SAE",
        "random": "a random SAE",
        "mean": "its mean",
        "zero": "zero",
    }
    for name, label in labels.items():
        intervals = (str(interval) for interval in recovered.get(name, ()))
        table.add_row(label, f"{found.losses[name]:.4f}", *intervals)
    console.print(table)
    console.print(
        f"the SAE adds {found.increase} nats; recovered: share of an ablation's harm that is "
        f"undone; 95 % intervals of a bootstrap over windows",
        highlight=False,
        markup=False,
    )
    if not found.told_apart:
        console.print("SAE and random SAE are not told apart", style="yellow")


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
