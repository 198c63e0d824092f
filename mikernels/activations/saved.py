# SPDX-License-Identifier: Apache-2.0
"""Activations of a model kept as shards that say what they were made from, to be used again.

`index.json` has, beside the text of every token id ("pieces", for `mikernels rate`), what decides
the numbers: sites, windows, and the files of model and texts by size and SHA-256. A file whose size
and time of change are those of then is taken for the same; another is read (2 GB/s).
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mikernels.activations.model import ModelSource
from mikernels.activations.shards import INDEX, read_index, remove_shards, write_shards
from mikernels.activations.sources import Rows
from mikernels.files import sha256_of

WHERE = "save_activations"
FILES = ("model", "texts")


def fingerprints(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Name, size, time of change and SHA-256 of files; reads all of them."""
    return [{**_stat(path), "sha256": sha256_of(path)} for path in files]


def _stat(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"name": path.name, "bytes": status.st_size, "changed": status.st_mtime_ns}


def is_saved(folder: Path, origin: dict[str, Any], files: dict[str, list[Path]], rows: int) -> bool:
    """Whether a folder holds these activations. What an interrupted collection left there is
    deleted, to be made again.

    Args:
        origin: JSON-able, what decides the numbers beside files.
        files: of the model and of the texts, by these names.
        rows: how many are wanted; fewer will do where the text has no more.

    Raises:
        ValueError: the folder holds other activations, or fewer. FileExistsError: something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / INDEX).exists():
        remove_shards(folder)
        return False
    metadata = read_index(folder)["metadata"]
    saved = metadata.get("made_from")
    fix = "choose another folder, or delete this one to make them again"
    if not isinstance(saved, dict):
        raise FileExistsError(
            f"{WHERE}: {folder} must be empty or hold activations that say what they were made "
            f"from, got {sorted(metadata)}; {fix}"
        )
    for name, value in origin.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{WHERE}: {folder} must hold activations with {name} = {value!r}, got "
                f"{saved.get(name)!r}; {fix}"
            )
    for name in FILES:
        if changed := _changed(saved.get(name), files[name]):
            raise ValueError(
                f"{WHERE}: {folder} must hold activations of the same {name}, got {changed}; {fix}"
            )
    held = metadata.get("rows")
    if metadata.get("whole_text") is not True and not (isinstance(held, int) and held >= rows):
        raise ValueError(
            f"{WHERE}: {folder} must hold {rows:,} rows, got {held:,}; {fix}, or ask for fewer"
        )
    return True


def _changed(saved: Any, files: list[Path]) -> str | None:
    """What is not as it was saved."""
    was = [one["name"] for one in saved] if isinstance(saved, list) else []
    names = [path.name for path in files]
    if was != names:
        return f"{was} then and {names} now"
    for then, path in zip(saved, files, strict=True):
        now = _stat(path)
        same = then["bytes"] == now["bytes"]
        if not same or (then["changed"] != now["changed"] and then["sha256"] != sha256_of(path)):
            return f"another {path}"
    return None


def save_activations(
    folder: Path,
    source: ModelSource,
    rows: int,
    origin: dict[str, Any],
    files: dict[str, list[Path]],
    *,
    most: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> int:
    """Write the first rows of a source's epoch as shards; returns how many there were.

    Args:
        origin, files, rows: as for `is_saved`, which has been False.
        most: rows that the text can have, where that is known.
        on_progress: called with the rows so far.

    Raises:
        OSError: the disk has no room for them, which is found before the model runs; or as
            `write_shards`.
    """
    # float32, and three int64 of where the row is from
    row_bytes = 4 * (source.d + (source.d_out if source.target_sites else 0)) + 24
    needed = row_bytes * min(rows, rows if most is None else most)
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(above).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{WHERE}: {folder} must have {needed / 1e6:,.0f} MB free for {needed // row_bytes:,} "
            f"rows, got {free / 1e6:,.0f} MB; free space, choose another folder or fewer rows",
        )
    held, whole, ids = 0, False, set()
    made_from = {**origin, **{name: fingerprints(files[name]) for name in FILES}}

    def parts() -> Iterator[Rows]:
        nonlocal held, whole
        for part in source.read():
            part = {name: t[: rows - held] for name, t in part.items()}
            held += part["activations"].shape[0]
            ids.update(part["token_ids"].unique().tolist())
            yield part
            if on_progress is not None:
                on_progress(held)
            if held == rows:
                return
        whole = True

    def metadata() -> dict[str, Any]:
        decode = source.tokenizer.decode
        return {
            "title": f"activations of {', '.join(source.sites)}",
            "made_from": made_from,
            "rows": held,
            "whole_text": whole,
            "dropped": source.dropped,
            "pieces": {str(i): decode([i]) for i in sorted(ids)},
        }

    return write_shards(folder, parts(), metadata=metadata)
