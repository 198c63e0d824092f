# SPDX-License-Identifier: Apache-2.0
"""safetensors files: written in blocks with a checksum, read with every fault named.

Written here and not by the library, whose writer (0.8) leaves a `.tmpXXXXXX` when it is killed,
which nobody may delete: it bears nobody's name. The checksum costs no second read this way.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from mikernels.files import BLOCK, irregular, replacing, sha256_of, write_all

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def check_writable(name: str, t: torch.Tensor) -> None:
    """A tensor that a safetensors file can hold.

    Raises:
        TypeError: `<name> must be ..., got ...`.
    """
    if t.layout != torch.strided or t.dtype not in DTYPES or t.is_quantized:
        raise TypeError(
            f"{name} must be dense, of one of {[str(d) for d in DTYPES]}, got {t.dtype} "
            f"({t.layout})"
        )
    if t.device.type == "meta":
        raise TypeError(f"{name} must have values, got a tensor on the meta device")


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors atomically; returns the SHA-256 of the file.

    Raises:
        TypeError: for a tensor that the format cannot hold. OSError: it cannot be written.
    """
    with replacing(path) as file:
        return dump_tensors(file, tensors, metadata)


def dump_tensors(
    file: BinaryIO, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors to an open file, as `write_tensors`."""
    for name, t in tensors.items():
        check_writable(name, t)
    # by size, so that every tensor is aligned to its elements
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name, t in ordered:
        end = at + t.numel() * t.dtype.itemsize
        header[name] = {
            "dtype": DTYPES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    for part in (struct.pack("<Q", len(text)), text):
        write_all(file, part)
        digest.update(part)
    for _, t in ordered:
        data = bytes_of(t)
        for start in range(0, len(data), BLOCK):
            write_all(file, data[start : start + BLOCK])
            digest.update(data[start : start + BLOCK])
    return digest.hexdigest()


def bytes_of(t: torch.Tensor) -> memoryview:
    """A tensor's elements as they lie in a file; a copy only where it is not so in memory."""
    whole = t.detach().cpu().contiguous()
    # a single entry may have any stride, and a view of bytes needs 1
    flat = whole.as_strided((whole.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def open_tensors(path: Path) -> safe_open:
    """Open a safetensors file: its header is checked, its data mapped.

    Raises:
        ValueError, OSError: with the reason alone.
    """
    if kind := irregular(os.stat(path).st_mode):
        raise ValueError(kind)
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"SafetensorError: {error}") from error


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a file, in memory of their own.

    Args:
        sha256: what the file's bytes must give; None where none was kept.

    Raises:
        ValueError, OSError: with the reason alone.
    """
    try:
        with open_tensors(path) as file:
            if sha256 is not None and (now := sha256_of(path)) != sha256:
                raise ValueError(
                    f"bytes with SHA-256 {now[:16]}..., written as {sha256[:16]}...: they have "
                    f"changed on the disk"
                )
            # cloned: a tensor that maps the file would go with it
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        # beside its own, the library raises what torch says to a dtype or shape
        raise ValueError(f"{type(error).__name__}: {error}") from error


def overlap(tensors: Mapping[str, torch.Tensor]) -> tuple[str, str] | None:
    """Two names whose memory overlaps, if there are such."""
    spans = []
    for name, t in tensors.items():
        if t.numel():
            last = sum(
                (size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)
            )
            spans.append((str(t.device), t.data_ptr(), last * t.itemsize + t.itemsize, name))
    spans.sort()
    for one, other in zip(spans, spans[1:], strict=False):
        if one[0] == other[0] and other[1] < one[1] + one[2]:
            return min(one[3], other[3]), max(one[3], other[3])
    return None
