# SPDX-License-Identifier: Apache-2.0
"""Files as documents for `ModelSource`: plain text, records of JSON lines, tables."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from mikernels.files import LARGEST_JSON

T = TypeVar("T")
BLOCK = 1 << 20
LINES = (".jsonl", ".ndjson")
TABLES = (".parquet", ".arrow")
# of the files of a folder, those that are read
READ = (".txt", *LINES, *TABLES)
WHERE = "TextFiles"


class TextFiles:
    """Texts of files, as documents of at most about 2 MB, read as they are needed.

        .txt or any other name     UTF-8 text
        .jsonl, .ndjson            a JSON object a line, with the text in a field
        .parquet, .arrow           a table with the text in a column (the extra `datasets`)
        a folder                   what `datasets.save_to_disk` wrote, or files of one of these
                                   kinds, by name

    Text and JSON lines may be compressed by gzip (`.gz`). Line ends become "\\n", a byte order mark
    is left out.

    Args:
        paths: files and folders, read in this order, again for each epoch.
        field: the field or column of records; "meta.title" is title in meta, unless there is a
            field of that whole name.

    Attributes:
        paths: absolute.

    Raises:
        FileNotFoundError, ValueError: a file that is missing, empty, no text, or whose first record
            has no such field, which the message names with those that it has. While reading: a bad
            line or row, by file and number.
        ModuleNotFoundError: a table without the extra `datasets`.

    Example:
        source = ModelSource(model, tokenizer, 6, TextFiles(["pile.jsonl.gz"], field="text"))
    """

    def __init__(self, paths: Iterable[str | Path], field: str = "text"):
        if isinstance(paths, str | Path):
            raise TypeError(f"{WHERE}: paths must be a list of files, got one path; pass [path]")
        self.paths = [Path(path).expanduser().absolute() for path in paths]
        self.field = field
        if not self.paths:
            raise ValueError(f"{WHERE}: paths must name at least one text file, got none")
        self._documents = [make for path in self.paths for make in _of_path(path, field)]
        for path, make in self._documents:
            # what is wrong with the whole file is said now, and not when a model has run for hours
            if next(make(), None) is None:
                raise ValueError(f"{WHERE}: {path} must hold text, got an empty file")

    def files(self) -> list[Path]:
        """Every file that is read, those in folders of `save_to_disk` included."""
        found = []
        for path, _ in self._documents:
            inner = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            found += inner
        return found

    def most_tokens(self) -> int | None:
        """A token has at least a byte: the bytes of the files, None where they are compressed."""
        files = self.files()
        if any(_kind(path) in TABLES or path.suffix.lower() == ".gz" for path in files):
            return None
        return sum(path.stat().st_size for path in files)

    def __iter__(self) -> Iterator[str]:
        for _, make in self._documents:
            yield from make()


Documents = Callable[[], Iterator[str]]


def _of_path(path: Path, field: str) -> list[tuple[Path, Documents]]:
    """Each file of a path with what reads it."""
    if path.is_dir():
        from mikernels.activations.tables import is_saved, saved_dataset

        if is_saved(path):
            return [(path, partial(saved_dataset, path, field))]
        return [(file, _of_file(file, field)) for file in _files_of(path)]
    if not path.is_file():
        raise FileNotFoundError(f"{WHERE}: {path} must be an existing text file or folder of such")
    return [(path, _of_file(path, field))]


def _files_of(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if p.is_file() and _kind(p) in READ)
    kinds = sorted({_kind(file) for file in files})
    if len(kinds) != 1:
        raise ValueError(
            f"{WHERE}: {folder} must be a dataset of save_to_disk, or hold files of one kind among "
            f"{', '.join(READ)}, got {', '.join(kinds) or 'none'}; name the files one by one"
        )
    return files


def _kind(path: Path) -> str:
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return name.suffix.lower()


def _of_file(path: Path, field: str) -> Documents:
    kind = _kind(path)
    if kind in TABLES:
        from mikernels.activations import tables

        return partial(tables.parquet if kind == ".parquet" else tables.arrow, path, field)
    if kind == ".zst":
        raise ValueError(
            f"{WHERE}: {path} must be plain or .gz, got .zst; unpack it, e.g. `unzstd {path.name}`"
        )
    if kind in LINES:
        return partial(_records, path, field)
    if kind == ".json":
        if not _first_line_is_object(path):
            raise ValueError(
                f"{WHERE}: {path} must be text or JSON lines, got one JSON document, whose "
                f"brackets and names would be read as text; write a record a line, e.g. `jq -c "
                f"'.[]' {path.name} > {path.stem}.jsonl`, and name the field that is the text"
            )
        return partial(_records, path, field)
    return partial(_plain, path)


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read(path: Path, read: Callable[[int], T], size: int) -> T:
    """`read(size)`, with the file's name in what it raises.

    Around a single call: a generator that is dropped half-way, at the end of the interpreter, finds
    no names of modules to catch.
    """
    try:
        return read(size)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{WHERE}: {path} must be UTF-8 text, got {_encoding(path) or error}; convert it, e.g. "
            f"with iconv"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{WHERE}: {path} must be a complete gzip file, got {error}; fetch it again"
        ) from error


def _plain(path: Path) -> Iterator[str]:
    with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as file:
        # a line that does not end is cut, not held in memory
        while text := _read(path, file.read, BLOCK):
            text += _read(path, file.readline, BLOCK)
            if "\0" in text:
                raise ValueError(
                    f"{WHERE}: {path} must be UTF-8 text, got a NUL byte, as binary files and "
                    f"UTF-16 have; convert it"
                )
            yield text


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        mark = file.read(2)
    return "UTF-16, or a binary file" if mark in (b"\xff\xfe", b"\xfe\xff") else ""


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers."""
    with _open(path) as file:
        number = 0
        while line := _read(path, file.readline, LARGEST_JSON + 1):
            number += 1
            if len(line) > LARGEST_JSON:
                raise ValueError(
                    f"{WHERE}: {path} line {number} must be of at most {LARGEST_JSON:,} bytes, got "
                    f"more; write a record a line"
                )
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.isspace():
                yield number, line


def _first_line_is_object(path: Path) -> bool:
    _, line = next(_lines(path), (0, b"{}"))
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _records(path: Path, field: str) -> Iterator[str]:
    for number, line in _lines(path):
        try:
            text = text_of(_object(line), field)
        except ValueError as error:
            raise ValueError(f"{WHERE}: {path} line {number} must be {error}") from error
        yield text


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        shown = line[:40].decode(errors="backslashreplace").rstrip()
        raise ValueError(f"a JSON object, got {shown!r} ({error}); mend or remove it") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"a JSON object, got {type(value).__name__}; write each record as "
            '{"text": "..."} on a line of its own'
        )
    return value


def text_of(record: dict[str, Any], field: str) -> str:
    """The text in a field of a record, `a.b` in a record within it.

    Raises:
        ValueError: `<what it must be>, got <...>; <fix>`.
    """
    value: Any = record
    names = [field] if field in record else field.split(".")
    for name in names:
        if not isinstance(value, dict) or name not in value:
            raise ValueError(
                f"a record with the field {field!r}, got {_shown(names_of(record))}; name one of "
                f"them with field= (--field)"
            )
        value = value[name]
    if not isinstance(value, str):
        raise ValueError(
            f"a record with text in {field!r}, got {type(value).__name__} "
            f"{json.dumps(value)[:60]}; name a field of texts with field= (--field), or mend or "
            f"remove the record"
        )
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"a record with text in {field!r}, got half of a surrogate pair: {error.reason}; "
                f"mend or remove the record"
            ) from error
    return value


def names_of(record: dict[str, Any], within: str = "") -> list[str]:
    """Fields, those of records within them by `a.b`."""
    found = []
    for name, value in record.items():
        inner = isinstance(value, dict) and value
        found += names_of(value, f"{within}{name}.") if inner else [f"{within}{name}"]
    return found


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"{names[:20]}{more}" if names else "a record without fields"
