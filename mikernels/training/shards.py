# SPDX-License-Identifier: Apache-2.0
"""Activation shards: a folder of safetensors files and an `index.json`, written atomically.

Every shard holds `activations [rows, d]` and any number of tensors with one entry a row, such as
`token_ids [rows]`. `index.json` names the shards with their rows, and is written last, so that its
presence means that the folder is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

INDEX = "index.json"


class Shard:
    """One opened file: its shape is known, its rows stay on disk until they are read.

    Attributes:
        path: the file. rows, d, dtype: of its activations. extra: names of the other tensors.
    """

    def __init__(self, path: Path, key: str):
        self.path = path
        try:
            # the pages are mapped, not read; the map lives as long as this object
            self._file = safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"ShardSource: {path} must be a complete safetensors file, got {error}; it is "
                f"truncated or of another format: write it again or move it out of the folder"
            ) from error
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        shapes = {name: list(part.get_shape()) for name, part in slices.items()}
        matrices = [name for name, shape in shapes.items() if len(shape) == 2]
        if key not in slices and len(matrices) == 1:
            key = matrices[0]
        if key not in slices or len(shapes[key]) != 2:
            raise ValueError(
                f"ShardSource: {path} must hold a tensor {key!r} [rows, d], got {shapes}; name the "
                f"tensor with key="
            )
        self.rows, self.d = shapes[key]
        self.dtype = slices[key][:0].dtype
        self._slices = {"activations": slices.pop(key)}
        self._slices |= {
            name: part for name, part in slices.items() if shapes[name][:1] == [self.rows]
        }
        self.extra = sorted(self._slices.keys() - {"activations"})

    def read(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Rows start..stop-1 (cut at the end) of every tensor."""
        return {name: part[start : min(stop, self.rows)] for name, part in self._slices.items()}


def open_shards(folder: str | Path, key: str = "activations") -> list[Shard]:
    """The shards of a folder (or the one file given), checked against `index.json` if there is one.

    Raises:
        FileNotFoundError: no such folder, no shard in it, or a listed shard is missing.
        ValueError: a shard that is truncated, foreign, or does not agree with the index.
    """
    folder = Path(folder)
    if folder.is_file():
        return [Shard(folder, key)]
    if not folder.is_dir():
        raise FileNotFoundError(
            f"ShardSource: folder must be an existing folder of safetensors shards, got {folder}"
        )
    paths = sorted(folder.glob("*.safetensors"))
    expected: dict[str, int] = {}
    if (folder / INDEX).exists():
        expected = {shard["file"]: shard["rows"] for shard in read_index(folder)["shards"]}
        names = {path.name for path in paths}
        for name in expected.keys() - names:
            raise FileNotFoundError(
                f"ShardSource: {folder / name} is listed in {INDEX} and missing; write the shards "
                f"again or restore it"
            )
        for name in names - expected.keys():
            raise ValueError(
                f"ShardSource: {folder / name} is not listed in {INDEX}; move it out of the folder"
            )
    if not paths:
        raise FileNotFoundError(f"ShardSource: {folder} must hold *.safetensors files, got none")
    shards = [Shard(path, key) for path in paths]
    for shard in shards:
        if shard.rows != expected.get(shard.path.name, shard.rows):
            raise ValueError(
                f"ShardSource: {shard.path} must have {expected[shard.path.name]} rows by {INDEX}, "
                f"got {shard.rows}; write the shards again"
            )
    return shards


def read_index(folder: str | Path) -> dict[str, Any]:
    """`{"shards": [{"file", "rows"}, ...], "metadata": {...}}` as written by `write_shards`.

    Raises:
        ValueError: when the file is not such an index.
    """
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_text())
        index["metadata"], [(shard["file"], shard["rows"]) for shard in index["shards"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"ShardSource: {path} must be an index written by write_shards, got {error!r}; remove "
            f"it to read every shard of the folder"
        ) from error
    return index


def write_shards(
    folder: str | Path,
    batches: Iterable[torch.Tensor | dict[str, torch.Tensor]],
    *,
    rows_per_shard: int = 65_536,
    dtype: torch.dtype | None = None,
    metadata: dict[str, Any] | None = None,
) -> int:
    """Write activations as shards that `ShardSource` reads; returns the number of rows.

    Args:
        folder: made if missing; must not hold shards yet.
        batches: `[n, d]` activations, or dicts of `activations [n, d]` and tensors `[n, ...]`.
        rows_per_shard: rows of every shard but the last.
        dtype: of the stored activations; None keeps theirs.
        metadata: JSON-able, returned by `read_index`.

    Raises:
        FileExistsError: when the folder holds shards.
        ValueError: when there is no row.
        OSError: when a file cannot be written, e.g. on a full disk; earlier shards stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.safetensors")) or (folder / INDEX).exists():
        raise FileExistsError(
            f"write_shards: folder must hold no shards yet, got {folder}; remove them or choose "
            f"another folder"
        )
    shards: list[dict[str, Any]] = []
    held: list[dict[str, torch.Tensor]] = []
    n_held = 0

    def flush(limit: int) -> None:
        nonlocal held, n_held
        while n_held >= max(limit, 1):
            rows = {name: torch.cat([part[name] for part in held]) for name in held[0]}
            shard = {name: tensor[:rows_per_shard].contiguous() for name, tensor in rows.items()}
            held = [{name: tensor[rows_per_shard:] for name, tensor in rows.items()}]
            n_shard = shard["activations"].shape[0]
            n_held -= n_shard
            name = f"activations-{len(shards):05d}.safetensors"
            _write_atomic(folder / name, shard)
            shards.append({"file": name, "rows": n_shard})

    for batch in batches:
        rows = dict(batch) if isinstance(batch, dict) else {"activations": batch}
        rows["activations"] = rows["activations"].to(dtype or rows["activations"].dtype)
        held.append(rows)
        n_held += rows["activations"].shape[0]
        flush(rows_per_shard)
    flush(1)
    if not shards:
        raise ValueError("write_shards: batches must hold at least one row, got none")
    temporary = folder / f".{INDEX}"
    temporary.write_text(json.dumps({"shards": shards, "metadata": metadata or {}}, indent=1))
    os.replace(temporary, folder / INDEX)
    return sum(shard["rows"] for shard in shards)


def _write_atomic(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, str(temporary))
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"write_shards: {path} could not be written: {error}; free space or choose another "
            f"folder"
        ) from error
