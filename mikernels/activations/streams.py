# SPDX-License-Identifier: Apache-2.0
"""Any stream of tensors as a source: a generator, a DataLoader, a list of batches."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mikernels.activations.shards import ShardSource
from mikernels.activations.sources import Rows, Source, SourceExhausted, TensorSource
from mikernels.tensor_files import bytes_of
from mikernels.values.batch import Batch

WHERE = "IterableSource"
_END = object()


class IterableSource(Source):
    """The rows of a stream of tensors in its order, cut into batches of one size.

    Nothing is shuffled. What can be iterated again is, epoch after epoch; an iterator (a generator)
    ends the run when it ends, and rows that are left for less than a batch are not used.

    A saved position is resumed exactly by reading the stream again from its start and passing over
    what was used: of an object that can be iterated again, or of an iterator made anew. It must
    give the same items in the same order, so of a DataLoader without `shuffle=True`; the last item
    that was used is compared by a checksum.

    Args:
        stream: gives `[n, d]` floating tensors or arrays with any n; or for each of them a Batch,
            a pair (input, target), or a dict of "activations" and perhaps "targets" `[n, d_out]`,
            "weights" `[n]` and whatever else goes with the rows. One item is read at once, which
            says d.
        batch_size: rows of a batch; None is the trainer's.

    Attributes:
        stream: as given.

    Raises:
        TypeError, ValueError: for a stream without an item, and here or later for an item of
            another form, dtype or width than the first, by its number from 0. What the stream
            itself raises is passed on.

    Example:
        loader = torch.utils.data.DataLoader(dataset, batch_size=512)
        Trainer(sae, loader, TrainConfig(total_tokens=1_000_000)).run()
    """

    def __init__(self, stream: Iterable[Any], batch_size: int | None = None):
        super().__init__(batch_size)
        if isinstance(stream, str | Mapping) or not isinstance(stream, Iterable):
            raise TypeError(
                f"{WHERE}: stream must give tensors [n, d] when it is iterated, got "
                f"{type(stream).__name__}; pass a list, a generator or a DataLoader of them"
            )
        self.stream = stream
        self._iterator: Iterator[Any] | None = iter(stream)
        self._again = self._iterator is not stream
        # the epoch that the iterator is in, and the number of the item that it gives next
        self._at = (0, 0)
        self._form: dict[str, int | None] = {}
        self._last: Rows | None = None
        self._sum: int | None = None
        self._expected: int | None = None
        first = self._take()
        if first is None:
            raise ValueError(f"{WHERE}: stream must give at least one tensor, got none")
        self._first: Rows | None = first
        self.d = first["activations"].shape[1]
        self._d_target = first["targets"].shape[1] if "targets" in first else None

    def _take(self) -> Rows | None:
        """The next item, None at the end."""
        assert self._iterator is not None
        number = self._at[1]
        try:
            item = next(self._iterator, _END)
        except BaseException:
            # an iterator that raised seems to have ended from then on
            self._iterator = None
            raise
        if item is _END:
            return None
        rows = _rows_of(item, number)
        form = {name: t.shape[1] if t.dim() == 2 else None for name, t in rows.items()}
        self._form = self._form or form
        if form != self._form:
            raise ValueError(
                f"{WHERE}: item {number} must have {_told(self._form)} like item 0, got "
                f"{_told(form)}; give activations of one place"
            )
        return rows

    def _load(self, epoch: int, block: int) -> Rows | None:
        if self._iterator is None or self._at[0] != epoch or self._at[1] > block:
            if self._again:
                self._iterator, self._at, self._first = iter(self.stream), (epoch, 0), None
            elif self._iterator is None:
                raise ValueError(
                    f"{WHERE}: stream must be one that can be iterated again after it has raised, "
                    f"got {type(self.stream).__name__}; make it and the source anew"
                )
            elif self._at[0] != epoch:
                raise SourceExhausted(f"{WHERE}: stream is an iterator and has ended")
            else:
                raise ValueError(
                    f"{WHERE}: stream must be one that can be iterated again to go back to item "
                    f"{block}, got {type(self.stream).__name__} at item {self._at[1]}; make it "
                    f"anew for exact resume, pass a list or a DataLoader, or write_shards first"
                )
        rows = None
        while self._at[1] <= block:
            # the first one has been read already to know d
            rows, self._first = (self._first or self._take()), None
            if rows is None:
                return None
            self._at = (epoch, self._at[1] + 1)
        assert rows is not None
        if self._expected is not None and (found := _checksum(rows)) != self._expected:
            raise ValueError(
                f"{WHERE}: stream must give the same items in the same order to resume exactly, "
                f"got another item {block} of epoch {epoch} (checksum {found}, was "
                f"{self._expected}); use a stream in a fixed order, or write_shards first"
            )
        self._last, self._sum = rows, None
        return rows

    def _permutation(self, n: int, *key: int) -> torch.Tensor:
        return torch.arange(n)

    def next_batch(self, n: int | None = None) -> torch.Tensor | Batch:
        """The next `[n, d]` float32 activations; a Batch where the stream has targets or
        weights."""
        rows = self.next_rows(n)
        more = {name: rows[name].float() for name in ("targets", "weights") if name in rows}
        x = rows["activations"].float()
        return Batch(x, more.get("targets"), more.get("weights")) if more else x

    def _identity(self) -> dict[str, Any]:
        return dict(self._form)

    def state_dict(self) -> dict[str, Any]:
        """The position, with a checksum of the last item that was used; JSON-able."""
        state = super().state_dict()
        used = state["block"] or state["offset"]
        if self._last and self._sum is None:
            self._sum = _checksum(self._last)  # once an item, which may be read for many batches
        state["identity"]["item"] = self._sum if used else None
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As of a Source; reads what was used again to pass over it."""
        identity = state.get("identity") if isinstance(state, dict) else None
        if not isinstance(identity, dict):
            return super().load_state_dict(state)  # which says what is wrong with it
        mine = self.state_dict()["identity"]["item"]
        self._expected = identity.get("item")
        try:
            super().load_state_dict({**state, "identity": {**identity, "item": mine}})
        finally:
            self._expected = None


def as_source(value: Any, seed: int = 0) -> Any:
    """What a Trainer takes as a source: one as it is; a tensor or array `[n, d]`; the path of
    shards; any stream of tensors.

    Raises:
        TypeError: for anything else.
    """
    if hasattr(value, "next_batch"):
        return value
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        return TensorSource(value, seed=seed)
    if isinstance(value, str | Path):
        return ShardSource(value, seed=seed)
    return IterableSource(value)


def _rows_of(item: Any, number: int) -> Rows:
    if isinstance(item, Batch):
        given = {"activations": item.input, "targets": item.target, "weights": item.weights}
        rows = {name: t for name, t in given.items() if t is not None}
    elif isinstance(item, Mapping):
        rows = dict(item)
    elif isinstance(item, tuple | list) and 1 <= len(item) <= 2:
        rows = dict(zip(("activations", "targets"), item, strict=False))
    else:
        rows = {"activations": item}
    rows = {n: _tensor(t, number) if isinstance(t, np.ndarray) else t for n, t in rows.items()}
    x = rows.get("activations")
    for name, t in rows.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(
                f"{WHERE}: item {number} must be a tensor [n, d], a Batch, a pair (input, target) "
                f"or a dict with activations, got {type(t).__name__} as its {name}; convert it"
            )
    if x is None:
        raise ValueError(
            f"{WHERE}: item {number} must have activations, got a dict of {sorted(rows)}; name them"
        )
    for name in ("activations", "targets"):
        if name not in rows:
            continue
        t = rows[name]
        if t.dim() != 2 or not t.shape[1]:
            raise ValueError(
                f"{WHERE}: item {number} must have {name} [n, d], got {list(t.shape)}; flatten "
                f"them first"
            )
        if not t.is_floating_point():
            raise TypeError(
                f"{WHERE}: item {number} must have floating {name}, got {t.dtype}; convert them "
                f"with .float()"
            )
    for name, t in rows.items():
        if t.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"{WHERE}: item {number} must have {x.shape[0]} rows of {name} like activations, "
                f"got {list(t.shape)}; give one a row"
            )
    return rows


def _tensor(array: np.ndarray, number: int) -> torch.Tensor:
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{WHERE}: item {number} must hold numbers that torch has, got {array.dtype} "
            f"({error}); convert it"
        ) from error


def _told(form: dict[str, int | None]) -> str:
    return ", ".join(f"{name} [n{'' if d is None else f', {d}'}]" for name, d in form.items())


def _checksum(rows: Rows) -> int:
    crc = 0
    for name in sorted(rows):
        crc = zlib.crc32(bytes_of(rows[name]), crc)
    return crc
