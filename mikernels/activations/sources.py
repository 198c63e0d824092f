# SPDX-License-Identifier: Apache-2.0
"""Where training activations come from: one position (epoch, block, offset) for every source.

A source is an endless sequence of epochs, an epoch a sequence of *blocks*, a block a set of rows
that is held in memory and shuffled. A batch takes rows across block and epoch borders, so every
batch is full and every row is seen once an epoch. Orders derive from (seed, epoch, block) alone:
the position is the whole state, and a resumed run sees exactly the batches that it would have seen.
"""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from typing import Any

import torch

from mikernels.values.batch import Batch

Rows = dict[str, torch.Tensor]
"""`activations [n, d]` and whatever goes with each row: `targets [n, d_out]` of a source that has
them, `token_ids [n]`."""


# rows of a batch where nobody says it, as in TrainConfig
BATCH = 4096


class SourceExhausted(ValueError):
    """A source that cannot start again has no full batch left."""


class Source(ABC):
    """Batches of activations `[batch_size, d]`, with targets or without, with exact resume.

    Args:
        batch_size: rows of a batch, at least 1; None: whoever takes a batch says it, as a Trainer
            does (4,096 where nobody does).
        seed: decides every order.

    Attributes:
        d: width of the activations.

    Raises:
        ValueError: for a batch size below 1.
    """

    d: int
    # of the targets, None without any
    _d_target: int | None = None

    def __init__(self, batch_size: int | None, seed: int = 0):
        if batch_size is not None and batch_size < 1:
            raise ValueError(
                f"{type(self).__name__}: batch_size must be at least 1, got {batch_size}"
            )
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = self._block = self._offset = 0
        self._rows: Rows | None = None
        self._order = torch.empty(0, dtype=torch.int64)
        self._epoch_has_rows = False

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed: of the targets, or d without any."""
        return self.d if self._d_target is None else self._d_target

    @abstractmethod
    def _load(self, epoch: int, block: int) -> Rows | None:
        """The rows of a block, in any fixed order; None past the epoch's last block."""

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What must be equal for a saved position to mean the same rows (JSON-able)."""

    def _permutation(self, n: int, *key: int) -> torch.Tensor:
        # seeding by string hashes all of it, so neighbouring keys give unrelated orders
        seed = random.Random(":".join(map(str, (self.seed, *key)))).getrandbits(63)
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed))

    def next_rows(self, n: int | None = None) -> Rows:
        """The next batch with everything that is known of each row.

        Args:
            n: rows; None is batch_size.

        Raises:
            SourceExhausted: the source cannot start again and has no full batch left.
            ValueError: an epoch without a row; n below 1.
        """
        parts: list[Rows] = []
        missing = self.batch_size or BATCH if n is None else n
        if missing < 1:
            raise ValueError(f"{type(self).__name__}: n must be at least 1, got {missing}")
        while missing:
            if self._rows is None:
                self._rows = self._load(self._epoch, self._block)
                if self._rows is None:
                    if not self._epoch_has_rows:
                        raise ValueError(
                            f"{type(self).__name__}: an epoch must have at least one row, got none;"
                            f" give it more data"
                        )
                    self._epoch, self._block, self._epoch_has_rows = self._epoch + 1, 0, False
                    continue
                n = self._rows["activations"].shape[0]
                self._epoch_has_rows |= n > 0
                self._order = self._permutation(n, self._epoch, self._block)
            chosen = self._order[self._offset : self._offset + missing]
            parts.append({name: rows[chosen] for name, rows in self._rows.items()})
            missing -= chosen.shape[0]
            self._offset += chosen.shape[0]
            if self._offset >= self._order.shape[0]:
                self._rows = None
                self._block, self._offset = self._block + 1, 0
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def next_batch(self, n: int | None = None) -> torch.Tensor | Batch:
        """The next `[n, d]` float32 activations, with their targets as a Batch; n is batch_size if
        it is None."""
        rows = self.next_rows(n)
        x = rows["activations"].float()
        return x if self._d_target is None else Batch(x, rows["targets"].float())

    def state_dict(self) -> dict[str, Any]:
        """The position, JSON-able."""
        return {
            "epoch": self._epoch,
            "block": self._block,
            "offset": self._offset,
            "identity": {"source": type(self).__name__, "seed": self.seed, **self._identity()},
        }

    def _blocks(self, epoch: int) -> int | None:
        """Blocks of an epoch, None where only reading tells."""
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; the batch size may differ from the saved one.

        Raises:
            ValueError: when the state was saved from other data or another seed, is incomplete, or
                lies beyond the data; the position is as before then.
        """
        from mikernels.schema import Position, check

        me, fix = type(self).__name__, "resume with the data of the first run"
        saved = check(Position, state, me, "the saved position", fix)
        mine = self.state_dict()["identity"]
        for name in mine.keys() | saved.identity.keys():
            got, expected = saved.identity.get(name), mine.get(name)
            # as JSON: there true is not 1, and a tuple is a list
            if json.dumps(got, sort_keys=True) != json.dumps(expected, sort_keys=True):
                raise ValueError(
                    f"{me}: the saved position must be of the same data, got {name} {got!r}, "
                    f"expected {expected!r}; resume with the data and seed of the first run"
                )
        rows, order = None, self._order
        beyond = ValueError(
            f"{me}: the saved position must be within the data, got row {saved.offset} of block "
            f"{saved.block} of epoch {saved.epoch}; {fix}"
        )
        blocks = self._blocks(saved.epoch)
        if blocks is not None and saved.block + (saved.offset > 0) > blocks:
            raise beyond
        border = blocks is None and saved.block > 0 and not saved.offset
        # of two blocks, the next of which need not be
        if border and self._load(saved.epoch, saved.block - 1) is None:
            raise beyond
        if saved.offset:
            rows = self._load(saved.epoch, saved.block)
            if rows is None or saved.offset >= rows["activations"].shape[0]:
                raise beyond
            n = rows["activations"].shape[0]
            order = self._permutation(n, saved.epoch, saved.block)
        self._epoch, self._block, self._offset = saved.epoch, saved.block, saved.offset
        self._rows, self._order = rows, order
        self._epoch_has_rows = self._block > 0 or self._offset > 0


def check_activations(owner: str, name: str, shape: list[int], dtype: torch.dtype) -> None:
    """`[rows, d]` floating and not empty, or TypeError / ValueError."""
    if len(shape) != 2:
        raise ValueError(f"{owner}: {name} must be [rows, d], got {shape}; reshape it first")
    if not dtype.is_floating_point:
        raise TypeError(f"{owner}: {name} must be floating, got {dtype}; convert it with .float()")
    if 0 in shape:
        raise ValueError(f"{owner}: {name} must hold at least one row and column, got {shape}")


class TensorSource(Source):
    """Rows of a tensor in memory, in a new random order every epoch.

    Args:
        tensor: `[n, d]` floating; not copied.
        batch_size: rows of a batch; None is the trainer's.
        seed: decides the orders.
        target: `[n, d_out]` floating, what each row is to be reconstructed as (a transcoder's is
            the output of an MLP); None: itself. `next_rows` returns it as "targets".
        extra: tensors `[n, ...]` that `next_rows` returns beside the activations.

    Attributes:
        n_rows: n.

    Raises:
        TypeError, ValueError: for a tensor or target that is not floating, not 2-D, or empty, and
            for tensors with another number of rows.
    """

    def __init__(
        self,
        tensor: torch.Tensor,
        batch_size: int | None = None,
        seed: int = 0,
        *,
        target: torch.Tensor | None = None,
        **extra: torch.Tensor,
    ):
        super().__init__(batch_size, seed)
        check_activations("TensorSource", "tensor", list(tensor.shape), tensor.dtype)
        if target is not None:
            check_activations("TensorSource", "target", list(target.shape), target.dtype)
            if "targets" in extra:
                raise TypeError(
                    "TensorSource: target must come alone, got targets beside it; leave one out"
                )
            extra["targets"] = target
            self._d_target = target.shape[1]
        for name, rows in extra.items():
            if rows.shape[0] != tensor.shape[0]:
                raise ValueError(
                    f"TensorSource: {name} must have {tensor.shape[0]} rows like tensor, "
                    f"got {rows.shape[0]}"
                )
        self.n_rows, self.d = tensor.shape
        self._data = {"activations": tensor, **extra}

    def _load(self, epoch: int, block: int) -> Rows | None:
        return self._data if block == 0 else None

    def _blocks(self, epoch: int) -> int:
        return 1

    def _identity(self) -> dict[str, Any]:
        shape = list(self._data["activations"].shape)
        return {"shape": shape} | ({} if self._d_target is None else {"d_out": self._d_target})
