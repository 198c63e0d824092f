# SPDX-License-Identifier: Apache-2.0
"""Sparse probing: how well a few of an SAE's features tell two classes of text apart.

The judge is sae-probes (Kantamneni et al., "Are Sparse Autoencoders Useful? A Case Study in Sparse
Probing", arXiv 2502.16681), with its 113 data sets in the package: of the k features that differ
most between the classes in training, a logistic regression, and its AUC on texts not trained on
(k-sparse probing: Gurnee et al., arXiv 2305.01610). It reads activations at the last token of each
text, which are collected here from any Hugging Face model and kept in a folder; nothing is
downloaded and no other model is loaded.

Beside the SAE stand a random SAE (`random_like`) and the activations themselves, of which a probe
takes k coordinates, or all: a number without them says little. A data set is a unit of the
bootstrap, so an interval is for the mean over data sets like these. With 8 it is wide.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from mikernels.evaluate.judged import Judged, as_judged, check_width, reconstructed
from mikernels.evaluate.random_sae import random_like
from mikernels.models.decoder import find_layer
from mikernels.models.hooks import check_fires, eager, returned
from mikernels.values.batch import Batch
from mikernels.values.intervals import RESAMPLES, Interval, bootstrap

WHERE = "measure_probes"
# short texts, of several kinds
DATASETS = (
    "117_us_state_FL",
    "131_temp_cat_Typical Time",
    "154_athlete_sport_football",
    "125_world_country_Italy",
    "129_arith_mc_A",
    "116_nyc_borough_Bronx",
    "41_truthqa_tf",
    "114_nyc_borough_Manhattan",
)
SOURCES = ("sae", "random", "raw")
# tokens of a text that are read, as in sae-probes
LONGEST = 1024


@dataclass(frozen=True, eq=False)
class Probes:
    """AUC of k-sparse probes, 0.5 for chance.

    Attributes:
        datasets: their names in sae-probes.
        auc: "sae", "random" or "raw" -> k -> the mean over data sets, with a 95 % interval.
        gain: k -> that of the SAE less that of the random SAE, data set by data set.
        raw_all: of a probe of all coordinates of the activations.
        by_dataset: "sae", "random" or "raw" -> data set -> k -> AUC.
    """

    datasets: list[str]
    auc: dict[str, dict[int, Interval]]
    gain: dict[int, Interval]
    raw_all: Interval
    by_dataset: dict[str, dict[str, dict[int, float]]]

    def told_apart(self, k: int) -> bool:
        """Whether the intervals of the SAE and the random one are apart."""
        return self.auc["sae"][k].told_apart(self.auc["random"][k])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "datasets": self.datasets,
            "auc": {
                name: {str(k): interval.to_dict() for k, interval in found.items()}
                for name, found in self.auc.items()
            },
            "gain": {str(k): interval.to_dict() for k, interval in self.gain.items()},
            "raw_all": self.raw_all.to_dict(),
            "told_apart": {str(k): self.told_apart(k) for k in self.gain},
            "by_dataset": self.by_dataset,
        }


class _Encoder:
    """What sae-probes asks of an SAE: `encode(x [n, d])` to `[n, F]`."""

    def __init__(self, sae: Judged | None):
        self._sae = sae

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        if self._sae is None:
            return x
        parts = reconstructed(WHERE, self._sae, Batch(x), max(1, len(x)))
        return torch.cat([codes.to_dense() for _, codes, _ in parts])


def check_installed(where: str = WHERE) -> None:
    """ModuleNotFoundError without the extra."""
    if importlib.util.find_spec("sae_probes") is None:
        raise ModuleNotFoundError(
            f"{where}: sae-probes must be installed; `pip install 'mikernels[probes]'`"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """sae-probes prints a line and a bar for every data set, and scikit-learn warns at each fit."""
    out, err = redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO())
    with out, err, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _prompts(dataset: str) -> list[str]:
    from sae_probes.utils_data import read_numbered_dataset_df

    return [str(prompt) for prompt in read_numbered_dataset_df(dataset)["prompt"]]


@torch.no_grad()
def _last_activations(
    model: torch.nn.Module, tokenizer: Any, layer: int, prompts: list[str], batch: int
) -> torch.Tensor:
    """`[prompts, d]` float32: the residual stream after the layer at each prompt's last token."""
    ids = [tokenizer(prompt)["input_ids"][:LONGEST] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    device = next(model.parameters()).device
    seen: list[torch.Tensor] = []
    module = find_layer(model, layer, WHERE)
    handle = module.register_forward_hook(lambda m, a, output: seen.append(returned(output)))
    found: list[torch.Tensor] = []
    training = [part for part in model.modules() if part.training]
    try:
        for part in training:
            part.training = False
        with eager():
            for start in range(0, len(order), batch):
                chosen = [ids[i] for i in order[start : start + batch]]
                ends = torch.tensor([len(tokens) - 1 for tokens in chosen])
                # after the last token: no token of a causal model sees what follows it
                padded = torch.zeros(len(chosen), int(ends.max()) + 1, dtype=torch.int64)
                for row, tokens in zip(padded, chosen, strict=True):
                    row[: len(tokens)] = torch.tensor(tokens)
                model(input_ids=padded.to(device), use_cache=False)
                x = seen.pop()
                found.append(x[torch.arange(len(chosen)), ends.to(x.device)].float().cpu())
    finally:
        handle.remove()
        for part in training:
            part.training = True
    rows = torch.cat(found)
    return torch.empty_like(rows).index_copy_(0, torch.tensor(order), rows)


def _run(
    sae: Judged | None, datasets: Sequence[str], ks: Sequence[int], seed: int, **where: Any
) -> dict[str, dict[int, float]]:
    """data set -> k -> AUC, by sae-probes."""
    from sae_probes import run_sae_evals

    with TemporaryDirectory() as results, _quiet():
        run_sae_evals(
            _Encoder(sae),
            reg_type="l1",
            setting="normal",
            ks=list(ks),
            datasets=list(datasets),
            results_path=results,
            device="cpu",
            seed=seed,
            **where,
        )
        lines = [
            line
            for path in sorted(Path(results).rglob("*.json"))
            for line in json.loads(path.read_text(encoding="utf-8"))
        ]
    found: dict[str, dict[int, float]] = {dataset: {} for dataset in datasets}
    for line in lines:
        found[line["dataset"]][int(line["k"])] = float(line["test_auc"])
    return found


def measure_probes(
    model: torch.nn.Module,
    tokenizer: Any,
    layer: int,
    sae: Any,
    cache: str | Path,
    *,
    name: str,
    datasets: Iterable[str] = DATASETS,
    ks: Sequence[int] = (1, 16),
    batch_size: int = 16,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Probes:
    """Judge an SAE by sparse probes.

    Args:
        model: a Hugging Face decoder, with or without a head; left as it was.
        tokenizer: its tokeniser.
        layer: the decoder layer after which the SAE reads the residual stream.
        sae: of `mikernels.nn`, or of another library, see `as_judged`.
        cache: folder in which the activations of (name, data set, layer) are kept.
        name: of the model in that folder: one model, one name.
        datasets: of `sae_probes.DATASETS`.
        ks: features of a probe.
        batch_size: texts run at once.
        resamples: of the bootstrap over data sets.
        seed: of the random SAE, the split and the bootstrap.
        progress: called with a line on what is begun.

    Raises:
        ModuleNotFoundError: without the extra `probes`.
        ValueError: unknown data sets, or an SAE of another width.
    """
    check_installed()
    with _quiet():
        import sae_probes
    datasets, ks = list(datasets), list(ks)
    unknown = sorted(set(datasets) - set(sae_probes.DATASETS))
    if unknown or not datasets:
        raise ValueError(
            f"{WHERE}: datasets must be among the {len(sae_probes.DATASETS)} of sae-probes, got "
            f"{unknown or 'none'}; sae_probes.DATASETS names them"
        )
    judged = as_judged(sae)
    check_fires(WHERE, model, [find_layer(model, layer, WHERE)])
    say = progress or (lambda line: None)
    # its names of places
    key, hook = hashlib.sha256(name.encode()).hexdigest()[:16], f"blocks.{layer}.hook_resid_post"
    folder = Path(cache) / f"model_activations_{key}"
    folder.mkdir(parents=True, exist_ok=True)
    held = []
    for number, dataset in enumerate(datasets, 1):
        path = folder / f"{dataset}_{hook}.pt"
        if not path.exists():
            say(f"activations of data set {number} of {len(datasets)}: {dataset}")
            rows = _last_activations(model, tokenizer, layer, _prompts(dataset), batch_size)
            partial = path.with_suffix(".partial")
            torch.save(rows, partial)
            partial.replace(path)
        held.append(torch.load(path, weights_only=True))
        check_width(WHERE, judged, held[-1].shape[1], f"layer {layer}")
    rows = torch.cat(held)
    twin = random_like(judged, rows[:: max(1, len(rows) // 4096)], rows.mean(0), seed)
    place = {"model_name": key, "hook_name": hook, "model_cache_path": str(cache)}
    found = {}
    for source, encoder in zip(SOURCES, (judged, twin, None), strict=True):
        say(f"probes: {source}")
        every = ks if encoder is not None else [*ks, rows.shape[1]]
        found[source] = _run(encoder, datasets, every, seed, **place)
    return _summary(found, datasets, ks, rows.shape[1], resamples, seed)


def _summary(
    found: dict[str, dict[str, dict[int, float]]],
    datasets: list[str],
    ks: list[int],
    d: int,
    resamples: int,
    seed: int,
) -> Probes:
    def of(source: str, k: int) -> np.ndarray:
        return np.array([[found[source][dataset][k]] for dataset in datasets])

    def mean(units: np.ndarray) -> Interval:
        return bootstrap(lambda sample: sample[..., 0].mean(-1), units, resamples, seed)

    return Probes(
        datasets=datasets,
        auc={source: {k: mean(of(source, k)) for k in ks} for source in SOURCES},
        gain={k: mean(of("sae", k) - of("random", k)) for k in ks},
        raw_all=mean(of("raw", d)),
        by_dataset=found,
    )
