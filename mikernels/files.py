# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent, and JSON that is read strictly.

A file is written beside its place under one name of ours, `.<name>.partial`, flushed to the disk
and renamed: a kill or a full disk leaves the former file as it was. What is read back must be a
regular file of a bounded size: a FIFO would be waited for, a device never ends. JSON must be what
its writer can have meant: UTF-8, no name twice, no NaN or Infinity, no deep nesting.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

LARGEST_JSON = 256 << 20
DEEPEST_JSON = 64
BLOCK = 4 << 20
SEAL = "sha256"


@contextmanager
def explained(where: str, what: str, path: Path, fix: str) -> Iterator[None]:
    """An OSError within says what could not be written, and where; its errno stays."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        message = f"{where}: {what} must be written to {path}, got {reason}; {fix}"
        raise OSError(error.errno or 0, message) from error


def partial_of(path: Path) -> Path:
    """The name under which `path` is written."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """An unbuffered file that takes the place of `path` when the block ends well.

    Unbuffered: a write that fails has failed there, not once more while closing. A link at `path`
    is replaced, not followed.
    """
    partial = partial_of(path)
    # a link, or another name of somebody's file, is cut off rather than written through
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):  # the error under way is the one that tells
            partial.unlink()
        raise
    sync_folder(path.parent)


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write everything: an unbuffered write may stop in between."""
    left = memoryview(data).cast("B")
    while left:
        left = left[file.write(left) :]


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file, or leave the former one."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with replacing(path) as file:
        write_all(file, data)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON that `read_json` takes back.

    Raises:
        TypeError, ValueError: for what JSON cannot hold, NaN and infinity included.
    """
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """`value` with null for every number that is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries: a renamed file survives a power cut from here on."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def irregular(mode: int) -> str | None:
    """What a file is, if it is not a regular one."""
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    kinds[stat.S_IFLNK] = "a symbolic link"
    return kinds.get(stat.S_IFMT(mode), "a device")


def open_regular(path: Path) -> BinaryIO:
    """Open an existing regular file for reading.

    Raises:
        OSError: it cannot be opened. ValueError: it is a folder, a FIFO, a socket or a device.
    """
    # O_NONBLOCK: opening a FIFO would wait for its writer
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if kind := irregular(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(kind)
    return os.fdopen(descriptor, "rb")


def read_json(path: Path, where: str, expected: str, fix: str) -> Any:
    """The value in a JSON file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: `<where>: <path> must be <expected>, got <reason>; <fix>`.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_JSON:
                raise ValueError(f"{size:,} bytes (at most {LARGEST_JSON:,})")
            data = file.read(LARGEST_JSON + 1)
        return parse_json(data)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{where}: {path} must be {expected}, got no such file; {fix}"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: {path} must be {expected}, got {error}; {fix}") from error


def parse_json(data: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: with the reason alone.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"bytes that are not UTF-8 at {error.start}") from error
    if text.startswith("\ufeff"):
        raise ValueError("a byte order mark before the JSON")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_once,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_within_a_double,
        )
        _check_depth(value)
    except RecursionError as error:
        raise ValueError(f"nesting deeper than {DEEPEST_JSON}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from error
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} twice in an object")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name}, which is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]}, which is beyond a double")
    return value


def _within_a_double(digits: str) -> int:
    _finite(digits)  # what is used as a number with a fraction would overflow there
    return int(digits)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST_JSON):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        if not inner:
            return
        level = inner
    raise ValueError(f"nesting deeper than {DEEPEST_JSON}")


def check_json(value: Any, name: str, room: int = DEEPEST_JSON - 4) -> None:
    """`value` comes back from a JSON file as it is, tuples as lists.

    Args:
        room: levels that it may have; the file has some of its own around it.

    Raises:
        TypeError, ValueError: `<name> must be ..., got ...`, with the place within the value.
    """
    if room < 0:
        raise ValueError(f"{name[:60]}... must be nested at most {DEEPEST_JSON - 4} deep, got more")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{name} must have names that are strings, got {key!r}")
            check_json(item, f"{name}.{key}", room - 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_json(item, f"{name}.{index}", room - 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    elif isinstance(value, int):
        if abs(value) > sys.float_info.max:
            raise ValueError(f"{name} must be within a double, got {value.bit_length()} bits")
    elif value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be JSON-able, got {type(value).__name__}")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, as `sha256sum` prints it: 2 GB/s with SHA instructions."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sealed(value: dict[str, Any], **files: str) -> dict[str, Any]:
    """`value` with the checksums of files, and under "self" that of everything else in it."""
    rest = {**value, SEAL: dict(files)}
    return {**value, SEAL: {**files, "self": _digest(rest)}}


def check_seal(value: dict[str, Any]) -> None:
    """What was sealed is as it was.

    Raises:
        ValueError: with the reason alone.
    """
    seal = dict(value[SEAL])
    written = seal.pop("self", None)
    if written != (now := _digest({**value, SEAL: seal})):
        raise ValueError(f"contents with SHA-256 {now[:16]}..., written as {str(written)[:16]}...")


def _digest(value: dict[str, Any]) -> str:
    # the numbers, not the text: 17 digits give a double back, and so does their reader
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
