# SPDX-License-Identifier: Apache-2.0
"""Where features fire: their activations in one pass over the tokens, kept by feature.

Codes are sorted by feature a run at a time (2^23 activations, some 0.3 GB while they are sorted),
and a run costs 8 bytes an activation from then on: 256 MB for a million tokens of 32, whatever F
is. In memory, or in a file that has no name, of which memory holds what is being read, and which is
gone with the object, or with the process, however it ends. Nothing is of the size tokens x F.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mikernels.files import explained, write_all
from mikernels.nn import SAE
from mikernels.ops.sae.gradients import by_feature_op
from mikernels.values.codes import SparseCodes

# activations that are sorted at a time; those, and features, that are looked at at a time
RUN = 1 << 23
CHUNK, FEATURES = 1 << 21, 1 << 11
# rows are int32
MOST_ROWS = 2**31


@dataclass(frozen=True)
class Slots:
    """The activations of some features.

    Attributes:
        start: the first feature. offsets: `[n + 1]` int64: those of feature `start + i` are
            `offsets[i]:offsets[i + 1]`.
        rows, values: int32 and float32, of each feature by row.
    """

    start: int
    offsets: np.ndarray
    rows: np.ndarray
    values: np.ndarray

    @property
    def features(self) -> np.ndarray:
        """Of each activation its feature, counted from the first."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


class Firing:
    """Where and how strongly every feature fires: activations above 0, in float32.

    Attributes:
        n_features: F, of all layers where there are several. n_rows: rows encoded.
        counts: `[F]` int64, rows on which each feature is active.
        maxima: `[F]` float32, largest values; 0 where there is none.
    """

    def __init__(self, n_features: int, n_rows: int, runs: list[Slots]):
        self.n_features, self.n_rows, self._runs = n_features, n_rows, runs
        self._offsets = np.zeros(n_features + 1, np.int64)
        maxima = np.zeros(n_features, np.float32)
        for run in runs:
            self._offsets += run.offsets
            active = np.flatnonzero(np.diff(run.offsets))
            if len(active):
                found = np.maximum.reduceat(run.values, run.offsets[active])
                maxima[active] = np.maximum(maxima[active], found)
        self.counts = torch.from_numpy(np.diff(self._offsets))
        self.maxima = torch.from_numpy(maxima)

    def slots(self, start: int, stop: int) -> Slots:
        """The activations of features start..stop-1."""
        ends = [(run.offsets[start], run.offsets[stop]) for run in self._runs]
        rows, values = (
            [column[low:high] for column, (low, high) in zip(columns, ends, strict=True)]
            for columns in ([run.rows for run in self._runs], [run.values for run in self._runs])
        )
        offsets = self._offsets[start : stop + 1] - self._offsets[start]
        if len(self._runs) == 1:
            return Slots(start, offsets, rows[0], values[0])
        counts = [np.diff(run.offsets[start : stop + 1]) for run in self._runs]
        features = np.arange(stop - start)
        of = torch.from_numpy(np.concatenate([np.repeat(features, n) for n in counts]))
        # stable, and the runs follow each other: the rows of a feature stay in order
        order = by_feature_op(of, stop - start)[1].numpy()
        return Slots(start, offsets, np.concatenate(rows)[order], np.concatenate(values)[order])

    def chunks(self, start: int, stop: int, most: int = CHUNK) -> Iterator[Slots]:
        """Those of features start..stop-1 in turn, some features at a time.

        Args:
            most: activations at a time, if a feature has no more.
        """
        while start < stop:
            end = int(np.searchsorted(self._offsets, self._offsets[start] + most, "right")) - 1
            end = min(max(end, start + 1), start + FEATURES, stop)
            yield self.slots(start, end)
            start = end

    def of(self, feature: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows `[n]` int64 and values of a feature, strongest first, ties by row."""
        found = self.slots(feature, feature + 1)
        values, ranks = torch.from_numpy(np.array(found.values)).sort(descending=True, stable=True)
        return torch.from_numpy(found.rows.astype(np.int64))[ranks], values

    def strength(self, feature: int) -> torch.Tensor:
        """`[n_rows]` float32: a feature's activation on every row."""
        found = self.slots(feature, feature + 1)
        strength = np.zeros(self.n_rows, np.float32)
        strength[found.rows] = found.values
        return torch.from_numpy(strength)


class _Runs:
    """Activations as they come, and the runs that became of them.

    Args:
        where: who asks, for messages. scratch: a folder for the runs; None keeps them in memory.
    """

    def __init__(self, where: str, scratch: Path | None):
        self._where, self._scratch = where, scratch
        self._n_features: int | None = None
        # rows, values and features of a run, in one piece of memory: what is kept of every batch by
        # itself takes room that the next activations then do not fit into (here and in columns of
        # the text, 1.5 GB after 600,000 tokens of width 576 where this way takes 0.7)
        self._held: tuple[torch.Tensor, ...] = ()
        self._n_held = self.n_rows = 0
        self.runs: list[Slots] = []

    def add(self, codes: SparseCodes) -> None:
        values, indices = codes.flat()
        n = len(codes)
        tokens = codes.tokens
        if tokens is None:
            tokens = torch.arange(n, device=values.device).repeat_interleave(codes.k)
        values, indices = values.reshape(-1).float(), indices.reshape(-1)
        if bad := len(tokens[~values.isfinite()].unique()):
            raise ValueError(
                f"{self._where}: x must give finite codes, got NaN or inf in {bad:,} of the {n:,} "
                f"rows from row {self.n_rows:,} on; drop those rows"
            )
        if self.n_rows + n > MOST_ROWS:
            raise ValueError(
                f"{self._where}: x must have at most {MOST_ROWS:,} rows, got at least "
                f"{self.n_rows + n:,}; give fewer"
            )
        # codes of one SAE have one size
        self._n_features = codes.n_features
        kept = (values > 0).nonzero()[:, 0]
        if self._n_held and self._n_held + len(kept) > RUN:
            self._sort()
        if not self._held or len(self._held[0]) < len(kept):
            size, dtypes = max(RUN, len(kept)), (torch.int32, torch.float32, torch.int64)
            self._held = tuple(torch.empty(size, dtype=dtype) for dtype in dtypes)
        end = self._n_held + len(kept)
        for column, found in zip(self._held, (tokens + self.n_rows, values, indices), strict=True):
            column[self._n_held : end] = found[kept]
        self._n_held = end
        self.n_rows += n

    def _sort(self) -> None:
        rows, values, indices = (column[: self._n_held] for column in self._held)
        self._n_held = 0
        offsets, order = by_feature_op(indices, self._n_features)
        kept = self._keep(rows[order].numpy(), values[order].numpy())
        self.runs.append(Slots(0, offsets.numpy(), *kept))

    def _keep(self, rows: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._scratch is None or not len(rows):
            return rows, values
        with (
            explained(self._where, "activations", self._scratch, "free space, or give another"),
            tempfile.TemporaryFile(dir=self._scratch, buffering=0) as file,
        ):
            write_all(file, rows.data)
            write_all(file, values.data)
            # the map outlives the file, which has lost its name already
            both = np.asarray(np.memmap(file, np.int32, "r", shape=(2, len(rows))))
        return both[0], both[1].view(np.float32)

    def finish(self) -> Firing:
        if self._n_features is None:
            raise ValueError(f"{self._where}: x must hold at least one row, got none")
        if self._n_held or not self.runs:
            self._sort()
        return Firing(self._n_features, self.n_rows, self.runs)


@torch.no_grad()
def firing_of(
    sae: SAE,
    parts: Iterable[torch.Tensor],
    *,
    scratch: Path | None = None,
    batch: int = 4096,
    where: str = "firing_of",
) -> Firing:
    """Encode activations `[n, d]` in parts, which are read once, by any variant of SAE.

    Args:
        scratch: a folder in which 8 bytes an activation are kept while the result is in use; None
            keeps them in memory.
        batch: rows encoded at a time.

    Raises:
        ValueError: a code is not finite, which no comparison would count; there is no row.
        OSError: scratch cannot be written to.
    """
    runs = _Runs(where, scratch)
    device = sae.w_enc.device
    for part in parts:
        for x in part.split(batch):
            runs.add(sae.encode(x.to(device)))
    return runs.finish()


def encode_all(sae: SAE, x: torch.Tensor, batch: int = 4096) -> Firing:
    """Encode all rows of x `[n, d]`; see `firing_of`."""
    return firing_of(sae, [x], batch=batch, where="encode_all")
