# SPDX-License-Identifier: Apache-2.0
"""How well an SAE gives activations back, and how it uses its features to do so.

With targets t (a transcoder's; else the inputs themselves), reconstructions y and N tokens, each
counted by its weight:

    mse = sum |y - t|^2 / N                     fvu = sum |y - t|^2 / sum |t - mean t|^2
    cosine = mean <y, t> / (|y| |t|)            norm_ratio = mean |y| / |t|, below 1: shrinkage
    l0 = mean number of features active on a token
    density[f] = share of tokens on which f is active; 0 on all of these tokens: dead here

One pass over the rows, sums in float64, O(rows d + F) memory for SAEs of `mikernels.nn`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from mikernels.evaluate.judged import as_judged, check_target, check_width, reconstructed
from mikernels.values.batch import Batch, as_batch
from mikernels.values.codes import SparseCodes

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# of a bin of the histogram of densities, in powers of ten
BIN = 0.5


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What was measured; the equations are the module's.

    Attributes:
        tokens: rows with a weight above 0. weight: the sum of their weights.
        n_features: F.
        fvu, mse, cosine, norm_ratio, l0: as above; cosine and norm_ratio over targets that are not
            0, and 0 where y is 0.
        l0_quantiles: share of tokens -> the L0 that it does not exceed.
        dead: features that are active on none of these tokens. On few tokens that is no news of a
            rare feature.
        density: `[F]` float64 on the CPU.
        density_histogram: `(from, to, features)` in powers of ten, of the features that fired.
    """

    tokens: int
    weight: float
    n_features: int
    fvu: float
    mse: float
    cosine: float
    norm_ratio: float
    l0: float
    l0_quantiles: dict[float, int]
    dead: int
    density: torch.Tensor
    density_histogram: list[tuple[float, float, int]]

    @property
    def dead_fraction(self) -> float:
        return self.dead / self.n_features

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the density of every feature."""
        found = {name: value for name, value in vars(self).items() if name != "density"}
        found["l0_quantiles"] = {str(q): l0 for q, l0 in self.l0_quantiles.items()}
        return {**found, "dead_fraction": self.dead_fraction}


class ReconstructionSums:
    """The sums of a Reconstruction, a batch at a time.

    Args:
        where: the function named in messages.
    """

    def __init__(self, where: str = "measure_reconstruction"):
        self._where = where
        self._tokens = 0
        self._weight = self._squares = self._spread = self._cosine = self._ratio = self._norms = 0.0
        self._mean = self._fired = torch.zeros(0, dtype=torch.float64)
        # weight of the tokens with each L0
        self._l0 = torch.zeros(1, dtype=torch.float64)

    @property
    def mean(self) -> torch.Tensor:
        """`[d]` float64: of the targets so far."""
        return self._mean

    @torch.no_grad()
    def add(self, batch: Batch, codes: SparseCodes, y: torch.Tensor) -> None:
        """Count a batch, the codes `[n, F]` of its input and its reconstructions `[n, d]`.

        Raises:
            ValueError: for weights that are not `[n]`, finite and at least 0.
        """
        if len(batch) == 0:
            return
        y = y.double()
        t = batch.output.to(y.device, torch.float64)
        if batch.weights is None:
            w = y.new_ones(len(y))
        else:
            w = batch.weights.to(y.device, torch.float64)
            if w.shape != y.shape[:1] or not bool((w.isfinite() & (w >= 0)).all()):
                raise ValueError(
                    f"{self._where}: weights must be [{len(y)}], finite and at least 0, got "
                    f"{list(w.shape)} from {float(w.min()):g} to {float(w.max()):g}"
                )
        self._tokens += int((w > 0).sum())
        self._squares += float(w @ (y - t).square().sum(-1))
        lengths, made = t.norm(dim=-1), y.norm(dim=-1)
        known = w * (lengths != 0)
        both = lengths * made
        self._norms += float(known.sum())
        self._cosine += float(known @ ((y * t).sum(-1) / both.masked_fill(both == 0, 1)))
        self._ratio += float(known @ (made / lengths.masked_fill(lengths == 0, 1)))
        self._count(codes, None if batch.weights is None else w)
        self._add_spread(t, w)

    def _count(self, codes: SparseCodes, w: torch.Tensor | None) -> None:
        if w is None:
            l0, fired = torch.bincount(codes.l0()), codes.fired()
        else:
            # on the CPU, where sums of fractions have one order
            values, indices = codes.flat()
            w, tokens = w.cpu(), codes.tokens
            l0 = torch.bincount(codes.l0().cpu(), w)
            by_slot = w[:, None].expand(values.shape) if tokens is None else w[tokens.cpu()]
            active = (by_slot * (values != 0).cpu()).reshape(-1)
            fired = torch.bincount(indices.reshape(-1).cpu(), active, codes.n_features)
        pad = torch.nn.functional.pad
        l0, longest = l0.cpu().double(), max(len(l0), len(self._l0))
        self._l0 = pad(self._l0, (0, longest - len(self._l0))) + pad(l0, (0, longest - len(l0)))
        self._fired = fired.cpu().double() + (self._fired if len(self._fired) else 0)

    def _add_spread(self, t: torch.Tensor, w: torch.Tensor) -> None:
        """Chan, Golub and LeVeque's merge of two samples: no difference of large squares."""
        weight = float(w.sum())
        if not weight:
            return
        mean = (w @ t) / weight
        self._spread += float(w @ (t - mean).square().sum(-1))
        mean = mean.cpu()
        if self._weight:
            apart = mean - self._mean
            share = weight / (self._weight + weight)
            self._spread += float(apart.square().sum()) * self._weight * share
            self._mean = self._mean + apart * share
        else:
            self._mean = mean
        self._weight += weight

    def result(self) -> Reconstruction:
        """What the sums are of so far.

        Raises:
            ValueError: no row, rows without variance, or rows or reconstructions that are not
                finite.
        """
        where = self._where
        if not self._tokens:
            raise ValueError(
                f"{where}: x must have at least one row (of weight above 0), got none; hold some "
                f"back from training"
            )
        # equal rows differ from their computed mean by rounding, which is no variance
        rounding = self._tokens * torch.finfo(torch.float64).eps * float(self._mean.norm())
        if self._spread <= self._weight * rounding**2:
            raise ValueError(f"{where}: rows of x must differ, got equal ones")
        if not (math.isfinite(self._squares) and math.isfinite(self._spread)):
            what = "x" if not math.isfinite(self._spread) else "the reconstructions of sae"
            raise ValueError(
                f"{where}: {what} must be finite, got NaN or inf; drop the rows that are not, or "
                f"load other weights"
            )
        density = self._fired / self._weight
        reached = self._l0.cumsum(0) / self._weight
        norms = self._norms or math.nan
        return Reconstruction(
            tokens=self._tokens,
            weight=self._weight,
            n_features=len(density),
            fvu=self._squares / self._spread,
            mse=self._squares / self._weight,
            cosine=self._cosine / norms,
            norm_ratio=self._ratio / norms,
            l0=float(self._fired.sum()) / self._weight,
            # in float64 the last share may be just below 1
            l0_quantiles={q: int((reached < q - 1e-12).sum()) for q in QUANTILES},
            dead=int((density == 0).sum()),
            density=density,
            density_histogram=_histogram(density),
        )


def _histogram(density: torch.Tensor) -> list[tuple[float, float, int]]:
    fired = density[density > 0]
    if not len(fired):
        return []
    # a feature that always fires belongs to the last bin
    places = (fired.log10() / BIN).floor().clamp_(max=-1).to(torch.int64)
    lowest = int(places.min())
    counts = torch.bincount(places - lowest, minlength=-lowest)
    return [((lowest + i) * BIN, (lowest + i + 1) * BIN, int(n)) for i, n in enumerate(counts)]


@torch.no_grad()
def measure_reconstruction(
    sae: Any,
    x: torch.Tensor | Batch | Iterable[torch.Tensor | Batch],
    batch_size: int = 4096,
    *,
    where: str = "measure_reconstruction",
) -> Reconstruction:
    """Judge an SAE by its reconstructions of rows that it was not trained on.

    Args:
        sae: of activations in the unit of x, as a Trainer leaves it and `load_sae` returns it; or
            an SAE of another library, see `as_judged`.
        x: `[n, d]` floating, or a Batch with a target or weights, or several of them, read once.
        batch_size: rows encoded at a time.
        where: the function named in messages.

    Raises:
        TypeError, ValueError: for another shape, no row, rows without variance, an SAE of another
            width, or rows or reconstructions that are not finite.
    """
    judged = as_judged(sae)
    sums = ReconstructionSums(where)
    for given in [x] if isinstance(x, torch.Tensor | Batch) else x:
        batch = as_batch(given)
        for name, t in (("x", batch.input), ("the target", batch.output)):
            if t.dim() != 2 or not t.is_floating_point():
                raise ValueError(
                    f"{where}: {name} must be floating [n, d], got {t.dtype} {list(t.shape)}"
                )
        check_width(where, judged, batch.input.shape[1], "x")
        check_target(where, judged, batch.target is not None)
        for part, codes, y in reconstructed(where, judged, batch, batch_size):
            sums.add(part, codes, y)
    return sums.result()


def variance_unexplained(sae: Any, x: torch.Tensor, batch_size: int = 4096) -> float:
    """`FVU = sum |y - x|^2 / sum |x - mean x|^2` of the reconstructions y, over all rows at once.

    Args:
        sae: of activations in the unit of x, as a Trainer leaves it and `load_sae` returns it.
        x: `[n, d]` floating, n at least 2; give rows that were not trained on.
        batch_size: rows encoded at a time.

    Raises:
        ValueError: for another shape, rows without variance, or rows or reconstructions that are
            not finite.
    """
    if x.dim() != 2 or x.shape[0] < 2:
        raise ValueError(
            f"variance_unexplained: x must be [n, d] with at least two rows, got {list(x.shape)}"
        )
    return measure_reconstruction(sae, x, batch_size, where="variance_unexplained").fvu
