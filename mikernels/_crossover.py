# SPDX-License-Identifier: Apache-2.0
"""Sparse or dense: which path wins from which F / k on, by measurement.

The packaged table has an entry for each kind of device; `mikernels tune` writes a second one to the
user's cache folder, keyed by the device's name, which goes first. An entry is {op, dtype, d,
threshold, source}: with F features and k slots a token the sparse path wins where
F >= threshold k. "*" is any dtype; of several d the nearest counts, in ratio.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mikernels._autocast import in_own_dtype
from mikernels.files import read_json
from mikernels.machine import cpu_name

SCHEMA = 1
PACKAGED = Path(__file__).with_name("_tuned.json")

Entry = dict[str, Any]


def user_table() -> Path:
    """Where `mikernels tune` writes."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mikernels" / "tuned.json"


def load(path: Path) -> dict[str, list[Entry]]:
    """Entries by device; none from a file that is missing.

    Raises:
        ValueError: the file is damaged or of another schema, with the field.
    """
    expected, fix = f"a table of schema {SCHEMA}", "remove it and run `mikernels tune`"
    try:
        raw = read_json(path, "tuned.json", expected, fix)
    except FileNotFoundError:
        return {}
    # pydantic costs 35 ms, and only those pay who have a table of their own
    from mikernels.schema import Table, check

    table = check(Table, raw, "tuned.json", path, fix)
    if table.schema_ != SCHEMA:
        raise ValueError(f"tuned.json: {path} must be {expected}, got {table.schema_}; {fix}")
    return {
        name: [entry.model_dump() for entry in entries] for name, entries in table.devices.items()
    }


def _load_user_table() -> dict[str, list[Entry]]:
    """A damaged table must not keep the package from being imported: a warning names it."""
    try:
        return load(user_table())
    except ValueError as error:
        warnings.warn(f"{error}; until then the packaged table counts", stacklevel=2)
        return {}


def device_name(device: torch.device) -> str:
    """The key of a device in the table."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


class _Tables:
    """Read at import, which torch.compile cannot trace; answers are kept: a call takes 1 us."""

    def __init__(self) -> None:
        self.packaged: dict[str, list[Entry]] = json.loads(PACKAGED.read_text())["devices"]
        self.user = _load_user_table()
        self.names: dict[torch.device, str] = {}
        self.answers: dict[tuple[str, torch.device, torch.dtype, int], float] = {}

    def threshold(self, op: str, device: torch.device, dtype: torch.dtype, d: int) -> float:
        key = op, device, dtype, d
        answer = self.answers.get(key)
        if answer is None:
            answer = self.find(op, device, dtype, d)
            # a name is not asked for while a graph is traced, so that answer is not for good
            if not torch.compiler.is_compiling():
                self.answers[key] = answer
        return answer

    def find(self, op: str, device: torch.device, dtype: torch.dtype, d: int) -> float:
        kind = "cpu" if device.type == "cpu" else "cuda"
        tables = [self.packaged.get(kind, [])]
        if self.user and not torch.compiler.is_compiling():
            if device not in self.names:
                self.names[device] = device_name(device)
            tables.insert(0, self.user.get(self.names[device], []))
        name = str(dtype).removeprefix("torch.")
        for entries in tables:
            for wanted in (name, "*"):
                fitting = [e for e in entries if e["op"] == op and e["dtype"] == wanted]
                if not fitting:
                    continue
                nearest = min(fitting, key=lambda e: abs(math.log(max(e["d"], 1) / max(d, 1))))
                return float(nearest["threshold"])
        return 0.0


_tables = _Tables()


def reload() -> None:
    """Read the tables anew."""
    global _tables
    _tables = _Tables()


def sparse_wins(
    op: str, device: torch.device, dtype: torch.dtype, d: int, n_features: int, k: int
) -> bool:
    """Whether the sparse path of "encode" or "decode" is the faster one for these sizes.

    Args:
        op: "encode" (screening rather than the product and row_topk) or "decode" (gathered rows
            rather than the product with scattered codes).
    """
    return n_features >= _tables.threshold(op, device, dtype, d) * k


@dataclass(frozen=True)
class Dense:
    """The dense alternative of an operator on sparse codes, and where it wins.

    Args:
        key: of the table, as for `sparse_wins`.
        run: takes the operator's arguments. It is called in their own dtype, unchecked: what people
            pass has been checked by the public function.
        sizes: of the operator's arguments, w `[F, d]` and the slots a token.
    """

    key: str
    run: Callable[..., Any]
    sizes: Callable[..., tuple[torch.Tensor, int]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", in_own_dtype(self.run))

    def wins(self, args: Sequence[Any]) -> bool:
        w, k = self.sizes(*args)
        return not sparse_wins(self.key, w.device, w.dtype, w.shape[1], w.shape[0], k)

    def reason(self, args: Sequence[Any]) -> str:
        """What `wins` compares, in words."""
        w, k = self.sizes(*args)
        least = _tables.threshold(self.key, w.device, w.dtype, w.shape[1])
        ratio = w.shape[0] / k if k else math.inf
        name = str(w.dtype).removeprefix("torch.")
        side = "below" if self.wins(args) else "not below"
        return (
            f"F / k = {ratio:.4g} is {side} the crossover {least:.4g} ({self.key}, {name}, "
            f"d {w.shape[1]})"
        )
