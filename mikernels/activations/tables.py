# SPDX-License-Identifier: Apache-2.0
"""A column of texts: parquet and arrow files, and datasets that `datasets.save_to_disk` wrote.

Rows are read in blocks; nothing of a file is executed. Needs the extra `datasets` (`pyarrow` alone
is enough for single files).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mikernels.files import read_json

WHERE = "TextFiles"
# texts of a block: 10 MB of pages of 10 kB
ROWS = 1000
SPLITS, STATE = "dataset_dict.json", "state.json"


def is_saved(folder: Path) -> bool:
    """Whether a folder is one of `save_to_disk`."""
    return (folder / SPLITS).is_file() or (
        (folder / STATE).is_file() and (folder / "dataset_info.json").is_file()
    )


def saved_dataset(folder: Path, field: str) -> Iterator[str]:
    """The texts of a dataset, or of the one split of a dictionary of them."""
    if (folder / SPLITS).is_file():
        raw = read_json(folder / SPLITS, WHERE, "a dictionary of splits", "save it again")
        splits = raw.get("splits") if isinstance(raw, dict) else None
        if not isinstance(splits, list) or len(splits) != 1:
            first = splits[0] if isinstance(splits, list) and splits else "SPLIT"
            raise ValueError(
                f"{WHERE}: {folder} must be one split of a dataset, got the splits {splits}; name "
                f"one, e.g. {folder / str(first)}"
            )
        folder = folder / str(splits[0])
    datasets = _module("datasets", folder)
    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged folder may raise anything there
        raise _unreadable(folder, "a dataset of save_to_disk", error) from error
    column = _column(folder, dataset.features.arrow_schema, field)
    if not len(dataset):
        return
    blocks = dataset.select_columns([column[0]]).with_format("arrow").iter(ROWS)
    yield from _texts(folder, blocks, column, field)


def parquet(path: Path, field: str) -> Iterator[str]:
    """The texts of a parquet file."""
    pq = _module("pyarrow.parquet", path)
    try:
        file = pq.ParquetFile(path)
    except Exception as error:
        raise _unreadable(path, "a parquet file", error) from error
    with file:
        column = _column(path, file.schema_arrow, field)
        blocks = file.iter_batches(ROWS, columns=[".".join(column)])
        yield from _texts(path, blocks, column, field)


def arrow(path: Path, field: str) -> Iterator[str]:
    """The texts of an arrow file, in the form of a stream (as `datasets` caches them) or a file."""
    pa = _module("pyarrow", path)
    try:
        mapped = pa.memory_map(str(path))
        try:
            reader = pa.ipc.open_stream(mapped)
        except pa.ArrowInvalid:
            mapped.seek(0)
            reader = pa.ipc.open_file(mapped)
    except Exception as error:
        raise _unreadable(path, "an arrow file", error) from error
    with mapped:
        column = _column(path, reader.schema, field)
        if hasattr(reader, "num_record_batches"):
            found = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            found = iter(reader)
        blocks = (b.slice(at, ROWS) for b in found for at in range(0, b.num_rows, ROWS))
        yield from _texts(path, blocks, column, field)


def _texts(path: Path, blocks: Any, column: list[str], field: str) -> Iterator[str]:
    row = 0
    blocks = iter(blocks)
    while True:
        try:
            block = next(blocks, None)
            if block is None:
                return
            values = block[column[0]].to_pylist()
        except (OSError, ValueError) as error:  # what pyarrow raises derives from them
            raise _unreadable(path, "whole", error) from error
        for value in values:
            for name in column[1:]:
                value = None if value is None else value[name]
            if value is None:
                raise ValueError(
                    f"{WHERE}: {path} row {row} must have text in {field!r}, got null; leave such "
                    f"rows out, e.g. with dataset.filter"
                )
            yield value
            row += 1


def _column(path: Path, schema: Any, field: str) -> list[str]:
    """The names that lead to the field: a column, or one within it."""
    import pyarrow as pa

    names = [field] if field in schema.names else field.split(".")
    kind: Any = schema
    for name in names:
        inner = {part.name: part.type for part in kind} if kind is schema or _nested(kind) else {}
        if name not in inner:
            raise ValueError(
                f"{WHERE}: {path} must have the column {field!r}, got {_leaves(schema)}; name one "
                f"of them with field= (--field)"
            )
        kind = inner[name]
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string)):
        raise ValueError(
            f"{WHERE}: {path} must have texts in {field!r}, got {kind}; name a column of strings "
            f"with field= (--field)"
        )
    return names


def _nested(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind)


def _leaves(kind: Any, within: str = "") -> list[str]:
    found = []
    for part in kind:
        name = f"{within}{part.name}"
        found += _leaves(part.type, f"{name}.") if _nested(part.type) else [name]
    return found


def _module(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{WHERE}: {name.split('.')[0]} must be installed to read {path}; `pip install "
            f"'mikernels[datasets]'`"
        ) from error


def _unreadable(path: Path, expected: str, error: Exception) -> ValueError:
    return ValueError(
        f"{WHERE}: {path} must be {expected}, got {type(error).__name__}: {error}; write it again"
    )
