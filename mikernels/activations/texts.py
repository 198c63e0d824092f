# SPDX-License-Identifier: Apache-2.0
"""Text files as documents for `ModelSource`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

BLOCK = 1 << 20


class TextFiles:
    """Text files as documents of at most about 1 MB, read as they are needed.

    Raises:
        FileNotFoundError, ValueError: a missing or empty file; while reading, one that is not
            UTF-8.
    """

    def __init__(self, paths: Iterable[str | Path]):
        self.paths = [Path(path).absolute() for path in paths]  # read again each epoch
        if not self.paths:
            raise ValueError("TextFiles: paths must name at least one text file, got none")
        for path in self.paths:
            if not path.is_file():
                raise FileNotFoundError(f"TextFiles: {path} must be an existing text file")
            if path.stat().st_size == 0:
                raise ValueError(f"TextFiles: {path} must hold text, got an empty file")

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            try:
                with path.open(encoding="utf-8") as file:
                    while text := file.read(BLOCK):
                        yield text + file.readline()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"TextFiles: {path} must be UTF-8 text, got {error}; convert it, e.g. with "
                    f"iconv"
                ) from error
