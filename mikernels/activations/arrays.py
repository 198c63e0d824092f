# SPDX-License-Identifier: Apache-2.0
"""Activations in `.npy` files, mapped and never unpickled, in the form of a shard."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from mikernels.activations.sources import check_activations
from mikernels.files import irregular

WHERE = "ShardSource"
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_FLOATS = {2: torch.float16, 4: torch.float32, 8: torch.float64}


class ArrayShard:
    """One `.npy` file of `[rows, d]` in half, single or double precision, of any byte order, by
    rows or by columns: its rows stay on disk until they are read.

    Attributes:
        As those of `Shard`. There are no targets and no checksums.

    Raises:
        ValueError, TypeError: naming the file, for another shape or dtype, pickled objects, and a
            file that is cut short.
    """

    d_target: int | None = None

    def __init__(self, path: Path):
        self.path = path
        self.extra: list[str] = []
        status = os.stat(path)
        if kind := irregular(status.st_mode):
            raise self._refused(kind)
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                shape, _, kind_of = _HEADERS[version](file)
                start = file.tell()
        except KeyError as error:
            raise self._refused(f"version {error} of the format") from error
        except (ValueError, OSError) as error:
            raise self._refused(str(error)) from error
        if kind_of.hasobject:
            raise self._refused(f"{kind_of}, pickled objects, which are not read: they run code")
        if kind_of.kind != "f" or kind_of.itemsize not in _FLOATS:
            raw = kind_of.kind == "V"
            fix = "save bfloat16 as .safetensors" if raw else "convert it with x.astype('float32')"
            raise TypeError(
                f"{WHERE}: {path} must be float16, float32 or float64, got {kind_of}; {fix}"
            )
        self.dtype = _FLOATS[kind_of.itemsize]
        check_activations(WHERE, str(path), list(shape), self.dtype)
        self.rows, self.d = shape
        self.row_bytes = self.d * kind_of.itemsize
        if status.st_size < start + self.rows * self.row_bytes:
            raise self._refused(f"{status.st_size:,} bytes for {list(shape)}: it was cut short")
        self._data = np.load(path, mmap_mode="r", allow_pickle=False)
        self._native = kind_of.newbyteorder("=")

    def _refused(self, got: str) -> ValueError:
        return ValueError(
            f"{WHERE}: {self.path} must be a complete .npy file of [rows, d], got {got}; write it "
            f"again with numpy.save"
        )

    def read(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Rows start..stop-1 (cut at the end), in memory of their own."""
        rows = np.array(self._data[start:stop], dtype=self._native, order="C")
        return {"activations": torch.from_numpy(rows)}


def refuse_pickle(path: Path) -> None:
    """ValueError for a file that only unpickling reads, with a way."""
    if path.suffix.lower() in PICKLES:
        new = path.with_suffix(".safetensors").name
        raise ValueError(
            f"{WHERE}: {path} must be .safetensors or .npy, got a pickle, which can run any code "
            f"when it is read; convert it once, with a reader that runs none:\n"
            f"  import torch; from safetensors.torch import save_file\n"
            f"  save_file({{'activations': torch.load({path.name!r}, map_location='cpu', "
            f"weights_only=True)}}, {new!r})"
        )
