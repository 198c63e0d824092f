# SPDX-License-Identifier: Apache-2.0
"""What a language model loses when a layer's output is replaced by an SAE's reconstruction.

The model reads the same windows of text five times: as it is, and with the residual stream after
the layer replaced, at every kept position at once, by

    sae       the SAE's reconstruction
    random    that of an SAE that has learned nothing (`random_like`)
    mean      the mean activation of the kept positions (mean ablation)
    zero      0 (zero ablation)

and CE is the cross-entropy of the next token in nats, the mean over all predictions ("downstream
loss" in Gao et al., arXiv 2406.04093; "loss recovered" in SAEBench, arXiv 2503.09532):

    recovered = (CE_ablated - CE_sae) / (CE_ablated - CE_clean)

1 is a perfect SAE, 0 one that is no better than the ablation. Mean ablation is the harder and the
headline: zero is far from any activation, so a poor SAE recovers most of what that destroys.

Positions that training drops are left as they are in all five: the first `skip_first` of a window
(attention sinks), special tokens, outliers by their norm. What is predicted from the first
skip_first positions does not count, as nothing before it is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mikernels._dispatch import accumulate_dtype
from mikernels.activations.dropped import dropped
from mikernels.evaluate.judged import Judged, as_judged, check_target, check_width, reconstructed
from mikernels.evaluate.random_sae import random_like
from mikernels.evaluate.reconstruction import Reconstruction, ReconstructionSums
from mikernels.models.decoder import find_layer
from mikernels.models.hooks import NEVER, check_fires, eager, in_place_of, returned
from mikernels.values.batch import Batch
from mikernels.values.intervals import RESAMPLES, Interval, bootstrap

WHERE = "measure_spliced"
RUNS = ("clean", "sae", "random", "mean", "zero")
# activations from which the random SAE takes what it keeps of a batch
SAMPLE = 4096

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Spliced:
    """Cross-entropies in nats, and what an SAE recovers of them.

    Attributes:
        windows: how many, the units of the bootstrap.
        predictions: next tokens that were predicted.
        positions: activations that were replaced.
        losses: the CE of each of RUNS.
        increase: CE of "sae" less that of "clean".
        recovered: of mean ablation, with a 95 % interval; NaN where ablation does no harm.
        recovered_zero: of zero ablation.
        random_recovered, random_recovered_zero: the same of the random SAE.
        reconstruction: of the replaced activations by the SAE, random_reconstruction by the other.
        by_window: `[windows, RUNS]` float64, the CE of each window.
    """

    windows: int
    predictions: int
    positions: int
    losses: dict[str, float]
    increase: Interval
    recovered: Interval
    recovered_zero: Interval
    random_recovered: Interval
    random_recovered_zero: Interval
    reconstruction: Reconstruction
    random_reconstruction: Reconstruction
    by_window: np.ndarray

    @property
    def told_apart(self) -> bool:
        """Whether the intervals of the SAE and the random one are apart, for mean ablation."""
        return self.recovered.told_apart(self.random_recovered)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found = {
            name: value.to_dict() if hasattr(value, "to_dict") else value
            for name, value in vars(self).items()
        }
        return {**found, "by_window": self.by_window.tolist(), "told_apart": self.told_apart}


class _Runner:
    """Runs windows with the layer's output changed by `change`, if there is one."""

    def __init__(self, model: torch.nn.Module, module: torch.nn.Module, layer: int | str):
        self._model, self._module, self._layer = model, module, layer
        self._change: Change | None = None
        self._calls = 0
        self.device = next(model.parameters()).device

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Hooked, in eval mode and uncompiled; as before when it is left."""
        training = [module for module in self._model.modules() if module.training]
        handle = self._module.register_forward_hook(self._hook)
        try:
            for module in training:
                module.training = False
            with eager():
                yield
        finally:
            handle.remove()
            for module in training:
                module.training = True

    def _hook(self, module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        self._calls += 1
        assert self._change is not None
        x = returned(output)
        y = self._change(x)
        return None if y is x else in_place_of(output, y)

    def losses(self, tokens: torch.Tensor, skip_first: int, change: Change) -> torch.Tensor:
        """`[w]` float64 sums of the cross-entropies of windows `[w, t]`, each of t - 1 -
        skip_first predictions."""
        self._change, self._calls = change, 0
        tokens = tokens.to(self.device)
        output = self._model(input_ids=tokens, use_cache=False)
        if self._calls != 1:
            raise ValueError(
                f"{WHERE}: layer must be one that a forward pass calls once, got {self._layer!r}, "
                f"whose hook fired {self._calls} times; {NEVER}"
            )
        logits = getattr(output, "logits", None)
        if logits is None or logits.shape[:2] != tokens.shape:
            raise ValueError(
                f"{WHERE}: model must return logits for every token, got "
                f"{type(output).__name__} of {type(self._model).__name__}; load it with "
                f"AutoModelForCausalLM"
            )
        found = torch.zeros(len(tokens), dtype=torch.float64)
        for window, row in enumerate(logits):  # one at a time: a vocabulary is wide
            row = row[skip_first:-1].to(accumulate_dtype(row.dtype))
            target = tokens[window, skip_first + 1 :]
            found[window] = torch.nn.functional.cross_entropy(row, target, reduction="none").sum(
                dtype=torch.float64
            )
        return found


def _groups(windows: Sequence[torch.Tensor], size: int) -> list[torch.Tensor]:
    """Windows `[w, t]` of one length each, in order."""
    groups: list[list[torch.Tensor]] = []
    for window in windows:
        fits = groups and len(groups[-1]) < size and groups[-1][0].shape == window.shape
        if fits:
            groups[-1].append(window)
        else:
            groups.append([window])
    return [torch.stack(group) for group in groups]


def _checked(windows: Iterable[torch.Tensor], skip_first: int) -> list[torch.Tensor]:
    found = list(windows)
    if not found:
        raise ValueError(
            f"{WHERE}: windows must hold at least one window of tokens, got none; give more text "
            f"or shorter windows"
        )
    if skip_first < 0:
        raise ValueError(f"{WHERE}: skip_first must be at least 0, got {skip_first}")
    for number, window in enumerate(found):
        if window.dim() != 1 or window.is_floating_point() or len(window) < skip_first + 2:
            raise ValueError(
                f"{WHERE}: windows must each hold token ids [t], t at least {skip_first + 2} "
                f"(skip_first and one to predict another from), got {window.dtype} "
                f"{list(window.shape)} at {number}; give longer ones"
            )
    return found


class _Sample:
    """The mean of the kept activations, and the first of them."""

    def __init__(self) -> None:
        self.count, self._sum = 0, torch.zeros(0, dtype=torch.float64)
        self._rows: list[torch.Tensor] = []
        self._held = 0

    def add(self, rows: torch.Tensor) -> None:
        self._sum = rows.sum(0, dtype=torch.float64) + (self._sum if self.count else 0)
        self.count += len(rows)
        if self._held < SAMPLE:
            self._rows.append(rows[: SAMPLE - self._held].clone())
            self._held += len(self._rows[-1])

    @property
    def mean(self) -> torch.Tensor:
        return self._sum / self.count

    @property
    def rows(self) -> torch.Tensor:
        return torch.cat(self._rows)


def _reconstruct(sae: Judged, sums: ReconstructionSums, rows: torch.Tensor) -> torch.Tensor:
    found = []
    for part, codes, y in reconstructed(WHERE, sae, Batch(rows), len(rows)):
        sums.add(part, codes, y)
        found.append(y)
    return torch.cat(found)


@torch.no_grad()
def measure_spliced(
    model: torch.nn.Module,
    layer: int | str,
    windows: Iterable[torch.Tensor],
    sae: Any,
    *,
    skip_first: int = 1,
    special_ids: Iterable[int] = (),
    outlier_norm: float | None = 10.0,
    windows_per_forward: int = 4,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Spliced:
    """Judge an SAE by the loss of its language model with the reconstruction in place.

    Args:
        model: a Hugging Face causal language model. It is left as it was: hooks, modes, weights.
        layer: the decoder layer after which the SAE reads the residual stream, as in ModelSource.
        windows: token ids `[t]` each, that the SAE was not trained on (`token_windows`).
        sae: of `mikernels.nn`, or of another library, see `as_judged`.
        skip_first, special_ids, outlier_norm: positions that training dropped, see ModelSource;
            special_ids are the tokeniser's `all_special_ids`.
        windows_per_forward: run at once.
        resamples: of the bootstrap over windows.
        seed: of the random SAE and the bootstrap.
        progress: called with the tokens that the model has read since the last call, five times
            those of the windows in all.

    Raises:
        ValueError, IndexError: no window, one too short, no such layer, a model without logits, an
            SAE of another width, no position to replace, activations or reconstructions that are
            not finite.
    """
    judged = as_judged(sae)
    check_target(WHERE, judged, False)
    groups = _groups(_checked(windows, skip_first), windows_per_forward)
    module = find_layer(model, layer, WHERE)
    check_fires(WHERE, model, [module])
    runner = _Runner(model, module, layer)
    special = torch.tensor(sorted(set(special_ids)), dtype=torch.int64)
    keeps: list[torch.Tensor] = []
    sample = _Sample()

    def watch(tokens: torch.Tensor) -> Change:
        def look(x: torch.Tensor) -> torch.Tensor:
            if x.dim() != 3 or x.shape[:2] != tokens.shape:
                raise ValueError(
                    f"{WHERE}: layer {layer!r} must give {[*tokens.shape]} (windows, tokens) and "
                    f"a width, got {list(x.shape)}; choose another module"
                )
            check_width(WHERE, judged, x.shape[-1], f"layer {layer!r}")
            drop = dropped(tokens, x, skip_first, special, outlier_norm)
            keeps.append(~torch.stack(list(drop.values())).any(0).to(x.device))
            sample.add(x[keeps[-1]])
            return x

        return look

    def run(tokens: torch.Tensor, change: Change) -> torch.Tensor:
        found = runner.losses(tokens, skip_first, change)
        if progress is not None:
            progress(tokens.numel())
        return found

    sums = {name: ReconstructionSums(WHERE) for name in ("sae", "random")}
    with runner.ready():
        losses = {"clean": [run(tokens, watch(tokens)) for tokens in groups]}
        if not sample.count:
            raise ValueError(
                f"{WHERE}: windows must hold a position to replace, got none after skip_first, "
                f"special tokens and outliers; give other text"
            )
        mean, zero = sample.mean, torch.zeros_like(sample.mean)
        twin = random_like(judged, sample.rows, mean, seed)
        made: dict[str, Change] = {
            "sae": lambda rows: _reconstruct(judged, sums["sae"], rows),
            "random": lambda rows: _reconstruct(twin, sums["random"], rows),
            "mean": lambda rows: mean.expand(len(rows), -1),
            "zero": lambda rows: zero.expand(len(rows), -1),
        }
        for name, make in made.items():
            losses[name] = [
                run(tokens, _replaced(keep, make))
                for tokens, keep in zip(groups, keeps, strict=True)
            ]
    counts = torch.tensor(
        [float(g.shape[1] - 1 - skip_first) for g in groups for _ in g], dtype=torch.float64
    )
    totals = torch.stack([torch.cat(losses[name]) for name in RUNS], -1)
    for name, total in zip(RUNS, totals.T, strict=True):
        if not total.isfinite().all():
            raise ValueError(
                f"{WHERE}: cross-entropies must be finite, got NaN or inf in "
                f"{int((~total.isfinite()).sum())} of {len(total)} windows ({name}); load the "
                f"model in a wider dtype"
            )
    return _summary(
        totals.numpy(),
        counts.numpy(),
        sample.count,
        sums["sae"].result(),
        sums["random"].result(),
        resamples,
        seed,
    )


def _replaced(keep: torch.Tensor, make: Change) -> Change:
    def change(x: torch.Tensor) -> torch.Tensor:
        rows = x[keep]
        if not len(rows):
            return x
        x = x.clone()
        x[keep] = make(rows).to(x.device, x.dtype)
        return x

    return change


def _summary(
    totals: np.ndarray,
    counts: np.ndarray,
    positions: int,
    reconstruction: Reconstruction,
    random_reconstruction: Reconstruction,
    resamples: int,
    seed: int,
) -> Spliced:
    """From `[windows, RUNS]` summed losses and `[windows]` predictions."""
    clean, sae, random, mean, zero = range(len(RUNS))
    units = np.concatenate([totals, counts[:, None]], -1)

    def ce(sample: np.ndarray, run: int) -> np.ndarray:
        return sample[..., run].sum(-1) / sample[..., -1].sum(-1)

    def recovered(run: int, ablated: int) -> Interval:
        def statistic(sample: np.ndarray) -> np.ndarray:
            harm = ce(sample, ablated) - ce(sample, clean)
            gained = ce(sample, ablated) - ce(sample, run)
            return np.where(harm > 0, gained / np.where(harm > 0, harm, 1), math.nan)

        return bootstrap(statistic, units, resamples, seed)

    return Spliced(
        windows=len(units),
        predictions=int(counts.sum()),
        positions=positions,
        losses={name: float(ce(units, run)) for run, name in enumerate(RUNS)},
        increase=bootstrap(lambda s: ce(s, sae) - ce(s, clean), units, resamples, seed),
        recovered=recovered(sae, mean),
        recovered_zero=recovered(sae, zero),
        random_recovered=recovered(random, mean),
        random_recovered_zero=recovered(random, zero),
        reconstruction=reconstruction,
        random_reconstruction=random_reconstruction,
        by_window=totals / counts[:, None],
    )
