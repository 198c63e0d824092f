# SPDX-License-Identifier: Apache-2.0
"""What is known of every feature, from one pass over the tokens.

    features = collect_features(sae, source.read(), tokenizer, model=model)
    views = features.views(0, features.n_features)

The pass keeps the activations by feature (`mikernels.evaluate.firing`: 8 bytes each, in memory or
on disk), and of the text 28 bytes a token. Everything else is made from these when a view is asked
for, of at most 2^11 features and 2^21 activations (or one feature) at a time, in some 0.4 GB. All
of it is exact, and depends on nothing but the SAE and the rows in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mikernels.activations import Rows
from mikernels.activations.sources import check_activations
from mikernels.activations.windows import text_of
from mikernels.evaluate.excerpts import MISSING, Excerpts, Shown, starts_of
from mikernels.evaluate.firing import Firing, Slots, firing_of
from mikernels.evaluate.judged import check_width
from mikernels.nn import SAE
from mikernels.report.directions import NAME, Scored, Similar, Spoken
from mikernels.report.shares import Shares, shares_of
from mikernels.report.views import BINS, Example, FeatureView

# rows of a column that are held together
BLOCK = 1 << 20
# features whose decoder rows are compared at a time, and tokens of a feature's list
DIRECTIONS, TOKENS = 1024, 6
# of a feature's range of activations, of which all but the highest are sampled
QUARTERS = 4
NEEDED = ("activations", "token_ids", "windows")
# of the rows that a view shows, if they have them
PLACES = ("positions", "documents")


class _Column:
    """A column of all rows, from parts of it.

    In large blocks: a small tensor kept from every batch takes a piece of the room that the batch's
    activations leave, which the next ones then do not fit into.
    """

    def __init__(self, first: torch.Tensor):
        self._full: list[torch.Tensor] = []
        self._block = torch.empty(BLOCK, dtype=first.dtype)
        self._n = 0

    def add(self, part: torch.Tensor) -> None:
        for piece in part.split(BLOCK):
            now = min(len(piece), BLOCK - self._n)
            self._block[self._n : self._n + now] = piece[:now]
            self._n += now
            if self._n == BLOCK:
                self._full.append(self._block)
                self._block, self._n = torch.empty_like(self._block), len(piece) - now
                self._block[: self._n] = piece[now:]

    def whole(self) -> torch.Tensor:
        return torch.cat([*self._full, self._block[: self._n]])


class CollectedFeatures:
    """The features of an SAE on some text: `mikernels.report.Features`, of `collect_features`.

    Attributes:
        firing: the activations by feature.
    """

    def __init__(
        self,
        firing: Firing,
        excerpts: Excerpts,
        places: dict[str, np.ndarray],
        *,
        examples: int = 10,
        samples: int = 2,
        similar: Similar | None = None,
        spoken: Spoken | None = None,
    ):
        self.firing, self._excerpts, self._places = firing, excerpts, places
        self._n_examples, self._n_samples = examples, samples
        self._similar, self._spoken = similar, spoken

    @property
    def n_features(self) -> int:
        return self.firing.n_features

    @property
    def n_rows(self) -> int:
        return self.firing.n_rows

    @property
    def counts(self) -> torch.Tensor:
        return self.firing.counts

    @property
    def maxima(self) -> torch.Tensor:
        return self.firing.maxima

    @cached_property
    def _shares(self) -> Shares:
        return shares_of(self.firing, self._excerpts, TOKENS)

    @cached_property
    def labels(self) -> Sequence[str]:
        return [self._shares.label(feature) for feature in range(self.n_features)]

    def view(self, feature: int) -> FeatureView:
        if not 0 <= feature < self.n_features:
            raise IndexError(f"view: feature must be in 0..{self.n_features - 1}, got {feature}")
        return next(self.views(feature, feature + 1))

    def views(self, start: int, stop: int) -> Iterator[FeatureView]:
        if not 0 <= start <= self.n_features:
            raise IndexError(f"views: start must be in 0..{self.n_features}, got {start}")
        written = self._written(start, min(stop, self.n_features))
        for slots in self.firing.chunks(start, min(stop, self.n_features)):
            yield from self._views_of(slots, written)

    def _written(self, start: int, stop: int) -> Iterator[tuple[Scored, Scored, Any]]:
        """Of each feature what its decoder row says."""
        for begin in range(start, stop, DIRECTIONS):
            end = min(begin + DIRECTIONS, stop)
            nothing: list[Any] = [[]] * (end - begin)
            spoken = self._spoken.of(begin, end) if self._spoken else [([], [])] * (end - begin)
            similar = self._similar.of(begin, end) if self._similar else nothing
            for (promoted, suppressed), others in zip(spoken, similar, strict=True):
                yield promoted, suppressed, others

    def _views_of(
        self, slots: Slots, written: Iterator[tuple[Scored, Scored, Any]]
    ) -> Iterator[FeatureView]:
        n = len(slots.offsets) - 1
        features, values = slots.features, slots.values.astype(np.float64)
        counts = np.diff(slots.offsets)
        means = np.bincount(features, values, n) / np.maximum(counts, 1)
        maxima = self.maxima[slots.start : slots.start + n].numpy().astype(np.float64)
        bins = np.minimum(values * BINS / maxima[features], BINS - 1).astype(np.int64)
        histograms = np.bincount(features * BINS + bins, minlength=n * BINS).reshape(n, BINS)
        shown = self._shown(slots, features, maxima)
        examples = self._examples(slots, features, shown)
        columns = (counts.tolist(), maxima.tolist(), means.tolist(), histograms.tolist(), shown)
        for i, (count, maximum, mean, histogram, (best, sampled)) in enumerate(
            zip(*columns, strict=True)
        ):
            feature = slots.start + i
            promoted, suppressed, similar = next(written)
            yield FeatureView(
                number=feature,
                label=self.labels[feature],
                count=count,
                n_rows=self.n_rows,
                maximum=maximum,
                mean=mean,
                histogram=histogram,
                tokens=self._shares.of(feature),
                examples=[next(examples) for _ in best],
                samples=[next(examples) for _ in sampled],
                promoted=promoted,
                suppressed=suppressed,
                similar=similar,
            )

    def _shown(
        self, slots: Slots, features: np.ndarray, maxima: np.ndarray
    ) -> list[tuple[list[int], list[int]]]:
        """Of each feature the rows of its examples, and of its samples."""
        peaks = self._excerpts.ranked(slots)
        candidates = self._excerpts.candidates(slots.rows[peaks].astype(np.int64))
        n = len(maxima)
        # where the peaks of each quarter of each feature end, from the highest
        edges = maxima[:, None] * (np.arange(QUARTERS) / QUARTERS)
        quarter = (slots.values[peaks, None] <= edges[features[peaks], 1:]).sum(1)
        ends = np.bincount(features[peaks] * QUARTERS + quarter, minlength=n * QUARTERS).cumsum()
        found = []
        begin = 0
        for first, *lower in ends.reshape(n, QUARTERS).tolist():
            done = Shown()
            last = lower[-1]
            best = done.take(candidates, self._n_examples, begin, last)
            sampled: list[int] = []
            for low, high in zip([first, *lower], lower, strict=False):
                for part in range(self._n_samples):
                    a, b = (low + (high - low) * i // self._n_samples for i in (part, part + 1))
                    sampled += done.take(candidates, 1, a, b)
            found.append((best, sampled))
            begin = last
        return found

    def _examples(
        self, slots: Slots, features: np.ndarray, shown: list[tuple[list[int], list[int]]]
    ) -> Iterator[Example]:
        """Of each row that is shown, in order."""
        per_feature = [len(best) + len(sampled) for best, sampled in shown]
        rows = np.fromiter(chain.from_iterable(chain(*pair) for pair in shown), np.int64)
        of = np.repeat(np.arange(len(shown)), per_feature)
        low, high = self._excerpts.bounds(rows)
        lengths = high - low
        begins = lengths.cumsum() - lengths
        total = int(lengths.sum())
        inside = np.arange(total) + np.repeat(low - begins, lengths)
        texts = self._excerpts.texts(inside)
        # slots are by feature and row
        keys = features * self.n_rows + slots.rows
        first, last = (np.searchsorted(keys, of * self.n_rows + end) for end in (low, high))
        active = np.arange((last - first).sum())
        moved = last - first
        active += np.repeat(first - (moved.cumsum() - moved), moved)
        scores = np.zeros(total, np.float32)
        scores[slots.rows[active] + np.repeat(begins - low, moved)] = slots.values[active]
        flat = scores.tolist()
        columns = [rows - low, begins, begins + lengths, rows, self._excerpts.window(rows)]
        columns += [self._places[name][rows] for name in PLACES if name in self._places]
        names = [name[:-1] for name in PLACES if name in self._places]
        for peak, begin, end, row, window, *more in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            yield Example(
                tokens=texts[begin:end],
                scores=flat[begin:end],
                peak=peak,
                value=flat[begin + peak],
                row=row,
                window=window,
                **dict(zip(names, more, strict=True)),
            )


@torch.no_grad()
def collect_features(
    sae: SAE,
    rows: Iterable[Rows],
    text: Any,
    *,
    model: torch.nn.Module | None = None,
    examples: int = 10,
    samples: int = 2,
    similar: int = 8,
    promoted: int = 8,
    scratch: str | Path | None = None,
    batch: int = 4096,
) -> CollectedFeatures:
    """What every feature of an SAE does on some text.

    Args:
        sae: any variant; of a crosscoder and a cross-layer transcoder the features of all layers.
        rows: dicts of `activations [n, d]`, `token_ids [n]`, `windows [n]`, and perhaps `positions`
            and `documents`, in reading order, which are read once: `ModelSource.read()`,
            `ShardSource.read()`.
        text: a tokenizer, or the text of every token id, by the id as text.
        model: what the SAE was trained on, whose residual stream its features write to or are
            added to; None: no tokens are promoted or suppressed.
        examples, similar, promoted: how many at most. samples: of each quarter below the highest.
        scratch: a folder, in which 8 bytes an activation are kept while the result is in use, and
            which is left as it was; None keeps them in memory.
        batch: rows encoded at a time.

    Raises:
        TypeError, ValueError: rows without token ids and windows, in another order, or of another
            width; codes that are not finite; a model of another width.
        OSError: scratch cannot be written to.

    Example:
        >>> from mikernels.report import collect_features
        >>> source = ModelSource(model, tokenizer, 1, ["The war lasted from 1732 to 17"] * 9)
        >>> features = collect_features(sae, source.read(), tokenizer, model=model)
        >>> busiest = features.view(int(features.counts.argmax()))
        >>> text, promoted = "".join(busiest.examples[0].tokens), busiest.promoted[0]
    """
    for name, number, least in (
        ("examples", examples, 1),
        ("samples", samples, 0),
        ("similar", similar, 0),
        ("promoted", promoted, 1),
        ("batch", batch, 1),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{NAME}: {name} must be at least {least}, got {number!r}")
    piece = _piece_of(text)
    folder = None if scratch is None else Path(scratch)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"{NAME}: scratch must be an existing folder, got {folder}")
    # what can be refused is refused before the pass
    spoken = None if model is None else Spoken(sae, model, promoted, piece)
    held: dict[str, _Column] = {}
    firing = firing_of(sae, _activations(sae, rows, held), scratch=folder, batch=batch, where=NAME)
    columns = {name: column.whole() for name, column in held.items()}
    ids = columns["token_ids"].unique().tolist()
    return CollectedFeatures(
        firing,
        Excerpts(columns, {str(i): piece(i) for i in ids}),
        {name: columns[name].numpy() for name in PLACES if name in columns},
        examples=examples,
        samples=samples,
        similar=Similar(sae, similar) if similar else None,
        spoken=spoken,
    )


def _piece_of(text: Any) -> Callable[[int], str]:
    if isinstance(text, Mapping):
        return lambda token: text.get(str(token), MISSING)
    if not hasattr(text, "decode") or isinstance(text, bytes):
        raise TypeError(
            f"{NAME}: text must be a tokenizer or a dict from token ids, as text, to their text, "
            f"got {type(text).__name__}"
        )
    return lambda token: text_of(text, token)


def _activations(
    sae: SAE, rows: Iterable[Rows], held: dict[str, _Column]
) -> Iterator[torch.Tensor]:
    """The activations of each part; what else is needed of it is put into `held`."""
    if isinstance(rows, Mapping | torch.Tensor):
        raise TypeError(
            f"{NAME}: rows must be an iterable of dicts, got {type(rows).__name__}; pass [rows]"
        )
    names: tuple[str, ...] = ()
    for part in rows:
        if missing := [name for name in (*NEEDED, *names) if name not in part]:
            raise ValueError(
                f"{NAME}: rows must have activations, token_ids and windows, and all parts the "
                f"same, got no {missing[0]}; read them with ModelSource.read(), or from shards of "
                f"it"
            )
        x = part["activations"]
        check_activations(NAME, "activations", [*x.shape], x.dtype)
        if not names:
            check_width(NAME, sae, x.shape[1], "the activations")
            names = (*NEEDED[1:], *(name for name in PLACES if name in part))
            held.update({name: _Column(part[name]) for name in names})
        for name in names:
            if part[name].shape != x.shape[:1] or part[name].is_floating_point():
                raise ValueError(
                    f"{NAME}: {name} must be whole numbers [{len(x)}] like the activations, got "
                    f"{part[name].dtype} {[*part[name].shape]}"
                )
            held[name].add(part[name])
        # rows that were shuffled are seen here, before all of them are encoded
        starts_of(part["windows"].cpu().numpy())
        yield x.float()
